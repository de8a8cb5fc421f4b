"""Draws metrics of runs over their steps, one panel a metric, one line a run.

bash run.sh tools.curves RUN [RUN ...] --metrics loss/noised/eps loss/noised/x0 --out curves.png
"""

import argparse
import os
import sys

from umd.runs.writers import read_jsonl


def series(run: str, metric: str) -> tuple[list[int], list[float]]:
  """(steps, values) of a metric in a run's metrics.jsonl; both empty if it was not logged."""
  points = [(r["step"], r[metric]) for r in read_jsonl(f"{run}/metrics.jsonl") if metric in r]
  return [step for step, _ in points], [value for _, value in points]


def draw(runs: list[str], metrics: list[str], out: str, log: bool) -> None:
  """Writes the picture to `out`.

  Raises:
    ValueError: a metric is in none of the runs, or a folder holds no metrics; names the known.
  """
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  known = {}
  for run in runs:
    records = read_jsonl(f"{run}/metrics.jsonl")
    known[run] = sorted({k for r in records for k in r if not isinstance(r[k], str)} - {"step"})
    if not known[run]:
      raise ValueError(f"{run!r} has no metrics.jsonl with metrics. Give folders of trained runs.")
  figure, axes = plt.subplots(1, len(metrics), figsize=(4.5 * len(metrics), 3.4), squeeze=False)
  root = os.path.commonpath(runs) if len(runs) > 1 else "."
  labels = [os.path.relpath(run, root) for run in runs]
  for axis, metric in zip(axes[0], metrics, strict=True):
    if not any(metric in known[run] for run in runs):
      names = sorted(set().union(*known.values()))
      raise ValueError(f"metric {metric!r} is in no run; known: {names}.")
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
      steps, values = series(run, metric)
      if steps:  # A run has the same colour in every panel.
        marker = "." if len(steps) < 4 else None
        axis.plot(steps, values, label=label, color=f"C{i}", linewidth=1.4, marker=marker)
    axis.set(title=metric, xlabel="step", yscale="log" if log else "linear")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(out, dpi=120)


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog="tools.curves", description=__doc__.split("\n")[0])
  parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with a metrics.jsonl")
  parser.add_argument("--metrics", nargs="+", default=["loss"])
  parser.add_argument("--out", default="curves.png")
  parser.add_argument("--log", action="store_true", help="logarithmic values")
  args = parser.parse_args(argv)
  try:
    draw(args.runs, args.metrics, args.out, args.log)
  except ValueError as error:
    sys.exit(f"error: {error}")
  print(args.out)


if __name__ == "__main__":
  main(sys.argv[1:])

"""Writes the report of a run, or compares runs: pages of one file, which need only a browser.

bash run.sh tools.report RUN                          # RUN/report.html, as training keeps it
bash run.sh tools.report RUN1 RUN2 --out compare.html

RUN is a run's workdir, or a folder of stages: then each stage is compared with those of its name.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

from umd import report
from umd.report import page, read
from umd.report import page as comparison
from umd.runs import workdir as folder


def stages(run: str) -> dict[str, str]:
  """{stage: its folder} of those that have begun; {"": run} for a run without stages.

  Raises:
    FileNotFoundError: there is no run.
  """
  found = {name: folder.join(run, name) for name in read.stages(run)}
  found = {name: path for name, path in found.items() if read.exists(path)}
  if not found and not read.exists(run):
    raise FileNotFoundError(
      f"{run!r} holds no run: neither config.json nor metrics.jsonl nor stages.json. Give the "
      "workdir of a run."
    )
  return found or {"": run}


def check_out(out: str) -> None:
  """Raises ValueError unless a file may be written there."""
  if not folder.scheme(out) and os.path.isdir(out):
    raise ValueError(f"--out={out!r} is a folder. Give the name of a file.")


def one(run: str, out: str) -> str:
  """Writes the report of a run, and of all its stages; where."""
  found = stages(run)
  if out and "" not in found:
    raise ValueError(
      f"--out={out!r}: {run!r} holds the stages {list(found)}, each with a report of its own. Drop "
      "--out, or name one of the stages."
    )
  if out:
    check_metrics(whole := read.read(run))
    folder.write_bytes(read.whole(out), page.run_page(whole).encode())
    return out
  for path in found.values():
    check_metrics(read.read(path))
  for path in found.values():
    report.write_run(path)
  if "" not in found or read.is_stage(run):
    report.write_overview(run if "" not in found else os.path.dirname(read.whole(run)))
  return folder.join(run, report.FILE)


def check_metrics(run: read.Run) -> None:
  """Raises ValueError if there is nothing to draw."""
  if not run.metrics:
    raise ValueError(f"{run.folder!r} has no metrics yet: its metrics.jsonl is missing or empty.")


def groups(paths: Sequence[str]) -> dict[str, list[read.Run]]:
  """{stage: the runs that have it}; stages that only one of them has are left out.

  Raises:
    FileNotFoundError: there is no such run.
    ValueError: one has no metrics, or there is nothing that two of them share.
  """
  found = [stages(path) for path in paths]
  plain = [path for path, has in zip(paths, found, strict=True) if "" in has]
  if 0 < len(plain) < len(paths):
    other = next(has for has in found if "" not in has)
    raise ValueError(
      f"{plain[0]!r} is a run, but others hold several, {list(other)}. Name one of those stages."
    )
  names = list(dict.fromkeys(n for has in found for n in has))
  shared = {name: [has[name] for has in found if name in has] for name in names}
  shared = {name: members for name, members in shared.items() if len(members) > 1}
  if not shared:
    raise ValueError(f"The runs share no stage: {[list(has) for has in found]}. Name stages.")
  runs = {name: [read.read(path) for path in members] for name, members in shared.items()}
  for run in (run for members in runs.values() for run in members):
    check_metrics(run)
  return {name: distinct(members) for name, members in runs.items()}


def distinct(runs: Sequence[read.Run]) -> list[read.Run]:
  """The runs, with as much of their paths in their labels as tells them apart."""
  if len({run.label for run in runs}) == len(runs):
    return list(runs)
  paths = [read.whole(run.folder).split("/") for run in runs]
  ends = lambda depth: ["/".join(path[-depth:]) for path in paths]
  known = len(set(map(tuple, paths)))  # One may have been named twice.
  labels = next(e for e in map(ends, range(1, 999)) if len(set(e)) == known)
  return [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def compare(paths: Sequence[str], out: str) -> str:
  """Writes the comparison; where."""
  folder.write_bytes(read.whole(out), comparison.page(groups(paths)).encode())
  return out


def main(argv: list[str]) -> None:
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("tools.report", None, __doc__, formatter_class=text)
  parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of a run or of stages")
  parser.add_argument("--out", default="", metavar="FILE", help="of a comparison: comparison.html")
  args = parser.parse_args(argv)
  try:
    check_out(args.out)
    several = len(args.runs) > 1
    print(
      compare(args.runs, args.out or "comparison.html") if several else one(*args.runs, args.out)
    )
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv[1:])

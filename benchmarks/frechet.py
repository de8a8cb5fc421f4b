"""Seconds and values of the Frechet distance: umd.metrics.frechet's against the formula with a matrix root.

python -m benchmarks.frechet --dims 2048 --samples 1000 10000 50000 --repeats 3 --out frechet.jsonl

The formula takes SciPy's sqrtm of the product of the covariances, as many evaluators do. Both run
in turns in one process. Where there are fewer samples than features the covariances are singular,
and the root of their product need not be right, nor real; `exact` is the distance by singular
values of the samples themselves, of which no root is taken.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np

from benchmarks.records import append
from umd.metrics.frechet import Moments, frechet_distance


def draw(samples: int, dim: int, scale: float, seed: int) -> np.ndarray:
  """Correlated rows [samples, dim], float32, with variances over six decades."""
  rng = np.random.default_rng(seed)
  basis = np.random.default_rng(0).standard_normal((dim, dim), np.float32) / np.sqrt(dim)
  spread = np.logspace(0, -3, dim, dtype=np.float32)
  rows = rng.standard_normal((samples, dim), np.float32)
  return scale * (rows * spread) @ basis + 0.4


def moments(rows: np.ndarray, batch: int = 1024) -> Moments:
  """Streamed as evaluators do."""
  found = Moments(rows.shape[1])
  for start in range(0, len(rows), batch):
    found.update(rows[start : start + batch])
  return found


def direct(mu1, sigma1, mu2, sigma2) -> float:
  """By the root of the product, its imaginary part dropped."""
  import scipy.linalg

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Singular products: their values are in the table.
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
  gap = np.square(mu1 - mu2).sum()
  return float(gap + np.trace(sigma1) + np.trace(sigma2) - 2.0 * np.trace(root).real)


def exact(x: np.ndarray, y: np.ndarray) -> float:
  """By the singular values of the product of the centred samples: for n <= d only."""
  means = [s.mean(axis=0, dtype=np.float64) for s in (x, y)]
  a, b = ((s - mean) / np.sqrt(len(s) - 1) for s, mean in zip((x, y), means, strict=True))
  root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
  gap = np.square(means[0] - means[1]).sum()
  return float(gap + np.square(a).sum() + np.square(b).sum() - 2.0 * root)


def seconds(function: Callable, *args) -> tuple[float, float]:
  """(seconds, result) of one call."""
  start = time.perf_counter()
  result = function(*args)
  return time.perf_counter() - start, result


def measure(samples: int, dim: int, repeats: int) -> dict:
  """One row of the table."""
  x, y = (draw(samples, dim, scale, seed) for scale, seed in ((1.0, 1), (0.9, 2)))
  streamed, first = seconds(moments, x)
  second = moments(y)
  pair = (first.mean, first.covariance, second.mean, second.covariance)
  ours, theirs = [], []
  for _ in range(repeats):  # In turns: what slows the machine down slows both.
    ours.append(seconds(frechet_distance, *pair))
    theirs.append(seconds(direct, *pair))
  middle = lambda runs: statistics.median(s for s, _ in runs)
  return {
    "samples": samples,
    "dim": dim,
    "moments_seconds": streamed,
    "seconds": middle(ours),
    "direct_seconds": middle(theirs),
    "ratio": statistics.median(t / o for (o, _), (t, _) in zip(ours, theirs, strict=True)),
    "distance": ours[0][1],
    "direct_distance": theirs[0][1],
    "exact_distance": exact(x, y) if samples <= dim else None,
  }


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="benchmarks.frechet", description=__doc__.split("\n", maxsplit=1)[0]
  )
  parser.add_argument("--dims", type=int, nargs="+", default=[2048], help="numbers of features")
  parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10_000, 50_000])
  parser.add_argument("--repeats", type=int, default=3, help="medians are over so many")
  parser.add_argument("--out", help="append JSON lines to this file")
  args = parser.parse_args(argv)
  if args.repeats < 1 or min(args.samples) < 2 or min(args.dims) < 1:
    parser.error("--repeats and --dims must be at least 1, --samples at least 2")
  columns = ("samples", "dim", "mom. s", "ours s", "sqrtm s", "ratio", "ours", "sqrtm", "exact")
  print(("{:>8}" * 6 + "{:>14}" * 3).format(*columns))
  for dim in args.dims:
    for samples in args.samples:
      row = measure(samples, dim, args.repeats)
      *times, one, other, known = list(row.values())[2:]
      known = "-" if known is None else f"{known:.7f}"
      cells = "".join(f"{value:8.2f}" for value in times)
      print(f"{samples:8}{dim:8}{cells}{one:14.7f}{other:14.7f}{known:>14}", flush=True)
      append(args, "frechet", row)


if __name__ == "__main__":
  main()

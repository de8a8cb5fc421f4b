"""Seconds and values of the Frechet distance: ours against the formula with a matrix root.

python -m benchmarks.frechet --dims 2048 --samples 1000 10000 50000 --repeats 3 --out frechet.jsonl

The formula takes SciPy's sqrtm of the product of the covariances, as many evaluators do. Where
there are fewer samples than features the covariances are singular, and the root of their product
need not be right, nor real; `exact` is the distance by singular values of the samples, of
which no root is taken.
"""

import argparse
import functools
import time
import warnings
from collections.abc import Iterator

import numpy as np

from benchmarks import harness
from benchmarks.harness import Column
from tools.command_line import positive
from umd.metrics.frechet import Moments, frechet_distance

COLUMNS = (
  Column("samples", "samples"),
  Column("dim", "dim"),
  Column("moments s", "moments_seconds", "{:.2f}"),
  Column("ours s", "seconds", "{:.2f}"),
  Column("sqrtm s", "direct_seconds", "{:.2f}"),
  Column("ratio", "ratio", "{:.2f}"),
  Column("ours", "distance", "{:.7f}"),
  Column("sqrtm", "direct_distance", "{:.7f}"),
  Column("exact", "exact_distance", "{:.7f}"),
)


def draw(samples: int, dim: int, scale: float, seed: int) -> np.ndarray:
  """Correlated rows [samples, dim], float32, with variances over six decades."""
  rng = np.random.default_rng(seed)
  basis = np.random.default_rng(0).standard_normal((dim, dim), np.float32) / np.sqrt(dim)
  spread = np.logspace(0, -3, dim, dtype=np.float32)
  rows = rng.standard_normal((samples, dim), np.float32)
  return scale * (rows * spread) @ basis + 0.4


def moments(rows: np.ndarray, batch: int = 1024) -> Moments:
  """Streamed as evaluators do."""
  streamed = Moments(rows.shape[1])
  for start in range(0, len(rows), batch):
    streamed.update(rows[start : start + batch])
  return streamed


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


def measure(args: argparse.Namespace) -> Iterator[dict]:
  """A row for every number of features and of samples."""
  for dim in args.dims:
    for samples in args.samples:
      x, y = (draw(samples, dim, scale, seed) for scale, seed in ((1.0, 1), (0.9, 2)))
      start = time.perf_counter()
      first = moments(x)
      streamed = time.perf_counter() - start
      second = moments(y)
      pair = (first.mean, first.covariance, second.mean, second.covariance)
      ways = {
        "ours": functools.partial(frechet_distance, *pair),
        "direct": functools.partial(direct, *pair),
      }
      times = harness.in_turns(ways, args.repeats, warm_up=0)
      yield {
        "samples": samples,
        "dim": dim,
        "moments_seconds": streamed,
        "seconds": times["ours"].median,
        "direct_seconds": times["direct"].median,
        "ratio": times["ours"].faster_than(times["direct"])[0],
        "distance": ways["ours"](),
        "direct_distance": ways["direct"](),
        "exact_distance": exact(x, y) if samples <= dim else None,
      }


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("frechet", __doc__)
  parser.add_argument(
    "--dims", type=positive, nargs="+", default=[2048], help="numbers of features"
  )
  parser.add_argument("--samples", type=positive, nargs="+", default=[1000, 10_000, 50_000])
  harness.main(parser, COLUMNS, measure, argv)


if __name__ == "__main__":
  main()

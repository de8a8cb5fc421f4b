"""Numbers over steps: which of them to keep for a picture, and which of them is the best."""

import fnmatch
from typing import NamedTuple

import numpy as np

POINTS = 2000  # A line has so many at most: more than a screen has pixels for.

# What is better: the last that fits any part of a name "a/b/c" counts. Others have no direction.
DIRECTIONS = (
  (min, ("loss*", "*mse*", "*frechet*", "fid_*", "sfid_*", "kid_*", "*error*")),
  (max, ("*accuracy*", "agreement", "top[15]", "*shot*", "*knn*", "is_*", "score*", "select")),
  (max, ("precision*", "recall*", "images_per_second", "teraflops_per_second", "mfu")),
  (None, ("*_std", "*_std_*", "lr", "*_floor", "*_ceiling", "*_test")),
)


class Series(NamedTuple):
  """A metric: steps int64 [n], ascending, and values float64 [n], which need not be finite."""

  steps: np.ndarray
  values: np.ndarray


def make(points: dict[int, float]) -> Series:
  """From {step: value}."""
  steps = sorted(points)
  return Series(np.array(steps, np.int64), np.array([points[s] for s in steps], np.float64))


def thin(series: Series, most: int = POINTS) -> Series:
  """At most about `most` points, among them the first, the last and the extremes of every stretch.

  Of a stretch with values that are not finite one of these stays, too: the line keeps its gap.
  """
  n = len(series.steps)
  if n <= most:
    return series
  kept = {0, n - 1}
  for stretch in np.array_split(np.arange(n), max(1, most // 2)):
    values = series.values[stretch]
    finite = np.isfinite(values)
    if finite.any():
      inside = stretch[finite]
      kept |= {int(inside[values[finite].argmin()]), int(inside[values[finite].argmax()])}
    if not finite.all():
      kept.add(int(stretch[~finite][0]))
  chosen = np.array(sorted(kept))
  return Series(series.steps[chosen], series.values[chosen])


def means(series: Series, most: int = POINTS // 4) -> Series:
  """Means over stretches of steps, which is what may be smoothed: extremes are not typical."""
  finite = np.isfinite(series.values)
  steps, values = series.steps[finite], series.values[finite]
  if len(steps) <= most:
    return Series(steps, values)
  stretches = np.array_split(np.arange(len(steps)), most)
  return Series(
    np.array([steps[s][-1] for s in stretches]), np.array([values[s].mean() for s in stretches])
  )


def direction(name: str, chosen: str = ""):
  """Which values of a metric are better: `min`, `max`, or None where that cannot be said.

  Args:
    name: of the metric.
    chosen: "min:NAME" or "max:NAME", which says it for that metric (`checkpoint.best`).
  """
  mode, _, metric = chosen.partition(":")
  if metric == name and mode in ("min", "max"):
    return {"min": min, "max": max}[mode]
  found = None
  for function, patterns in DIRECTIONS:
    if any(fnmatch.fnmatchcase(part, p) for part in name.split("/") for p in patterns):
      found = function
  return found


def best_step(series: Series, better) -> int | None:
  """The first step with the best value; None where there is no choice or no direction."""
  finite = np.isfinite(series.values)
  values = series.values[finite]
  if better is None or len(values) < 2 or values.min() == values.max():
    return None
  index = values.argmin() if better is min else values.argmax()
  return int(series.steps[finite][index])


def spread(items: list, most: int) -> list:
  """At most `most` of the items, evenly, the first and the last among them."""
  if len(items) <= most:
    return list(items)
  chosen = np.unique(np.round(np.linspace(0, len(items) - 1, most)).astype(int))
  return [items[i] for i in chosen]

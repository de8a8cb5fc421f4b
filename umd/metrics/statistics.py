"""Statistics of a set of images, the files that hold them, and the metrics that compare two sets.

The files are npz with ADM's keys: `mu`, `sigma` of the 2048 pool features, `mu_s`, `sigma_s` of the
2023 spatial ones, `arr_0` some of the images (uint8 [k, H, W, 3]). pytorch-fid's files, which have
`mu` and `sigma` only, are read too. Files written here hold three keys more, which ADM's evaluator
ignores: `features`, the pool features of some of the images; `count`, the number of images that the
moments are of; `inception`, the SHA-256 of the network's weights.
"""

import dataclasses
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from umd.metrics import frechet, pairwise
from umd.metrics.inception import POOL, SPATIAL
from umd.runs import progress

FEW = 2048  # With fewer images than features the covariance is singular and the FID far too high.


class Gaussian(NamedTuple):
  """Mean [d] and covariance [d, d] of features, float64."""

  mu: np.ndarray
  sigma: np.ndarray


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What is known of a set of images from Inception's features.

  Attributes:
    name: the name of the set, for messages and records.
    count: the number of images; 0 where a file does not say.
    pool: the moments of the 2048 pool features.
    spatial: the moments of the 2023 spatial features, for sFID.
    features: float32 [k, 2048], pool features of k of the images, for precision, recall and KID.
    scores: {splitting: Inception score}.
    inception: the SHA-256 of the network's weights; "" where a file does not say.
  """

  name: str
  count: int
  pool: Gaussian
  spatial: Gaussian | None = None
  features: np.ndarray | None = None
  scores: Mapping[str, frechet.Scores] = dataclasses.field(default_factory=dict)
  inception: str = ""


def is_statistics(path: str) -> bool:
  """Says whether an npz file holds moments; if not, it may hold images.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not readable.
  """
  return "mu" in _keys(path)


def read(path: str) -> Statistics:
  """Reads a file of statistics; the images in it, if any, stay there.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not readable, or holds no moments, or those of another network's features.
  """
  keys = _keys(path)
  if not {"mu", "sigma"} <= set(keys):
    raise ValueError(
      f"{path!r} holds {keys}, but no statistics (mu and sigma). Make them of a data set with "
      "tools.fid_reference."
    )
  try:
    with np.load(os.path.expanduser(path), allow_pickle=False) as file:
      arrays = {key: file[key] for key in keys if key not in ("arr_0", "arr_1")}
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path!r} is damaged: {error}. Make or fetch it again.") from None
  pool = _gaussian(path, arrays, ("mu", "sigma"), POOL)
  spatial = None
  if {"mu_s", "sigma_s"} <= arrays.keys():
    spatial = _gaussian(path, arrays, ("mu_s", "sigma_s"), SPATIAL)
  features = arrays.get("features")
  if features is not None and features.shape[1:] != (POOL,):
    raise ValueError(f"{path!r}: features are {list(features.shape)}, but must be [k, {POOL}].")
  name = os.path.basename(path).removesuffix(".npz")
  count, weights = int(arrays.get("count", 0)), str(arrays.get("inception", ""))
  return Statistics(name, count, pool, spatial, features, inception=weights)


def write(path: str, statistics: Statistics, images: np.ndarray | None = None) -> None:
  """Writes a file of statistics, whole or not at all.

  Args:
    path: the file; folders are made.
    statistics: what `read` will return, but for the scores.
    images: uint8 [k, H, W, 3] to go with them, as `arr_0`.
  """
  s = statistics
  arrays = {"mu": s.pool.mu, "sigma": s.pool.sigma, "count": s.count, "inception": s.inception}
  if s.spatial is not None:
    arrays |= {"mu_s": s.spatial.mu, "sigma_s": s.spatial.sigma}
  if s.features is not None:
    arrays["features"] = s.features
  if images is not None:
    arrays["arr_0"] = images
  path = os.path.expanduser(path)
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  unfinished = f"{path}.{secrets.token_hex(4)}.tmp"  # Other processes may write the same file.
  with open(unfinished, "wb") as f:
    np.savez(f, **arrays)
  os.replace(unfinished, path)


def _keys(path: str) -> list[str]:
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f"{path!r}: there is no such file.")
  try:
    with zipfile.ZipFile(path) as file:
      return [name.removesuffix(".npy") for name in file.namelist()]
  except (zipfile.BadZipFile, OSError) as error:
    raise ValueError(f"{path!r} is not readable as npz: {error}.") from None


def _gaussian(path, arrays, names, size) -> Gaussian:
  mu, sigma = (np.asarray(arrays[name], np.float64) for name in names)
  if mu.shape != (size,) or sigma.shape != (size, size):
    raise ValueError(
      f"{path!r}: {names[0]} is {list(mu.shape)} and {names[1]} {list(sigma.shape)}, but Inception "
      f"has {size} of these features. Statistics of other networks cannot be compared with it."
    )
  if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
    raise ValueError(f"{path!r}: {names[0]} or {names[1]} is not finite. Make the file again.")
  return Gaussian(mu, sigma)


def _frechet(part: str):
  def measure(samples, reference):
    ours, theirs = getattr(samples, part), getattr(reference, part)
    return frechet.frechet_distance(*ours, *theirs)

  return measure


def _precision_recall(samples, reference):
  return pairwise.precision_recall(reference.features, samples.features)


def _kid(samples, reference):
  size = min(1000, len(samples.features), len(reference.features))
  return pairwise.kernel_distance(samples.features, reference.features, subset_size=size)


def _score(splitting: str):
  return lambda samples, reference: (samples.scores[splitting].mean, samples.scores[splitting].std)


class Metric(NamedTuple):
  """A metric of samples against a reference.

  Attributes:
    names: the names of the values that `measure` returns.
    measure: (samples, reference) -> one value, or one for each name.
    needs: the parts of the reference that it looks at.
    least: the number of images that it takes at least.
  """

  names: tuple[str, ...]
  measure: Callable
  needs: tuple[str, ...] = ()
  least: int = 2


METRICS = {
  "fid": Metric(("fid",), _frechet("pool")),
  "sfid": Metric(("sfid",), _frechet("spatial"), ("spatial",)),
  "is": Metric(("is", "is_std"), _score("adm")),
  "is_shuffled": Metric(
    ("is_shuffled", "is_shuffled_std"),
    _score("torch-fidelity"),
    least=frechet.LEAST["torch-fidelity"],
  ),
  "precision_recall": Metric(("precision", "recall"), _precision_recall, ("features",), least=4),
  "kid": Metric(("kid", "kid_std"), _kid, ("features",)),
}


def check(metrics: Sequence[str], num: int | None = None) -> None:
  """Raises ValueError unless all are keys of METRICS, for which `num` samples are enough."""
  if unknown := [m for m in metrics if m not in METRICS]:
    raise ValueError(f"metrics: {unknown} are not among {list(METRICS)}.")
  for metric in metrics if num is not None else ():
    if num < METRICS[metric].least:
      raise ValueError(
        f"num={num}: metric {metric!r} takes at least {METRICS[metric].least} samples."
      )


def check_weights(reference: Statistics, sha256: str) -> None:
  """Raises ValueError if the reference is known to be of a network with other weights."""
  if reference.inception not in ("", sha256):
    raise ValueError(
      f"{reference.name!r} was made with other Inception weights (SHA-256 "
      f"{reference.inception[:12]}..., here {sha256[:12]}...). Make it again with these."
    )


def possible(reference: Statistics) -> list[str]:
  """Lists the metrics that a reference has all the parts for."""
  has = lambda part: getattr(reference, part) is not None
  return [name for name, metric in METRICS.items() if all(map(has, metric.needs))]


def check_serves(reference: Statistics, metrics: Sequence[str]) -> None:
  """Raises ValueError if the reference lacks a part that one of the metrics needs."""
  check(metrics)
  if wanting := [m for m in metrics if m not in possible(reference)]:
    parts = {part for m in wanting for part in METRICS[m].needs}
    raise ValueError(
      f"reference {reference.name!r} cannot serve {wanting}: it lacks {sorted(parts)}. Leave them "
      "out, or let tools.fid_reference make or complete the file."
    )


def label(num: int) -> str:
  """Writes a number of samples as names of metrics have it: 10000 -> "10k", 2048 -> "2048"."""
  return f"{num // 1000}k" if num and num % 1000 == 0 else str(num)


def compare(
  samples: Statistics,
  reference: Statistics,
  metrics: Sequence[str],
  tell: progress.Tell = progress.say,
) -> dict[str, float]:
  """Measures {name: value} of metrics, keys of METRICS; `tell` takes a line about a long one.

  Raises:
    ValueError: the two are from networks with different weights, or the reference lacks a part.
  """
  check(metrics, samples.count or None)
  check_serves(reference, metrics)
  if samples.inception:
    check_weights(reference, samples.inception)
  values = {}
  for name in metrics:
    metric = METRICS[name]
    with progress.during(f"computing {', '.join(metric.names)}", tell):
      measured = np.atleast_1d(metric.measure(samples, reference))
    values |= {key: float(value) for key, value in zip(metric.names, measured, strict=True)}
  return values

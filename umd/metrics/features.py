"""Describes sets of images by Inception's features, on all devices, gathered batch by batch.

Each process takes the rows that its own devices computed. Only their sums are exchanged, at the
end, so no features travel on the way.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from umd.data import Source, eval_batches
from umd.devices.mesh import (
  BATCH,
  WHOLE,
  batch_sharding,
  each_process,
  local_rows,
  replicate,
  run_ahead,
)
from umd.metrics import frechet
from umd.metrics.inception import LOGITS, POOL, SPATIAL, Inception, from_torch
from umd.metrics.quantize import quantize
from umd.metrics.statistics import Gaussian, Statistics
from umd.runs import progress
from umd.weights import download, pytorch


class LoadedInception(NamedTuple):
  """Inception's parameters, whole on every device, with the SHA-256 of the file they are from."""

  params: dict
  sha256: str


def find_network(path: str = "", tell: progress.Tell = progress.say) -> str:
  """Finds the file of Inception's weights: `path`, or the cached one, fetched if need be.

  Raises:
    FileNotFoundError: it is not there and cannot be fetched.
    ValueError: it is not the published file.
  """
  return download.find(download.INCEPTION, path, progress=tell)


@functools.cache  # Several evaluators share one.
def load_network(file: str, mesh: Mesh) -> LoadedInception:
  """Reads the weights in `file` (see `find_network`) and places them on the devices."""
  with open(file, "rb") as f:
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  with progress.during("reading Inception's weights"):
    return LoadedInception(replicate(from_torch(pytorch.read(file)), mesh), digest)


def fingerprint(source: Source, network: LoadedInception) -> str:
  """Names statistics: it changes with the images' storage, their preprocessing and the network."""
  text = "\n".join(
    [source.records.fingerprint(), source.pp, str(source.image_size), network.sha256]
  )
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def look(
  params, images: Float[Array, "b h w c"], how: str, mesh: Mesh
) -> dict[str, Float[Array, "b _"]]:
  """Runs Inception on images in [-1, 1], of one channel or three.

  Every device looks at its own share of the images, whose number the mesh must divide.

  Args:
    params: Inception's parameters.
    images: images in [-1, 1].
    how: how they are rounded to 256 levels, a key of `umd.metrics.quantize.QUANTIZERS`.
    mesh: all devices.

  Returns {"pool": [B, 2048], "spatial": [B, 2023], "logits": [B, 1008]}.
  """

  def local(params, images):
    levels = quantize(images, how)
    rgb = jnp.broadcast_to(levels, (*levels.shape[:3], 3))
    return Inception().apply({"params": params}, rgb)

  specs = dict(in_specs=(WHOLE, BATCH), out_specs=BATCH)
  return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(params, images)


class Gatherer:
  """Takes this process's share of the features of a set of images, batch by batch in any order."""

  def __init__(self, name: str, num: int, inception: str, *, keep: int = 0, scores: bool = False):
    """Prepares for a number of images.

    Args:
      name, inception: those of `Statistics`.
      num: the number of images.
      keep: the pool features of so many images, spread evenly over all, are kept.
      scores: whether Inception scores are wanted.
    """
    self._name, self._num, self._inception = name, num, inception
    self._moments = {"pool": frechet.Moments(POOL), "spatial": frechet.Moments(SPATIAL)}
    splittings = [s for s in frechet.SPLITTINGS if scores and num >= frechet.LEAST[s]]
    self._scores = {s: frechet.Scores(num, LOGITS, s) for s in splittings}
    keep = min(keep, num)
    self._kept = np.arange(keep, dtype=np.int64) * num // max(keep, 1)
    self._features = np.zeros((keep, POOL), np.float32)
    self._seen = np.zeros(keep, np.float32)

  def __call__(self, rows: Mapping[str, np.ndarray], index: np.ndarray) -> None:
    """Adds rows {pool, spatial, logits} of the images at positions `index` [b], each once."""
    for part, moments in self._moments.items():
      moments.update(rows[part])
    for scores in self._scores.values():
      scores.update(rows["logits"], index)
    if len(self._kept):
      place = np.minimum(np.searchsorted(self._kept, index), len(self._kept) - 1)
      wanted = self._kept[place] == index
      self._features[place[wanted]] = rows["pool"][wanted]
      self._seen[place[wanted]] = 1

  def statistics(self, unreadable: int = 0) -> Statistics:
    """Returns the statistics of the images of all processes, all of which must call it.

    Args:
      unreadable: so many images of this process's share may be missing.

    Raises:
      ValueError: fewer or more images came than were announced.
    """
    missing = sum(int(n[0]) for (n,) in each_process([np.array([unreadable], np.int32)]))
    gaussians = {}
    for part, moments in self._moments.items():
      total = frechet.Moments(len(moments.mean))
      for arrays in _of_all(moments.arrays()):
        total.merge(frechet.Moments.from_arrays(**arrays))
      if not self._num - missing <= total.count <= self._num:
        raise ValueError(f"{self._name}: {total.count} of {self._num} images could be read.")
      gaussians[part] = Gaussian(total.mean, total.covariance)
    scores = {}
    for splitting, local in self._scores.items():
      scores[splitting] = frechet.Scores(self._num, LOGITS, splitting)
      for arrays in _of_all(local.arrays()):
        scores[splitting].add(**arrays)
    return Statistics(
      self._name,
      total.count,
      gaussians["pool"],
      gaussians["spatial"],
      features=self._all_features(),
      scores=scores,
      inception=self._inception,
    )

  def _all_features(self) -> np.ndarray | None:
    """Returns the kept rows of all processes, None if none were to be kept."""
    if not len(self._kept):
      return None
    features, seen = map(sum, zip(*each_process([self._features, self._seen]), strict=True))
    return features[seen > 0]


def _of_all(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
  """Yields the same arrays of every process, one process after the other."""
  return (dict(zip(arrays, part, strict=True)) for part in each_process([*arrays.values()]))


def compile_look(mesh: Mesh) -> Callable:
  """Compiles `(params, batch) -> rows {pool, spatial, logits, index, _mask}`, split over devices.

  Images of a data set have 8 bits, or nearly so after resizing: they are rounded.
  """

  def rows(params, batch):
    features = look(params, batch["image"], "round", mesh)
    return {**features, "index": batch["index"], "_mask": batch["_mask"]}

  return jax.jit(rows, out_shardings=batch_sharding(mesh))


def describe(
  source: Source,
  network: LoadedInception,
  mesh: Mesh,
  batch_size: int,
  *,
  keep: int = 0,
  scores: bool = False,
  tell: progress.Tell = progress.say,
) -> Statistics:
  """Computes the statistics of all images of a source.

  Args:
    source: images in [-1, 1]; of several processes each reads its part.
    network: see `load_network`.
    mesh: all devices.
    batch_size: images at a time over all devices, which must divide it.
    keep, scores: see `Gatherer`.
    tell: takes a line now and then.

  Raises:
    ValueError: there are fewer than 2 images, or images have neither 1 nor 3 channels.
  """
  channels = source.image_size[2]
  if channels not in (1, 3) or len(source) < 2:
    raise ValueError(
      f"{source.name} has {len(source)} images of {channels} channels; statistics need at least 2 "
      "images, of 1 or 3 channels."
    )
  gather = Gatherer(source.name, len(source), network.sha256, keep=keep, scores=scores)
  place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  batches, compiled = eval_batches(source, batch_size, **place), compile_look(mesh)
  clock, done = progress.Clock(tell, f"features of {source.name}", len(source)), 0
  for rows in run_ahead(lambda batch: compiled(network.params, batch), batches, mesh):
    rows = {name: local_rows(values) for name, values in rows.items()}
    real = rows["_mask"] > 0
    gather({name: values[real] for name, values in rows.items()}, rows["index"][real])
    done += batch_size
    clock(min(done, len(source)))
  return gather.statistics(len(source.bad))

"""Inception's view of a set of images: run on all devices, gathered batch by batch.

Each process takes the rows that its own devices computed; what they add up to is exchanged at the
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
from umd.devices.mesh import batch_sharding, each_process, local_rows, replicate, run_ahead
from umd.devices.placement import BATCH, WHOLE
from umd.metrics import frechet
from umd.metrics.inception import LOGITS, POOL, SPATIAL, Inception, from_torch
from umd.metrics.quantize import quantize
from umd.metrics.statistics import Gaussian, Statistics
from umd.runs import progress
from umd.weights import download, pytorch


class LoadedInception(NamedTuple):
  """Inception's parameters, whole on every device, and the SHA-256 of the file they are from."""

  params: dict
  sha256: str


def find_network(path: str = "", tell: progress.Tell = progress.say) -> str:
  """The file of Inception's weights: `path`, or the cached one, which is fetched if need be.

  Raises:
    FileNotFoundError: it is neither there nor can it be fetched; says from where to where.
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
  """Changes with the images, as far as their storage tells, their preprocessing and the network."""
  parts = (source.records.fingerprint(), source.pp, str(source.image_size), network.sha256)
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def look(
  params, images: Float[Array, "b h w c"], how: str, mesh: Mesh
) -> dict[str, Float[Array, "b _"]]:
  """What Inception makes of images in [-1, 1], of one channel or three.

  Every device looks at its own share of the images, which the mesh must divide.

  Args:
    params: of Inception.
    images: rounded to 256 levels as `how`, a key of `umd.metrics.quantize.QUANTIZERS`, says.
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
  """Takes the features of a set of images batch by batch, in any order; this process's share."""

  def __init__(self, name: str, num: int, inception: str, *, keep: int = 0, scores: bool = False):
    """For `num` images.

    Args:
      name, inception: those of `Statistics`.
      num: number of images.
      keep: of so many of them, spread evenly over all, the pool features are kept.
      scores: whether Inception scores are wanted.
    """
    self._name, self._num, self._inception = name, num, inception
    self._moments = {"pool": frechet.Moments(POOL), "spatial": frechet.Moments(SPATIAL)}
    splittings = [s for s in frechet.SPLITTINGS if scores and num >= frechet.LEAST[s]]
    self._scores = {s: frechet.Scores(num, LOGITS, s) for s in splittings}
    keep = min(keep, num)
    self._kept = np.arange(keep, dtype=np.int64) * num // max(keep, 1)
    self._features, self._seen = np.zeros((keep, POOL), np.float32), np.zeros(keep, np.float32)

  def __call__(self, rows: Mapping[str, np.ndarray], index: np.ndarray) -> None:
    """Adds rows {pool, spatial, logits} of the images at these places [b], each place once."""
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
    """Of the images of all processes; to be called by all of them.

    Args:
      unreadable: so many of this process's share may be missing.

    Raises:
      ValueError: there were not as many as announced.
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
    for splitting, own in self._scores.items():
      scores[splitting] = frechet.Scores(self._num, LOGITS, splitting)
      for arrays in _of_all(own.arrays()):
        scores[splitting].add(**arrays)
    about = dict(features=self._all_features(), scores=scores, inception=self._inception)
    return Statistics(self._name, total.count, **gaussians, **about)

  def _all_features(self) -> np.ndarray | None:
    """The kept rows of all processes, None if none were to be kept."""
    if not len(self._kept):
      return None
    features, seen = map(sum, zip(*each_process([self._features, self._seen]), strict=True))
    return features[seen > 0]


def _of_all(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
  """The same arrays of every process, one process after the other."""
  return (dict(zip(arrays, part, strict=True)) for part in each_process([*arrays.values()]))


def compile_look(mesh: Mesh) -> Callable:
  """`(params, batch) -> rows {pool, spatial, logits, index, _mask}`, split over the devices.

  Images of a data set have 8 bits, or nearly so after resizing: they are rounded.
  """

  def rows(params, batch):
    found = look(params, batch["image"], "round", mesh)
    return {**found, "index": batch["index"], "_mask": batch["_mask"]}

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
  """Statistics of all images of a source.

  Args:
    source: of images in [-1, 1]; of several processes each reads its part.
    network: see `load_network`.
    mesh: all devices.
    batch_size: over all devices, which must divide it; the result does not depend on it.
    keep, scores: see `Gatherer`.
    tell: takes a line now and then.

  Raises:
    ValueError: fewer than 2 images, or images of neither 1 nor 3 channels.
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

"""Where arrays live: a mesh over all devices, the batch split along it, the state whole or not."""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
SMALL_LEAF = 2**12  # elements


def make_mesh(devices=None) -> Mesh:
  """One axis, "data", over all devices of all processes (or over `devices`)."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over all devices."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(shapes, mesh: Mesh, fsdp: bool):
  """Shardings for a tree of shapes: whole on every device, or each leaf split over all of them.

  Split along the largest axis that the devices divide; leaves without one, and small ones, whose
  traffic is not worth the memory, stay whole.
  """

  def spec(leaf):
    axes = [i for i, size in enumerate(leaf.shape) if size % mesh.size == 0]
    if not fsdp or not axes or math.prod(leaf.shape) < SMALL_LEAF:
      return replicated(mesh)
    largest = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, DATA_AXIS))

  return jax.tree.map(spec, shapes)


def check_divides(key: str, batch_size: int, mesh: Mesh) -> None:
  """Raises ValueError unless a batch can be dealt out evenly to all devices."""
  if batch_size < 1 or batch_size % mesh.size:
    raise ValueError(
      f"{key}={batch_size} must be a positive multiple of the {mesh.size} devices. "
      f"Set it to {max(1, round(batch_size / mesh.size)) * mesh.size}."
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch -> global arrays, without waiting for the copy."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def replicate(tree, mesh: Mesh):
  """Arrays that every process holds whole -> global arrays, whole on every device."""
  everywhere = replicated(mesh)
  place = lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda part: x[part])
  return jax.tree.map(place, tree)


def prefetch(batches: Iterator, mesh: Mesh, size: int = 2) -> Iterator[dict[str, jax.Array]]:
  """Keeps `size` batches on their way to the devices while one is being worked on."""
  queue = collections.deque(put_batch(b, mesh) for b in itertools.islice(batches, size))
  while queue:
    yield queue.popleft()
    queue.extend(put_batch(b, mesh) for b in itertools.islice(batches, 1))


def run_ahead(fn: Callable, batches: Iterator, mesh: Mesh) -> Iterator:
  """`fn(batch)` for every batch on the devices, which are given work ahead of the reader."""
  pending = collections.deque()
  for batch in prefetch(batches, mesh):
    pending.append(fn(batch))
    if len(pending) > 2:
      yield pending.popleft()
  yield from pending


def local_rows(x: jax.Array) -> np.ndarray:
  """This process's rows of an array split along its leading axis; all rows of a replicated one."""
  if x.is_fully_replicated:
    return np.asarray(x)
  shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards])


def each_process(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
  """The arrays that every process holds, one process after the other, the same in all of them.

  Shapes and types must agree. Bits are sent as they are: JAX would make float32 of float64.
  """
  arrays = [np.asarray(x, order="C") for x in arrays]
  if jax.process_count() == 1:
    yield arrays
    return
  words = [np.frombuffer(x.tobytes(), np.uint32) for x in arrays]
  for process in range(jax.process_count()):
    sent = multihost_utils.broadcast_one_to_all(words, is_source=process == jax.process_index())
    yield [
      np.frombuffer(np.asarray(w).tobytes(), x.dtype).reshape(x.shape)
      for w, x in zip(sent, arrays, strict=True)
    ]


def all_agree(flag: bool) -> bool:
  """Whether `flag` is true in every process; the same answer in all of them."""
  return all(part[0] for (part,) in each_process([np.array([flag], np.float32)]))

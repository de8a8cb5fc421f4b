"""Where arrays live: a mesh over all devices, the batch split along it, the state whole or not."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from umd.devices.placement import BATCH, DATA_AXIS, FSDP_AXIS, WHOLE, split


def make_mesh(devices=None, fsdp: int = 1) -> Mesh:
  """Axes "data" and "fsdp" over all devices of all processes (or over `devices`).

  `fsdp` neighbours share one copy of the state; of a pod of several slices they are of one slice,
  so that parameters travel within it and only gradients between slices. Devices are in the order
  of slices and processes: rows of a batch stay with the process that read them.

  Args:
    devices: in whatever order; all if None.
    fsdp: how many share a copy; 1: every device has its own, 0: all devices share one.

  Raises:
    ValueError: the devices, or those of a slice, cannot be grouped like that.
  """
  devices = jax.devices() if devices is None else list(np.ravel(devices))
  slices = [getattr(device, "slice_index", 0) or 0 for device in devices]
  place = lambda i: (slices[i], devices[i].process_index, i)
  order = [devices[i] for i in sorted(range(len(devices)), key=place)]
  within = len(order) // len(set(slices))
  fsdp = fsdp or len(order)
  if fsdp < 0 or (within % fsdp and len(order) != fsdp):
    of = f"a slice's {within}" if len(set(slices)) > 1 else f"the {within}"
    raise ValueError(
      f"fsdp={fsdp} must divide {of} devices: so many share one copy of the parameters. "
      "1 gives every device its own, 0 lets all share one."
    )
  grid = np.asarray(order).reshape(-1, fsdp)
  return Mesh(grid, (DATA_AXIS, FSDP_AXIS), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over all devices."""
  return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, WHOLE)


def state_shardings(shapes, mesh: Mesh):
  """Shardings for a tree of shapes, each leaf split over the axis "fsdp", see `placement.split`."""
  shares = mesh.shape[FSDP_AXIS]
  return jax.tree.map(lambda leaf: NamedSharding(mesh, split(leaf.shape, shares)), shapes)


def placed(shapes, shardings):
  """A tree of shapes with their places: a sharding for all leaves, or a tree of them."""
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, shapes)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, shapes, shardings)


def check_divides(key: str, batch_size: int, mesh: Mesh) -> None:
  """Raises ValueError unless a batch can be dealt out evenly to all devices."""
  if batch_size < 1 or batch_size % mesh.size:
    raise ValueError(
      f"{key}={batch_size} must be a positive multiple of the {mesh.size} devices. "
      f"Set it to {max(1, round(batch_size / mesh.size)) * mesh.size}."
    )


def check_accumulates(accumulate: int, batch_size: int, period: int, mesh: Mesh) -> None:
  """Raises ValueError unless each device's rows are so many micro-batches of whole patterns.

  `period` is the pattern by which rows are dealt to streams, see `umd.objectives.period`.
  """
  rows = batch_size // mesh.size
  if accumulate > 1 and rows % (accumulate * period):
    raise ValueError(
      f"accumulate={accumulate}: each device has {rows} rows of a batch of {batch_size}, which are "
      f"not {accumulate} times a multiple of {period}, the rows that the streams share. Change "
      "accumulate or batch_size."
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

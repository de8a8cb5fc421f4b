"""Where arrays live: a mesh over all devices, and hints for XLA's partitioner inside a step.

The mesh has two axes, "data" and "fsdp". A batch is split over all devices; parameters are whole on
each of them, or kept in parts by the devices along "fsdp".

A step is traced `on(mesh)`. Then every device works on its own rows of the batch, with whole
parameters: where these are kept in parts, each layer gathers its own just before it computes, and
its gradient is summed into the parts again. Left to itself the partitioner may split activations by
width or gather the batch, which costs many times more. What is traced elsewhere is not split, and
the hints do nothing.
"""

import collections
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

DATA_AXIS, FSDP_AXIS = "data", "fsdp"
BATCH = PartitionSpec((DATA_AXIS, FSDP_AXIS))  # Rows are split over all devices.
WHOLE = PartitionSpec()
LAYERS = "blocks"  # Parameters of this name are stacked over layers, which gather their own.
SMALL_LEAF = 2**12  # elements


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
  """Shardings for a tree of shapes, each leaf split over the axis "fsdp", see `split`."""
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


def on(mesh: Mesh) -> contextlib.AbstractContextManager:
  """What is traced within is for arrays on this mesh."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _shares() -> int:
  """How many devices share a copy of the parameters here; 0: nothing is split here."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  return mesh.shape[FSDP_AXIS] if axes.get(FSDP_AXIS) == AxisType.Auto else 0


def split(shape: tuple[int, ...], shares: int) -> PartitionSpec:
  """How a parameter is kept by `shares` devices: in parts along its largest axis that they divide.

  Small ones and those without such an axis are whole everywhere: their traffic is not worth it.
  """
  axes = [i for i, size in enumerate(shape) if size % shares == 0]
  if shares == 1 or not axes or math.prod(shape) < SMALL_LEAF:
    return WHOLE
  largest = max(axes, key=lambda i: shape[i])
  return PartitionSpec(*[None] * largest, FSDP_AXIS)


def by_batch(tree):
  """The arrays, whose leading axis is the batch's, with each device's rows on that device.

  Arrays of as many rows as the devices do not divide stay where the partitioner has them.
  """
  if not _shares():
    return tree
  devices = jax.sharding.get_abstract_mesh().size

  def place(x):
    fits = x.ndim and len(x) % devices == 0
    return jax.lax.with_sharding_constraint(x, BATCH) if fits else x

  return jax.tree.map(place, tree)


def gathered(params):
  """Whole parameters; the gradient goes back in the parts in which they are kept."""
  shares = max(_shares(), 1)

  def whole(x):
    spec = split(x.shape, shares)
    return x if spec == WHOLE else _gather(x, spec)

  return jax.tree.map(whole, params)


def gathered_at_once(params):
  """The parameters with all of them whole but those of layers, which see to it themselves."""

  def whole(path, x):
    layers = any(getattr(key, "key", None) == LAYERS for key in path)
    return x if layers else gathered(x)

  return jax.tree_util.tree_map_with_path(whole, params)


def _gather(x, spec: PartitionSpec):
  @jax.custom_vjp
  def gather(x):
    return jax.lax.with_sharding_constraint(x, WHOLE)

  def backward(_, gradient):
    return (jax.lax.with_sharding_constraint(gradient, spec),)

  gather.defvjp(lambda x: (gather(x), None), backward)
  return gather(jax.lax.with_sharding_constraint(x, spec))


def take_rows(x: Array, rows: tuple[int, int], size: int) -> Array:
  """Rows `from`..`to` of every `size` rows of x: a slice inside each device's share."""
  grouped = x.reshape(-1, size, *x.shape[1:])[:, rows[0] : rows[1]]
  return grouped.reshape(-1, *x.shape[1:])


def join_rows(parts: Sequence, groups: int):
  """One batch of several trees [G * r_i, ...]: in each of G groups the rows of all, in turn."""

  def join(*xs):
    grouped = [x.reshape(groups, -1, *x.shape[1:]) for x in xs]
    return jnp.concatenate(grouped, axis=1).reshape(-1, *xs[0].shape[1:])

  return parts[0] if len(parts) == 1 else jax.tree.map(join, *parts)


def part_rows(tree, counts: Sequence[int], groups: int) -> list:
  """The inverse of `join_rows`: trees of counts[0], counts[1], ... rows."""
  size = sum(counts) // groups
  ends = [sum(counts[: i + 1]) // groups for i in range(len(counts))]
  starts = [0, *ends[:-1]]
  take = lambda rows: jax.tree.map(lambda x: take_rows(x, rows, size), tree)
  return [tree] if len(counts) == 1 else [take(rows) for rows in zip(starts, ends, strict=True)]


def chunks_of_rows(tree, chunks: int, devices: int):
  """[chunks, B / chunks, ...] of a batch that is split over so many devices: each gives its share.

  Neighbouring rows stay together.
  """

  def cut(x):
    apart = x.reshape(devices, chunks, -1, *x.shape[1:])
    return jnp.moveaxis(apart, 1, 0).reshape(chunks, -1, *x.shape[1:])

  return jax.tree.map(cut, tree)

"""Where arrays are inside a jitted step: the axes of the mesh, and hints for XLA's partitioner.

A step is traced `on(mesh)`. Then every device works on its own rows of the batch, with whole
parameters: where these are kept in parts, each layer gathers its own just before it computes, and
its gradient is summed into the parts again. Left to itself the partitioner may split activations by
width or gather the batch, which costs many times more. What is traced elsewhere is not split, and
the hints do nothing.
"""

import contextlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array


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


DATA_AXIS, FSDP_AXIS = "data", "fsdp"
BATCH = PartitionSpec((DATA_AXIS, FSDP_AXIS))  # Rows are split over all devices.
WHOLE = PartitionSpec()
LAYERS = "blocks"  # Parameters of this name are stacked over layers, which gather their own.
SMALL_LEAF = 2**12  # elements


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

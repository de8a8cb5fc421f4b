"""Rows of a batch that are dealt out by a pattern: of every `size` rows these belong together.

A device that holds a multiple of the pattern finds all its rows at home: nothing here moves rows
between devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
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

"""Rows dealt out by a pattern: apart, together, in chunks, and never on another device."""

import jax
import numpy as np
import pytest

from umd.devices.mesh import (
  batch_sharding,
  chunks_of_rows,
  join_rows,
  make_mesh,
  part_rows,
  take_rows,
)

GROUPS, COUNTS = 6, (12, 6, 18)  # Rows of 2, 1 and 3 in each group.


def parts():
  return [{"x": np.arange(n)[:, None] + 100 * i, "y": np.arange(n)} for i, n in enumerate(COUNTS)]


def test_joined_rows_of_a_group_stand_together_in_the_order_of_the_parts():
  found = np.asarray(join_rows(parts(), GROUPS)["x"])[:, 0].reshape(GROUPS, 6)
  for group, row in enumerate(found):
    two, one, three = 2 * group, group, 3 * group
    np.testing.assert_array_equal(
      row, [two, two + 1, 100 + one, 200 + three, 201 + three, 202 + three]
    )


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_parting_is_the_inverse_of_joining(groups):
  found = part_rows(join_rows(parts(), groups), COUNTS, groups)
  jax.tree.map(np.testing.assert_array_equal, found, parts())


def test_what_was_taken_of_a_batch_is_put_back_by_joining():
  x = np.arange(24)
  taken = [take_rows(x, rows, 4) for rows in ((0, 1), (1, 4))]
  np.testing.assert_array_equal(join_rows(taken, 6), x)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_chunks_hold_each_row_once_and_a_share_of_each_device(chunks):
  x = np.arange(24)
  found = chunks_of_rows({"x": x}, chunks, devices=4)["x"]
  assert found.shape == (chunks, 24 // chunks)
  np.testing.assert_array_equal(np.sort(found, axis=None), x)
  for chunk in np.asarray(found):
    np.testing.assert_array_equal(np.bincount(chunk // 6, minlength=4), [6 // chunks] * 4)
    np.testing.assert_array_equal(np.diff(chunk.reshape(4, -1)), 1)  # Neighbours stay together.


def test_nothing_is_sent_between_devices():
  rows = batch_sharding(make_mesh())
  shapes = [jax.ShapeDtypeStruct((n * 2, 5), np.float32, sharding=rows) for n in COUNTS]

  def there_and_back(*xs):
    joined = join_rows(list(xs), 12)
    chunks = chunks_of_rows(joined, 3, 4)
    return part_rows(chunks.sum(axis=0), [8, 4, 12], 4)

  program = jax.jit(there_and_back, out_shardings=rows).lower(*shapes).compile().as_text()
  assert not any(kind in program for kind in ("all-", "collective", "reduce-scatter"))

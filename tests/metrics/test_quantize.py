"""From [-1, 1] to 256 levels and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from umd.metrics.quantize import QUANTIZERS, quantize

LEVELS = np.arange(256)


def levels(values, how):
  return np.asarray(quantize(jnp.asarray(values, jnp.float32).reshape(1, 1, -1, 1), how)).ravel()


def test_rounding_gives_back_what_was_read_from_8_bits():
  """By whatever formula the levels became floats."""
  for read in (
    LEVELS / 127.5 - 1,
    np.float32(LEVELS) / np.float32(127.5) - 1,
    LEVELS / 255 * 2 - 1,
  ):
    np.testing.assert_array_equal(levels(read, "round"), LEVELS)


def test_each_way_is_its_papers_formula():
  """In float64, at values that are not near where the formulas jump."""
  x = np.random.default_rng(0).uniform(-1, 1, 4000)
  jumps = [(x + 1) * 127.5 % 1, (127.5 * x + 128) % 1, ((x + 1) * 127.5 + 0.5) % 1]
  x = x[np.min([np.minimum(j, 1 - j) for j in jumps], axis=0) > 1e-3]
  assert len(x) > 3000
  np.testing.assert_array_equal(levels(x, "adm"), np.floor((x + 1) * 127.5))
  np.testing.assert_array_equal(levels(x, "dit"), np.floor(127.5 * x + 128))
  np.testing.assert_array_equal(levels(x, "round"), np.rint((x + 1) * 127.5))
  np.testing.assert_allclose(levels(x, "none"), (x + 1) * 127.5, atol=1e-4)


@pytest.mark.parametrize("how", QUANTIZERS)
def test_what_is_out_of_range_is_clipped(how):
  np.testing.assert_array_equal(
    levels([-3, -1, 1, 3], how)[[0, 1, 3]], [0, levels([-1], how)[0], 255]
  )
  assert levels([1], how)[0] == 255


def test_an_unknown_way_is_an_error_that_lists_the_known():
  with pytest.raises(ValueError, match=r"quantize='floor'.*round.*adm.*dit.*none"):
    quantize(jnp.zeros((1, 1, 1, 1)), "floor")

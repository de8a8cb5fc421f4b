"""Tokens and masks: exact counts, uniform choice, and nothing lost on the way there and back."""

import itertools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from umd import masks


def images(batch=2, height=6, width=8, channels=3):
  return jax.random.normal(jax.random.key(0), (batch, height, width, channels))


def test_patches_are_cut_row_by_row_with_channels_last():
  x, patch = np.asarray(images()), 2
  got = np.asarray(masks.patchify(jnp.asarray(x), patch))
  assert got.shape == (2, 12, 12)
  for row, column in itertools.product(range(3), range(4)):
    block = x[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    np.testing.assert_array_equal(got[:, 4 * row + column], block.reshape(2, -1))


@pytest.mark.parametrize("patch", [1, 2])
def test_unpatchify_undoes_patchify(patch):
  x = images()
  np.testing.assert_array_equal(masks.unpatchify(masks.patchify(x, patch), patch, (6, 8)), x)


@pytest.mark.parametrize(
  "tokens, ratio, keep",
  [
    (256, 0.375, 160),
    (256, 0.75, 64),
    (256, 0.0, 256),
    (16, 0.9, 1),
    (16, 0.375, 10),
    (10, 0.7, 3),  # 10 * (1 - .7) = 3.0000000000000004
    (10, 0.9, 1),  # 10 * (1 - .9) = 0.9999999999999998
    (100, 0.71, 29),  # 100 * (1 - .71) = 29.000000000000004
    (1, 0.0, 1),
  ],
)
def test_num_kept_at_known_settings(tokens, ratio, keep):
  assert masks.num_kept(tokens, ratio) == keep


@pytest.mark.parametrize("tokens", [7, 10, 16, 49, 196, 256, 1024])
def test_num_kept_is_the_floor_in_exact_arithmetic(tokens):
  for ratio in (f"{i / 1000:.3f}" for i in range(1000)):
    exact = math.floor(tokens * (1 - Fraction(ratio)))
    if exact > 0:
      assert masks.num_kept(tokens, float(ratio)) == exact, ratio


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, float("nan")])
def test_ratio_outside_its_range_is_named(ratio):
  with pytest.raises(ValueError, match=rf"mask_ratio={ratio} must be in \[0, 1\)"):
    masks.num_kept(16, ratio)


@pytest.mark.parametrize("tokens", [3, 16, 256, 1024])
def test_ratio_that_keeps_nothing_is_named_with_a_remedy_that_works(tokens):
  with pytest.raises(ValueError, match=rf"mask_ratio=0\.9999 keeps none of {tokens} ") as error:
    masks.num_kept(tokens, 0.9999)
  remedy = float(re.search(r"at most (\d\.\d+)", str(error.value)).group(1))
  assert masks.num_kept(tokens, remedy) == 1


@pytest.mark.parametrize("tokens, keep", [(6, 2), (6, 4), (5, 1)])
def test_every_subset_of_tokens_is_equally_likely(tokens, keep):
  draws = 4096
  mask = masks.random_mask(jax.random.key(1), draws, tokens, keep)
  subsets = [tuple(np.flatnonzero(row == 0)) for row in np.asarray(mask.masked)]
  counts = [subsets.count(s) for s in itertools.combinations(range(tokens), keep)]
  assert sum(counts) == draws
  assert stats.chisquare(counts).pvalue > 1e-3


def test_restore_is_a_permutation_that_puts_kept_tokens_first():
  mask = masks.random_mask(jax.random.key(2), 4, 9, 3)
  for keep, restore, masked in zip(*map(np.asarray, mask), strict=True):
    np.testing.assert_array_equal(np.sort(restore), np.arange(9))
    np.testing.assert_array_equal(restore[keep], np.arange(3))
    np.testing.assert_array_equal(np.flatnonzero(masked == 0), np.sort(keep))
    assert set(masked) == {0.0, 1.0}


def test_the_smallest_noise_is_kept():
  noise = jnp.array([[0.5, 0.1, 0.9, 0.3], [0.0, 0.7, 0.6, 0.8]])
  np.testing.assert_array_equal(masks.mask_from_noise(noise, 2).keep, [[1, 3], [0, 2]])


def test_a_mask_does_not_depend_on_the_batch_it_travels_in():
  noise = np.random.default_rng(3).random((6, 9), np.float32)
  whole = masks.mask_from_noise(jnp.asarray(noise), 4)
  part = masks.mask_from_noise(jnp.asarray(noise[4:1:-2]), 4)
  for a, b in zip(whole, part, strict=True):
    np.testing.assert_array_equal(np.asarray(a)[4:1:-2], b)


def test_keeping_every_token_masks_none():
  assert not masks.random_mask(jax.random.key(4), 2, 9, 9).masked.any()


def test_gather_takes_each_example_its_own_tokens():
  x, ids = np.arange(54.0).reshape(3, 9, 2), np.array([[8, 0], [1, 1], [4, 3]])
  got = np.asarray(masks.gather(jnp.asarray(x), jnp.asarray(ids)))
  for b, k in itertools.product(range(3), range(2)):
    np.testing.assert_array_equal(got[b, k], x[b, ids[b, k]])


@pytest.mark.parametrize("keep", [1, 4, 9])
def test_scatter_undoes_gather_and_fills_the_rest(keep):
  x, fill = jax.random.normal(jax.random.key(6), (3, 9, 2)), jnp.array([7.0, -7.0])
  mask = masks.random_mask(jax.random.key(7), 3, 9, keep)
  got = masks.scatter(masks.gather(x, mask.keep), mask, fill)
  np.testing.assert_array_equal(got, np.where(mask.masked[:, :, None] == 0, x, fill))


def test_scatter_keeps_the_dtype_of_the_tokens():
  mask = masks.random_mask(jax.random.key(8), 3, 9, 4)
  kept = jnp.zeros((3, 4, 2), jnp.bfloat16)
  assert masks.scatter(kept, mask, jnp.ones(2)).dtype == jnp.bfloat16

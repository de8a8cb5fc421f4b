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
from umd.masks import Masking, mask_from_noise


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


def uniform(batch, tokens, seed=0):
  return jax.random.uniform(jax.random.key(seed), (batch, tokens))


# What MaskDM's code drops and keeps (its crops ignore the ratio), and UMD's two ratios.
@pytest.mark.parametrize(
  "masking, side, kept",
  [
    (Masking(0.375), 16, 160),
    (Masking(0.75), 16, 64),
    (Masking(0.9, rounding="dropped"), 16, 26),
    (Masking(0.9, "blocks", 4, "dropped"), 16, 32),
    (Masking(0.5, "blocks", 8, "dropped"), 16, 128),
    (Masking(0.9, "blocks", 4, "dropped"), 64, 416),
    (Masking(0.9, "crop", 11), 16, 121),
    (Masking(0.9, "hole", 11), 16, 135),
  ],
)
def test_published_counts(masking, side, kept):
  assert masking.num_kept((side, side)) == kept
  mask = masking(uniform(3, side**2), (side, side))
  assert mask.keep.shape == (3, kept) and ((mask.masked == 0).sum(axis=1) == kept).all()


@pytest.mark.parametrize("tokens", [7, 10, 16, 49, 196, 256, 1024])
def test_counts_are_floors_in_exact_arithmetic(tokens):
  for ratio in (f"{i / 1000:.3f}" for i in range(1000)):
    kept = math.floor(tokens * (1 - Fraction(ratio)))
    if kept > 0:
      assert masks.num_kept(tokens, float(ratio)) == kept, ratio
    dropped = math.floor(tokens * Fraction(ratio))
    assert masks.num_kept(tokens, float(ratio), "dropped") == tokens - dropped, ratio


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
  mask = mask_from_noise(uniform(draws, tokens), keep)
  subsets = [tuple(np.flatnonzero(row == 0)) for row in np.asarray(mask.masked)]
  counts = [subsets.count(s) for s in itertools.combinations(range(tokens), keep)]
  assert sum(counts) == draws
  assert stats.chisquare(counts).pvalue > 1e-3


GRID = (4, 8)
KINDS = [
  Masking(0.6),
  Masking(0.6, "blocks", 2),
  Masking(kind="crop", side=3),
  Masking(kind="hole", side=3),
]


@pytest.mark.parametrize("masking", KINDS, ids=lambda masking: masking.kind)
def test_a_mask_does_not_depend_on_the_batch_it_travels_in(masking):
  noise = uniform(6, 32)
  whole, part = masking(noise, GRID), masking(noise[4:1:-2], GRID)
  for a, b in zip(whole, part, strict=True):
    np.testing.assert_array_equal(np.asarray(a)[4:1:-2], b)


@pytest.mark.parametrize("masking", KINDS, ids=lambda masking: masking.kind)
def test_a_complement_keeps_what_the_other_drops(masking):
  mask = masking(uniform(6, 32), GRID)
  other = masks.complement(mask)
  np.testing.assert_array_equal(other.masked, 1 - mask.masked)
  every = jnp.concatenate([mask.keep, other.keep], axis=1)
  np.testing.assert_array_equal(jnp.sort(every, axis=1), np.tile(np.arange(32), (6, 1)))


def test_blocks_are_dropped_whole_and_equally_often():
  draws = 2048
  masked = np.asarray(Masking(0.5, "blocks", 2)(uniform(draws, 32), GRID).masked)
  blocks = masked.reshape(draws, 2, 2, 4, 2).swapaxes(2, 3).reshape(draws, 8, 4)
  assert (blocks == blocks[:, :, :1]).all() and (blocks[:, :, 0].sum(axis=1) == 4).all()
  assert stats.chisquare(blocks[:, :, 0].sum(axis=0)).pvalue > 1e-3


def test_a_crop_is_a_window_that_may_lie_anywhere_and_a_hole_is_the_rest():
  draws, noise = 4096, uniform(4096, 32)
  inside = 1 - np.asarray(Masking(kind="crop", side=3)(noise, GRID).masked).reshape(draws, *GRID)
  hole = Masking(kind="hole", side=3)(noise, GRID)
  np.testing.assert_array_equal(hole.masked, inside.reshape(draws, -1))
  first = inside.reshape(draws, -1).argmax(axis=1)
  rows, columns = np.divmod(first, GRID[1])
  for window, row, column in zip(inside, rows, columns, strict=True):
    assert window[row : row + 3, column : column + 3].sum() == window.sum() == 9
  counts = np.bincount(6 * rows + columns, minlength=12)  # 2 x 6 places of the corner
  assert len(counts) == 12 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(kind="blocks", side=3), r"mask_side=3: blocks do not divide.* 4 x 8 .*divisor of 4\."),
    (dict(kind="crop", side=5), r"mask_side=5: the window is larger.* 4 x 8 .*at most 4\."),
    (dict(kind="stripes"), r"mask_kind='stripes' is not one of \['random', 'blocks'"),
    (dict(rounding="up"), r"mask_rounding='up' is not one of"),
    (dict(kind="blocks", side=0), r"mask_side=0 must be at least 1"),
  ],
)
def test_what_no_mask_can_be_is_named(settings, message):
  with pytest.raises(ValueError, match=message):
    Masking(**settings).num_kept(GRID)


def test_gather_takes_each_example_its_own_tokens():
  x, ids = np.arange(54.0).reshape(3, 9, 2), np.array([[8, 0], [1, 1], [4, 3]])
  got = np.asarray(masks.gather(jnp.asarray(x), jnp.asarray(ids)))
  for b, k in itertools.product(range(3), range(2)):
    np.testing.assert_array_equal(got[b, k], x[b, ids[b, k]])


@pytest.mark.parametrize("keep", [1, 4, 9])
def test_scatter_undoes_gather_and_fills_the_rest(keep):
  x = jax.random.normal(jax.random.key(6), (3, 9, 2)).astype(jnp.bfloat16)
  fill = jnp.array([7.0, -7.0])
  mask = mask_from_noise(uniform(3, 9), keep)
  got = masks.scatter(masks.gather(x, mask.keep), mask, fill)
  assert got.dtype == x.dtype
  np.testing.assert_array_equal(got, jnp.where(mask.masked[:, :, None] == 0, x, fill))

"""Images as tokens, and which of them a network gets to see. All shapes are static.

Every mask is made of scores, one for each token, of which the K smallest are kept. Kinds of masks
differ in how scores come from uniform noise [B, N] that is drawn per example, so an example's mask
does not depend on the batch it travels in.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import einops
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def patchify(images: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n d"]:
  """Cuts images into P x P patches, row by row: [B, N, P * P * C] with channels last."""
  return einops.rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(
  tokens: Float[Array, "b n d"], patch: int, size: tuple[int, int]
) -> Float[Array, "b h w c"]:
  """Puts patches back together to images of `size` = (H, W): the inverse of `patchify`."""
  return einops.rearrange(
    tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=size[0] // patch, p=patch, q=patch
  )


class Mask(NamedTuple):
  """Which tokens of each image are kept.

  Attributes:
    keep: numbers of the kept tokens, [B, K].
    restore: [B, N]; `concat([kept, filler])[restore]` puts every token back in its place.
    masked: [B, N] float, 1 where the token was dropped.
  """

  keep: Int[Array, "b k"]
  restore: Int[Array, "b n"]
  masked: Float[Array, "b n"]


def mask_from_noise(noise: Float[Array, "b n"], keep: int) -> Mask:
  """Keeps, of each image, the `keep` tokens with the smallest noise.

  Independent uniform noise makes every subset of that size equally likely (MAE, He et al. 2022).
  Of equal values the token that comes first is kept.
  """
  order = jnp.argsort(noise, axis=1)
  restore = jnp.argsort(order, axis=1)
  return Mask(order[:, :keep], restore, (restore >= keep).astype(jnp.float32))


def complement(mask: Mask) -> Mask:
  """Keeps exactly the tokens that another mask drops, as for a second stream of the same rows."""
  tokens = mask.restore.shape[1]
  return mask_from_noise(1 - mask.masked, tokens - mask.keep.shape[1])


def block_scores(noise: Float[Array, "b n"], grid: tuple[int, int], side: int):
  """Scores all tokens of an aligned block of side x side by one number of the noise, [B, N]."""
  rows, columns = grid[0] // side, grid[1] // side
  blocks = noise[:, : rows * columns].reshape(-1, rows, columns)
  return einops.repeat(blocks, "b r c -> b (r i c j)", i=side, j=side)


def crop_scores(noise: Float[Array, "b n"], grid: tuple[int, int], side: int):
  """Scores 0 in a window of side x side tokens and 1 outside, [B, N].

  The window's corner is uniform over all places at which the window lies inside the grid.
  """
  choices = jnp.array(grid) - side + 1
  # Uniform noise is below 1, but its product with a whole number may round up to that number.
  corner = jnp.minimum(jnp.floor(noise[:, :2] * choices).astype(jnp.int32), choices - 1)
  row = jnp.arange(grid[0]) - corner[:, :1]
  column = jnp.arange(grid[1]) - corner[:, 1:]
  inside = lambda offset: (offset >= 0) & (offset < side)
  window = inside(row)[:, :, None] & inside(column)[:, None, :]
  return 1.0 - window.reshape(len(noise), -1).astype(jnp.float32)


KINDS: Mapping[str, str] = {
  "random": "single tokens, chosen at random",  # MAE
  "blocks": "whole blocks of side x side tokens, chosen at random",  # MaskDM
  "crop": "all but a window of side x side tokens at a random place",  # MaskDM
  "hole": "a window of side x side tokens at a random place",
}
ROUNDINGS = ("kept", "dropped")


@dataclasses.dataclass(frozen=True)
class Masking:
  """How tokens are dropped before a network sees them.

  Attributes:
    ratio: share of the tokens that are dropped, for the kinds "random" and "blocks".
    kind: what is dropped, key of KINDS.
    side: of a block or window, in tokens.
    rounding: which number of tokens (or blocks) is rounded down where the ratio gives no whole one:
      "kept", K = floor(N (1 - ratio)), as MAE counts, or "dropped", K = N - floor(N ratio), as
      MaskDM (Lei et al. 2023) counts.

  Raises:
    ValueError: a value is not among those that are known.
  """

  ratio: float = 0.0
  kind: str = "random"
  side: int = 1
  rounding: str = "kept"

  def __post_init__(self):
    for name, known in {"kind": tuple(KINDS), "rounding": ROUNDINGS}.items():
      if (value := getattr(self, name)) not in known:
        raise ValueError(f"mask_{name}={value!r} is not one of {list(known)}.")
    if self.side < 1:
      raise ValueError(f"mask_side={self.side} must be at least 1 token.")

  def num_kept(self, grid: tuple[int, int]) -> int:
    """Counts the tokens that are kept of a grid of (rows, columns).

    Raises:
      ValueError: blocks do not divide the grid, a window does not fit, or no token is left.
    """
    tokens = grid[0] * grid[1]
    if self.kind in ("crop", "hole"):
      if self.side > min(grid):
        raise ValueError(
          f"mask_side={self.side}: the window is larger than the grid of {grid[0]} x {grid[1]} "
          f"tokens. Set it to at most {min(grid)}."
        )
      window = self.side**2
      keep = window if self.kind == "crop" else tokens - window
      if keep == 0:
        raise ValueError(f"mask_side={self.side} drops all of {tokens} tokens. Make it smaller.")
      return keep
    side = self.side if self.kind == "blocks" else 1
    if grid[0] % side or grid[1] % side:
      raise ValueError(
        f"mask_side={side}: blocks do not divide the grid of {grid[0]} x {grid[1]} tokens. "
        f"Set it to a divisor of {math.gcd(*grid)}."
      )
    return side**2 * num_kept(tokens // side**2, self.ratio, self.rounding)

  def __call__(self, noise: Float[Array, "b n"], grid: tuple[int, int]) -> Mask:
    """Draws the masks that follow from uniform noise in [0, 1)."""
    scores = {
      "random": lambda: noise,
      "blocks": lambda: block_scores(noise, grid, self.side),
      "crop": lambda: crop_scores(noise, grid, self.side),
      "hole": lambda: 1 - crop_scores(noise, grid, self.side),
    }
    return mask_from_noise(scores[self.kind](), self.num_kept(grid))


def num_kept(tokens: int, ratio: float, rounding: str = "kept") -> int:
  """Counts the tokens that are kept, free of floating-point surprises; see `Masking.rounding`.

  Raises:
    ValueError: ratio is outside [0, 1), or so large that no token would be left.
  """
  if not 0 <= ratio < 1:
    raise ValueError(f"mask_ratio={ratio} must be in [0, 1).")
  # A product that should be whole may come out a little smaller: 10 * (1 - .9) is .99...98.
  floor = lambda x: int(x + 1e-6)
  keep = floor(tokens * (1 - ratio)) if rounding == "kept" else tokens - floor(tokens * ratio)
  if keep == 0:
    raise ValueError(
      f"mask_ratio={ratio} keeps none of {tokens} tokens. "
      f"Set it to at most {math.floor(1e4 * (1 - 1 / tokens)) / 1e4}, or make the patch smaller."
    )
  return keep


def gather(x: Float[Array, "b n d"], ids: Int[Array, "b k"]) -> Float[Array, "b k d"]:
  """Takes x[b, ids[b, k]] for every b and k."""
  return jnp.take_along_axis(x, ids[:, :, None], axis=1)


def scatter(
  kept: Float[Array, "b k d"], mask: Mask, fill: Float[Array, "d"]
) -> Float[Array, "b n d"]:
  """Puts kept tokens back in their places and `fill` everywhere else: the inverse of `gather`."""
  b, k, d = kept.shape
  filler = jnp.broadcast_to(fill.astype(kept.dtype), (b, mask.restore.shape[1] - k, d))
  return gather(jnp.concatenate([kept, filler], axis=1), mask.restore)

"""Images as tokens, and which of them a network gets to see. All shapes are static."""

import math
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def patchify(images: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n d"]:
  """Cuts images into P x P patches, row by row: [B, N, P * P * C] with channels last."""
  return einops.rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(
  tokens: Float[Array, "b n d"], patch: int, size: tuple[int, int]
) -> Float[Array, "b h w c"]:
  """Inverse of `patchify` for images of `size` = (H, W)."""
  return einops.rearrange(
    tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=size[0] // patch, p=patch, q=patch
  )


class Mask(NamedTuple):
  """Which tokens of each image are kept.

  Attributes:
    keep: ids of the kept tokens, [B, K].
    restore: [B, N]; `concat([kept, filler])[restore]` puts every token back in its place.
    masked: [B, N] float, 1 where the token was dropped.
  """

  keep: Int[Array, "b k"]
  restore: Int[Array, "b n"]
  masked: Float[Array, "b n"]


def num_kept(tokens: int, ratio: float) -> int:
  """K = floor(N (1 - ratio)), as MAE counts (He et al. 2022), free of floating-point surprises.

  Raises:
    ValueError: ratio is outside [0, 1), or so large that no token would be left.
  """
  if not 0 <= ratio < 1:
    raise ValueError(f"mask_ratio={ratio} must be in [0, 1).")
  keep = int(tokens * (1 - ratio) + 1e-6)
  if keep == 0:
    raise ValueError(
      f"mask_ratio={ratio} keeps none of {tokens} tokens. "
      f"Set it to at most {math.floor(1e4 * (1 - 1 / tokens)) / 1e4}, or make the patch smaller."
    )
  return keep


def mask_from_noise(noise: Float[Array, "b n"], keep: int) -> Mask:
  """Keeps, of each image, the `keep` tokens with the smallest noise.

  Independent uniform noise makes every subset of that size equally likely; noise drawn per example
  makes an example's mask independent of the batch it travels in.
  """
  order = jnp.argsort(noise, axis=1)
  restore = jnp.argsort(order, axis=1)
  return Mask(order[:, :keep], restore, (restore >= keep).astype(jnp.float32))


def random_mask(key: jax.Array, batch: int, tokens: int, keep: int) -> Mask:
  """A uniformly random mask of `keep` of `tokens` tokens for each of `batch` images."""
  return mask_from_noise(jax.random.uniform(key, (batch, tokens)), keep)


def gather(x: Float[Array, "b n d"], ids: Int[Array, "b k"]) -> Float[Array, "b k d"]:
  """x[b, ids[b, k]] for every b, k."""
  return jnp.take_along_axis(x, ids[:, :, None], axis=1)


def scatter(
  kept: Float[Array, "b k d"], mask: Mask, fill: Float[Array, "d"]
) -> Float[Array, "b n d"]:
  """Puts kept tokens back in their places and `fill` everywhere else: inverse of `gather`."""
  b, k, d = kept.shape
  filler = jnp.broadcast_to(fill.astype(kept.dtype), (b, mask.restore.shape[1] - k, d))
  return gather(jnp.concatenate([kept, filler], axis=1), mask.restore)

"""Decoding in tiles: large images in the memory of small ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _starts(size: int, tile: int, overlap: int) -> np.ndarray:
  """First positions of the fewest tiles that cover `size`, evenly spread."""
  count = 1 + -(-(size - tile) // (tile - overlap))
  return np.arange(count) * (size - tile) // max(count - 1, 1)


def _weights(starts: np.ndarray, tile: int, size: int) -> np.ndarray:
  """Weights of every tile's positions, [tiles, tile]; at each position of `size` they sum to one.

  They fall linearly where a tile overlaps the one before or after it.
  """
  centre = np.arange(tile) + 0.5
  weights = np.ones((len(starts), tile))
  for i, shared in enumerate(tile - np.diff(starts)):
    if shared:
      weights[i] *= np.clip((tile - centre) / shared, 0, 1)
      weights[i + 1] *= np.clip(centre / shared, 0, 1)
  total = np.zeros(size)
  for start, weight in zip(starts, weights, strict=True):
    total[start : start + tile] += weight
  spans = [total[start : start + tile] for start in starts]  # Not one where three tiles meet.
  return (weights / spans).astype(np.float32)


def tiled(
  decode: Callable[[jax.Array], jax.Array],
  latents: Float[Array, "b h w c"],
  tile: int,
  overlap: int,
  factor: int,
) -> Float[Array, "b H W d"]:
  """decode(latents) from overlapping tiles, one after the other, blended linearly.

  Equal to the plain decode where an output depends on latents nearby alone. A KL auto-encoder's
  normalisations and attention see the whole image, or here the whole tile: colours differ a little.

  Args:
    decode: [B, h, w, c] -> float32 [B, factor * h, factor * w, d] for any h and w.
    latents: unscaled or scaled, as `decode` takes them.
    tile: sides of a tile in pixels of a latent. Shorter sides of `latents` need no tiles.
    overlap: pixels of a latent that neighbours share at the least; 0 shows seams.
    factor: pixels per pixel of a latent.

  Raises:
    ValueError: a size is out of its range, or `decode` enlarges by another factor.
  """
  if tile < 1 or not 0 <= overlap < tile:
    raise ValueError(f"tile={tile} must be at least 1 and overlap={overlap} in [0, tile).")
  b, *sides, c = latents.shape
  tiles = [min(tile, side) for side in sides]
  outputs = jax.eval_shape(decode, jax.ShapeDtypeStruct((b, *tiles, c), latents.dtype))
  if outputs.shape[:-1] != (b, *(factor * t for t in tiles)):
    raise ValueError(
      f"Tiles of {tiles[0]} x {tiles[1]} decode to {outputs.shape[1]} x {outputs.shape[2]}, which "
      f"is not factor={factor} times as much. Give the decoder's factor."
    )
  if tiles == sides:
    return decode(latents)
  starts = [_starts(side, t, min(overlap, t - 1)) for side, t in zip(sides, tiles, strict=True)]
  blend = [
    _weights(factor * s, factor * t, factor * side)
    for s, t, side in zip(starts, tiles, sides, strict=True)
  ]
  grid = np.stack(np.meshgrid(*[np.arange(len(s)) for s in starts], indexing="ij"), axis=-1)
  starts, (rows, columns) = [jnp.asarray(s) for s in starts], map(jnp.asarray, blend)

  def add(canvas, position):
    i, j = position
    corner = (0, starts[0][i], starts[1][j], 0)
    part = decode(jax.lax.dynamic_slice(latents, corner, (b, *tiles, c)))
    part = part * rows[i][:, None, None] * columns[j][:, None]
    corner = (0, factor * corner[1], factor * corner[2], 0)
    old = jax.lax.dynamic_slice(canvas, corner, part.shape)
    return jax.lax.dynamic_update_slice(canvas, old + part, corner), None

  shape = (b, *(factor * side for side in sides), outputs.shape[-1])
  canvas, _ = jax.lax.scan(add, jnp.zeros(shape, jnp.float32), grid.reshape(-1, 2))
  return canvas

"""Places of tokens in an image, for rotary embeddings and relative biases of attention."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_PERIOD = 10_000.0

# A token without a place in the image, such as a class token, is at row and column -1.
NOWHERE = -1


def places(
  grid: tuple[int, int], keep: Int[Array, "b k"] | None = None, front: int = 0
) -> Int[Array, "*b m 2"]:
  """Lists the (row, column) of every token that a block sees.

  Args:
    grid: (rows, columns) of patches, which are numbered row by row.
    keep: numbers of the patches that are kept of each image; None keeps all.
    front: how many tokens without a place stand before the patches.

  Returns [front + N, 2], or [B, front + K, 2] where the kept patches differ by image.
  """
  tokens = jnp.arange(grid[0] * grid[1]) if keep is None else keep
  place = jnp.stack([tokens // grid[1], tokens % grid[1]], axis=-1)
  around = [(0, 0)] * (place.ndim - 2)
  return jnp.pad(place, [*around, (front, 0), (0, 0)], constant_values=NOWHERE)


def rotate(x: Float[Array, "b n h d"], place: Int[Array, "*b n 2"]) -> Float[Array, "b n h d"]:
  """Turns queries or keys by their places: rotary embedding in two dimensions (Su et al. 2021).

  The first half of a head's channels is turned by the row, the second by the column. Of each half,
  channels 2i and 2i + 1 are one pair, turned by place * 10000^(-4i / Dh), as in JiT (Li & He 2025).
  A product of two tokens that are turned depends on the difference of their places alone. Tokens
  without a place are not turned.
  """
  quarter = x.shape[-1] // 4
  freqs = MAX_PERIOD ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
  angles = jnp.maximum(place, 0).astype(jnp.float32)[..., None] * freqs
  angles = angles.reshape(*place.shape[:-1], 1, 2 * quarter)  # The same for all heads.
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2 * quarter, 2)
  first, second = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)


class RelativeBias(nn.Module):
  """A learned bias of attention for every head and every offset between two places (MDT, Swin).

  Attributes:
    grid: (rows R, columns C) of patches. The table has (2 R - 1)(2 C - 1) rows.
    heads: number of heads.
  """

  grid: tuple[int, int]
  heads: int

  @nn.compact
  def __call__(self, place: Int[Array, "*b n 2"]) -> Float[Array, "*b h n n"]:
    """Looks up the bias of every query with every key; it is 0 for tokens without a place."""
    rows, columns = self.grid
    shape = ((2 * rows - 1) * (2 * columns - 1), self.heads)
    table = self.param("table", nn.initializers.normal(0.02), shape, jnp.float32)
    offset = place[..., :, None, :] - place[..., None, :, :]  # query minus key
    index = (offset[..., 0] + rows - 1) * (2 * columns - 1) + offset[..., 1] + columns - 1
    somewhere = (place != NOWHERE).all(axis=-1)
    both = somewhere[..., :, None] & somewhere[..., None, :]
    bias = jnp.where(both[..., None], table[jnp.where(both, index, 0)], 0)
    return jnp.moveaxis(bias, -1, -3)

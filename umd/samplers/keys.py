"""Random numbers of an example, which are a function of its own key and of nothing else.

Batches may be cut and padded in any way, and split over any number of devices: an example's key,
and with it all its noise, stays the same.
"""

import jax
from jaxtyping import Array, Float, Int, Shaped


def example_keys(seed: int, index: Int[Array, "b"]) -> Array:
  """Makes one key for each example, a function of (seed, index of the example) alone."""
  return fold(jax.random.key(seed), index)


def fold(key: Array, index: Int[Array, "b"]) -> Array:
  """Makes one key for each index out of a single key."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def example_normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
  """Draws standard normal noise [B, *shape], each example's from its own key."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def example_uniform(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
  """Draws uniform noise [B, *shape] in [0, 1), each example's from its own key."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)


def split(keys: Shaped[Array, "b"]) -> tuple[Array, Array]:
  """Splits the key of each example in two."""
  first, second = jax.numpy.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  return first, second

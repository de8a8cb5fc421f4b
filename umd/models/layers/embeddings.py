"""Embeddings of the timestep and the label, summed into one conditioning vector."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_PERIOD = 10_000.0


def sinusoid(t: Int[Array, "b"], width: int) -> Float[Array, "b d"]:
  """[sin | cos] features of the timestep (Vaswani et al. 2017), always float32.

  bfloat16 cannot tell 999 from 1000, so t must not be rounded before this point.
  """
  half = width // 2
  freqs = jnp.exp(-jnp.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
  angles = t.astype(jnp.float32)[:, None] * freqs[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Trunk(nn.Module):
  """Dense(2D) - silu - Dense(D), in float32: it runs once per image and shapes every layer."""

  @nn.compact
  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    width = x.shape[-1]
    return nn.Dense(width, name="out")(jax.nn.silu(nn.Dense(2 * width, name="hidden")(x)))


class TimeEmbedding(nn.Module):
  """[B] timesteps -> [B, D]."""

  width: int

  @nn.compact
  def __call__(self, t: Int[Array, "b"]) -> Float[Array, "b d"]:
    return Trunk(name="trunk")(sinusoid(t, self.width))


class LabelEmbedding(nn.Module):
  """[B] labels in 0..num_classes -> [B, D]; the label `num_classes` means "no label"."""

  num_classes: int
  width: int

  @nn.compact
  def __call__(self, labels: Int[Array, "b"]) -> Float[Array, "b d"]:
    init = nn.initializers.normal(0.02)
    table = nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="table")
    return Trunk(name="trunk")(table(labels))

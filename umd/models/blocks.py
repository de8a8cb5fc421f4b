"""Transformer blocks with AdaLN or a conditioning token, and stacks of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

xavier = nn.initializers.xavier_uniform()


class LayerNorm(nn.Module):
  """LayerNorm with its own scale and bias, computed in float32, returned in the input's dtype."""

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(x).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head self-attention; q, k and v come from one matrix, softmax in float32."""

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    b, n, width = x.shape
    # One [D, 3, D] matrix, initialised as the three [D, D] matrices it stands for.
    init = nn.initializers.variance_scaling(
      1.0, "fan_avg", "uniform", in_axis=0, out_axis=2, batch_axis=1
    )
    kernel = self.param("qkv_kernel", init, (width, 3, width), jnp.float32)
    bias = self.param("qkv_bias", nn.initializers.zeros, (3, width), jnp.float32)
    qkv = x @ kernel.reshape(width, -1).astype(self.dtype) + bias.reshape(-1).astype(self.dtype)
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, width // self.heads), 2, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * (width // self.heads) ** -0.5, axis=-1).astype(self.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, width)
    return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="out")(out)


class MLP(nn.Module):
  """Dense(4D) - GELU - Dense(D)."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    width = x.shape[-1]
    bias = nn.initializers.normal(1e-6)
    dense = lambda features, name: nn.Dense(
      features, kernel_init=xavier, bias_init=bias, dtype=self.dtype, name=name
    )
    return dense(width, "out")(nn.gelu(dense(4 * width, "hidden")(x)))


def modulation(cond: Float[Array, "b d"], parts: int, dtype: jnp.dtype, name: str):
  """`parts` tensors [B, 1, D] from the condition, zero at initialisation (AdaLN-zero, DiT)."""
  zeros = nn.initializers.zeros
  dense = nn.Dense(parts * cond.shape[-1], kernel_init=zeros, dtype=dtype, name=name)
  return jnp.split(dense(cond)[:, None], parts, axis=-1)


class Block(nn.Module):
  """Pre-LN transformer block that sees the condition by AdaLN, or else as one more token."""

  heads: int
  adaln: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], cond: Float[Array, "b d"]):
    attention = Attention(self.heads, self.dtype, name="attention")
    mlp = MLP(self.dtype, name="mlp")
    norm1, norm2 = LayerNorm(name="norm1"), LayerNorm(name="norm2")
    if not self.adaln:
      x = jnp.concatenate([cond.astype(x.dtype)[:, None], x], axis=1)
      x = x + attention(norm1(x))
      x = x + mlp(norm2(x))
      return x[:, 1:], None
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(cond, 6, self.dtype, "adaln")
    x = x + gate1 * attention(norm1(x) * (1 + scale1) + shift1)
    x = x + gate2 * mlp(norm2(x) * (1 + scale2) + shift2)
    return x, None


class Stack(nn.Module):
  """`depth` blocks and a final LayerNorm.

  Parameters are stacked over the layers, [depth, ...], whether the layers run in a loop
  (`scan=True`: compiles faster, smaller program) or unrolled (`scan=False`: runs faster), so a
  checkpoint serves both.
  """

  depth: int
  heads: int
  adaln: bool
  dtype: jnp.dtype
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], cond: Float[Array, "b d"]):
    block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
    layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=1 if self.scan else self.depth,
    )
    x, _ = layers(self.heads, self.adaln, self.dtype, name="blocks")(x, cond)
    return LayerNorm(name="norm")(x)

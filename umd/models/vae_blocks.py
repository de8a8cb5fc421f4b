"""Encoder and decoder of latent diffusion's KL auto-encoder, its parts named as in diffusers."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6  # of the group normalisations
SAME = ((1, 1), (1, 1))  # padding of a 3 x 3 convolution, as (before, after) of rows and columns
HALVE = ((0, 1), (0, 1))  # padding of the strided one: below and to the right alone


def precision(dtype: str) -> jax.lax.Precision:
  """Products of float32 are float32: by default they are bfloat16 on TPU and TF32 on GPU."""
  exact = jnp.dtype(dtype) == jnp.float32
  return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def conv(features: int, dtype: str, name: str, stride: int = 1, padding=SAME, exact=None):
  """A convolution of 3 x 3 pixels, parameters float32; `exact` in place of `precision(dtype)`."""
  kernel, exact = (3, 3), precision(dtype) if exact is None else exact
  return nn.Conv(features, kernel, stride, padding, dtype=dtype, precision=exact, name=name)


def pointwise(features: int, dtype: str, name: str | None = None):
  """A convolution of 1 x 1 pixels, parameters float32. In `setup` the attribute names it."""
  return nn.Conv(features, (1, 1), dtype=dtype, precision=precision(dtype), name=name)


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
  """Every pixel as 2 x 2 of them."""
  b, h, w, c = x.shape
  return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class GroupNorm(nn.Module):
  """Group normalisation (Wu & He 2018) in float32, returned in float32.

  One pass over an activation takes its statistics, channel by channel, which are then joined: none
  is laid out anew in groups. E[x^2] - E[x]^2 loses digits where a channel's mean is large beside
  its deviation. A bfloat16 activation has lost more of them before; of a float32 one the statistics
  are taken about a pixel of the image instead of about zero, which on TPU costs another copy.
  """

  groups: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    scale = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
    pixel, x = x[:, h // 2, w // 2], x.astype(jnp.float32)
    # The statistics do not depend on the pixel, and so neither does their gradient.
    pixel = jax.lax.stop_gradient(pixel) if pixel.dtype == jnp.float32 else jnp.zeros((b, c))
    centred = x - pixel[:, None, None]
    mean, square = centred.mean(axis=(1, 2)), (centred**2).mean(axis=(1, 2))
    var = jnp.maximum(square - mean**2, 0)
    grouped = lambda y: y.reshape(b, self.groups, -1)
    mean, var = grouped(mean + pixel), grouped(var)
    group_mean = mean.mean(axis=-1, keepdims=True)
    group_var = (var + (mean - group_mean) ** 2).mean(axis=-1, keepdims=True)
    channels = lambda y: jnp.broadcast_to(y, mean.shape).reshape(b, 1, 1, c)
    return (x - channels(group_mean)) * channels(jax.lax.rsqrt(group_var + EPS)) * scale + bias


class ResNet(nn.Module):
  """Norm - SiLU - conv, twice, beside the input or its projection to `features` channels."""

  features: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    y = conv(self.features, self.dtype, "conv1")(nn.silu(GroupNorm(self.groups, name="norm1")(x)))
    y = conv(self.features, self.dtype, "conv2")(nn.silu(GroupNorm(self.groups, name="norm2")(y)))
    if x.shape[-1] != self.features:
      x = pointwise(self.features, self.dtype, "conv_shortcut")(x)
    return x + y


class Attention(nn.Module):
  """Self-attention of all pixels with one head, added to the input; softmax in float32."""

  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    exact = precision(self.dtype)
    dense = lambda name: nn.Dense(c, dtype=self.dtype, precision=exact, name=name)
    y = GroupNorm(self.groups, name="group_norm")(x).reshape(b, h * w, c)
    q, k, v = (dense(f"to_{name}")(y) for name in "qkv")
    logits = jnp.einsum("bqc,bkc->bqk", q, k, precision=exact, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * c**-0.5, axis=-1).astype(v.dtype)
    y = jnp.einsum("bqk,bkc->bqc", weights, v, precision=exact)
    return x + dense("to_out_0")(y).reshape(x.shape)


class Middle(nn.Module):
  """ResNet - attention - ResNet at the lowest resolution."""

  groups: int
  attention: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    resnet = lambda i: ResNet(x.shape[-1], self.groups, self.dtype, name=f"resnets_{i}")
    x = resnet(0)(x)
    if self.attention:
      x = Attention(self.groups, self.dtype, name="attentions_0")(x)
    return resnet(1)(x)


class Resample(nn.Module):
  """A convolution that halves the sides of what it gets, or doubles them."""

  down: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
    if self.down:
      return conv(x.shape[-1], self.dtype, "conv", stride=2, padding=HALVE)(x)
    return conv(x.shape[-1], self.dtype, "conv")(upsample(x))


class Level(nn.Module):
  """`layers` ResNets at one resolution, and the way to the next: "down", "up" or "" if none."""

  features: int
  layers: int
  groups: int
  resample: str
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
    for i in range(self.layers):
      x = ResNet(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
    if not self.resample:
      return x
    return Resample(self.resample == "down", self.dtype, name=f"{self.resample}samplers_0")(x)


class Tower(nn.Module):
  """One half of the auto-encoder.

  An encoder ("down") goes through its levels and then the middle, a decoder ("up") the other way
  round. The last convolution is computed in float32, for its output is not to be rounded.
  """

  direction: str
  features: int
  widths: Sequence[int]
  layers: int
  groups: int
  attention: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
    middle = Middle(self.groups, self.attention, self.dtype, name="mid_block")
    up, last = self.direction == "up", len(self.widths) - 1
    x = conv(self.widths[0], self.dtype, "conv_in")(x)
    x = middle(x) if up else x
    for i, width in enumerate(self.widths):
      resample, name = self.direction if i < last else "", f"{self.direction}_blocks_{i}"
      x = Level(width, self.layers, self.groups, resample, self.dtype, name=name)(x)
    x = x if up else middle(x)
    x = nn.silu(GroupNorm(self.groups, name="conv_norm_out")(x))
    return conv(self.features, "float32", "conv_out", exact=precision(self.dtype))(x)

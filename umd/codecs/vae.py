"""The KL auto-encoder of latent diffusion (Rombach et al. 2022): diffusers' AutoencoderKL, NHWC."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
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


class SpatialAttention(nn.Module):
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
      x = SpatialAttention(self.groups, self.dtype, name="attentions_0")(x)
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


LOGVAR = (-30.0, 20.0)  # bounds of the logarithm of the variance


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What the config.json of an AutoencoderKL says; defaults are Stable Diffusion 1.5's.

  Attributes:
    in_channels, out_channels: of images.
    block_out_channels: widths of the levels, from the pixels down; each level but the last halves
      the sides.
    layers_per_block: ResNets of a level of the encoder; the decoder's have one more.
    latent_channels: channels of a latent.
    norm_num_groups: groups of the normalisations; must divide all widths.
    use_quant_conv, use_post_quant_conv: 1 x 1 convolutions after the encoder, before the decoder.
    mid_block_add_attention: attention at the lowest resolution.
    scaling_factor, shift_factor: a model sees (latent - shift_factor) * scaling_factor.

  Raises:
    ValueError: a value is out of its range.
  """

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  latent_channels: int = 4
  norm_num_groups: int = 32
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True
  scaling_factor: float = 0.18215
  shift_factor: float = 0.0

  def __post_init__(self):
    widths, groups = self.block_out_channels, self.norm_num_groups
    counts = ("in_channels", "out_channels", "layers_per_block", "latent_channels")
    for name in (*counts, "norm_num_groups"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    if not widths or any(width < 1 or width % groups for width in widths):
      raise ValueError(
        f"block_out_channels={widths} must be one width or more, all of them multiples of "
        f"norm_num_groups={groups}."
      )
    if not (math.isfinite(self.scaling_factor) and self.scaling_factor > 0):
      raise ValueError(f"scaling_factor={self.scaling_factor} must be positive and finite.")
    if not math.isfinite(self.shift_factor):
      raise ValueError(f"shift_factor={self.shift_factor} must be finite.")

  @property
  def factor(self) -> int:
    """Pixels per pixel of a latent, along either side."""
    return 2 ** (len(self.block_out_channels) - 1)


class KLAutoEncoder(nn.Module):
  """An encoder to the mean and variance of a latent, and the decoder of latents.

  Attributes:
    architecture: its sizes.
    dtype: of activations, "float32" (truly, on every accelerator) or "bfloat16". Parameters,
      statistics of normalisations, softmax and all outputs are float32 in either case.
  """

  architecture: Architecture
  dtype: str = "float32"

  def setup(self):
    arch = self.architecture
    shared = (arch.norm_num_groups, arch.mid_block_add_attention, self.dtype)
    widths, layers = arch.block_out_channels, arch.layers_per_block
    moments = 2 * arch.latent_channels
    self.encoder = Tower("down", moments, widths, layers, *shared)
    self.decoder = Tower("up", arch.out_channels, widths[::-1], layers + 1, *shared)
    # On few channels and in float32: they cost nothing.
    if arch.use_quant_conv:
      self.quant_conv = pointwise(moments, "float32")
    if arch.use_post_quant_conv:
      self.post_quant_conv = pointwise(arch.latent_channels, "float32")

  def encode(
    self, images: Float[Array, "b H W c"]
  ) -> tuple[Float[Array, "b h w d"], Float[Array, "b h w d"]]:
    """Mean and log-variance of the latents of images in [-1, 1], unscaled.

    Raises:
      ValueError: the images have other channels, or sides that the factor does not divide.
    """
    arch, (_, height, width, channels) = self.architecture, images.shape
    if channels != arch.in_channels:
      raise ValueError(
        f"Images have {channels} channels, but in_channels={arch.in_channels}: give those images, "
        "or weights for these."
      )
    if height % arch.factor or width % arch.factor:
      raise ValueError(
        f"Images of {height} x {width} pixels have no latents: both sides must be multiples of "
        f"factor={arch.factor} ({len(arch.block_out_channels)} levels). Crop or resize them."
      )
    moments = self.encoder(images)
    if arch.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR)

  def decode(self, latents: Float[Array, "b h w d"]) -> Float[Array, "b H W c"]:
    """Images of unscaled latents, in about [-1, 1]: not clipped.

    Raises:
      ValueError: the latents have other channels.
    """
    arch = self.architecture
    if latents.shape[-1] != arch.latent_channels:
      raise ValueError(
        f"Latents have {latents.shape[-1]} channels, but latent_channels={arch.latent_channels}: "
        "they are of another auto-encoder. Use its weights."
      )
    if arch.use_post_quant_conv:
      latents = self.post_quant_conv(latents)
    return self.decoder(latents)

  def __call__(self, images: Float[Array, "b H W c"], noise: Float[Array, "b h w d"]):
    """(reconstruction, mean, logvar), decoded from the latent mean + exp(logvar / 2) * noise."""
    mean, logvar = self.encode(images)
    return self.decode(mean + jnp.exp(logvar / 2) * noise), mean, logvar


# Names of the attention's tensors in files of before diffusers 0.15.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(OLD)})(\.(?:weight|bias))")


def _foreign(path: str) -> str:
  """encoder/down_blocks_0/conv1/kernel -> encoder.down_blocks.0.conv1.weight."""
  *modules, leaf = path.split("/")
  modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
  return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


@functools.lru_cache
def _layout(architecture: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
  """For each of our parameters: its name and shape in diffusers' files."""
  side, model = architecture.factor, KLAutoEncoder(architecture)
  images = jax.ShapeDtypeStruct((1, side, side, architecture.in_channels), jnp.float32)
  noise = jax.ShapeDtypeStruct((1, 1, 1, architecture.latent_channels), jnp.float32)
  tree = jax.eval_shape(model.init, jax.random.key(0), images, noise)["params"]
  order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # convolutions, matrices, vectors
  return {
    path: (_foreign(path), tuple(leaf.shape[i] for i in order[leaf.ndim]))
    for path, leaf in flatten_dict(tree, sep="/").items()
  }


def _problems(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> str:
  """What tells the shapes found from those expected, "" if nothing does."""
  wrong = [f"{name} is missing" for name in expected if name not in found]
  wrong += [f"{name} is unexpected" for name in found if name not in expected]
  both = [(name, found[name], shape) for name, shape in expected.items() if name in found]
  wrong += [f"{name} has shape {got}, not {shape}" for name, got, shape in both if got != shape]
  more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
  return "; ".join(wrong[:5]) + more


def from_diffusers(tensors: Mapping[str, np.ndarray], architecture: Architecture) -> dict:
  """Parameters, NumPy float32, from the tensors of diffusers' AutoencoderKL by their names there.

  The attention may be named as it is today or as before (query, key, value, proj_attn), its
  matrices may be convolutions of 1 x 1 pixels.

  Raises:
    ValueError: tensors are missing, unexpected, there twice or of wrong shapes.
  """
  found = {}
  for old, tensor in tensors.items():
    name = OLD_NAME.sub(lambda match: match[1] + OLD[match[2]] + match[3], old)
    if name in found:
      raise ValueError(f"{old} and {name} are the same tensor: keep one of them.")
    is_matrix = ".attentions." in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
    found[name] = tensor[:, :, 0, 0] if is_matrix else tensor
  layout = _layout(architecture)
  if wrong := _problems({k: v.shape for k, v in found.items()}, dict(layout.values())):
    raise ValueError(f"These are not the tensors of an AutoencoderKL of {architecture}: {wrong}.")
  order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
  params = {path: found[name] for path, (name, _) in layout.items()}
  params = {
    path: np.ascontiguousarray(x.transpose(order[x.ndim]), np.float32) for path, x in params.items()
  }
  return unflatten_dict(params, sep="/")


def to_diffusers(params: Mapping, architecture: Architecture) -> dict[str, np.ndarray]:
  """The tensors of diffusers' AutoencoderKL, float32, by their names of today.

  Raises:
    ValueError: the parameters are not of this architecture.
  """
  order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
  flat = {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}
  flat = {path: x.transpose(order.get(x.ndim, range(x.ndim))) for path, x in flat.items()}
  tensors = {_foreign(path): np.ascontiguousarray(x, np.float32) for path, x in flat.items()}
  expected = dict(_layout(architecture).values())
  if wrong := _problems({name: x.shape for name, x in tensors.items()}, expected):
    raise ValueError(f"These are not the parameters of a KLAutoEncoder of {architecture}: {wrong}.")
  return tensors

"""Codecs: what stands between pixels and a network.

A network never sees a codec: whoever reads data encodes, and whoever shows images decodes. A
codec's parameters are not trained, so they are no part of a state; jitted functions take them as an
argument, for as constants they would be compiled into every program. `Codec` is the protocol;
`Pixels` changes nothing, and `Latents` are those of a KL auto-encoder.
"""

import abc
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from umd.codecs import vae_files
from umd.codecs.vae import KLAutoEncoder
from umd.data import Source
from umd.data.latents import check
from umd.devices.mesh import BATCH, WHOLE, replicate

ENCODING = 0x1A7E  # Folded into keys, so that latents share no noise with what is done to them.
OVERLAP = 4  # A tile shares a quarter of its side with the next one.

Size = tuple[int, int, int]
Images = Float[Array, "b H W C"]
Encoded = Float[Array, "b h w c"]


class Codec(abc.ABC):
  """The protocol of codecs: images [B, H, W, C] in [-1, 1] to what a network sees, and back.

  Attributes:
    params: the codec's parameters, whole on every device.
    sha256: hash of the file of its weights, "" if it has none.
    factor: pixels per place that a network sees, along each axis.
    bounded: whether what a network sees is in [-1, 1].
  """

  params: Mapping
  sha256: str
  factor: int
  bounded: bool

  @abc.abstractmethod
  def model_size(self, image_size: Size) -> Size:
    """Returns (h, w, c) of what a network sees of images (H, W, C), or raises ValueError."""

  @abc.abstractmethod
  def pixel_size(self, model_size: Size) -> Size:
    """Returns (H, W, C) of the images that are made of what a network makes."""

  @abc.abstractmethod
  def source_size(self, key: str, source: Source) -> Size:
    """Returns (h, w, c) of what a network sees of a source of images or of stored latents.

    Raises:
      ValueError: they do not fit the codec; the message begins with `key`.
    """

  @abc.abstractmethod
  def encode(self, params, images: Images, keys: Array) -> Encoded:
    """Returns what a network sees of images, each drawn with its own key of `keys` [B]."""

  @abc.abstractmethod
  def decode(self, params, x: Encoded) -> Images:
    """Returns the images of what a network makes: about [-1, 1], not clipped."""

  @abc.abstractmethod
  def spread(self, x: Encoded) -> Images:
    """Returns a map over what a network sees, such as a mask, as a map over pixels."""


def stored(source: Source):
  """Returns the `LatentInfo` of a source of stored latents; None for a source of images."""
  return getattr(source.records, "info", None)


class Pixels(Codec):
  """The network sees the images as they are."""

  params: Mapping = {}
  sha256 = ""
  factor = 1
  bounded = True

  def model_size(self, image_size: Size) -> Size:
    return tuple(image_size)

  def pixel_size(self, model_size: Size) -> Size:
    return tuple(model_size)

  def source_size(self, key: str, source: Source) -> Size:
    if stored(source):
      raise ValueError(
        f"{key}: {source.name} holds latents, but the model is trained on pixels. Set "
        "latent_diffusion=True, or name data with images."
      )
    return self.model_size(source.image_size)

  def encode(self, params, images: Images, keys: Array) -> Encoded:
    return images

  def decode(self, params, x: Encoded) -> Images:
    return x

  def spread(self, x: Encoded) -> Images:
    return x


class Latents(Codec):
  """The network sees (latent - shift) * scaling, a sample of a KL auto-encoder's posterior.

  Every device encodes and decodes its own share of a batch, which the mesh must divide, `chunk`
  images at a time: at 256 px the widest activation of one image takes 64 MiB in bfloat16.

  Attributes:
    architecture: of the auto-encoder.
  """

  bounded = False

  def __init__(
    self,
    weights: vae_files.VaeWeights,
    mesh: Mesh,
    dtype: str = "bfloat16",
    chunk: int = 8,
    tile: int = 0,
  ):
    """Places the auto-encoder on the devices.

    Args:
      weights: of a KL auto-encoder.
      mesh: all devices.
      dtype: of the computation, "bfloat16" or "float32".
      chunk: how many images each device encodes or decodes at a time.
      tile: side in pixels of the tiles in which images are decoded, for those too large to be
        decoded whole; 0 for no tiles.

    Raises:
      ValueError: the tile is no multiple of the auto-encoder's factor.
    """
    self.architecture, self.sha256 = weights.architecture, weights.sha256
    self.factor = self.architecture.factor
    if tile % self.factor:
      raise ValueError(f"latents.tile={tile} must be a multiple of the VAE's {self.factor} px.")
    if self.architecture.in_channels == 2 * self.architecture.latent_channels:
      raise ValueError(
        f"{weights.name}: images of {self.architecture.in_channels} channels look like moments of "
        f"{self.architecture.latent_channels} latent channels, which is not supported."
      )
    self._network = KLAutoEncoder(self.architecture, dtype)
    self._name, self._mesh, self._chunk, self._tile = weights.name, mesh, chunk, tile
    self.params = replicate(weights.params, mesh)

  def model_size(self, image_size: Size) -> Size:
    height, width, channels = image_size
    if height % self.factor or width % self.factor:
      raise ValueError(
        f"images of {height} x {width} px: the VAE {self._name!r} takes multiples of {self.factor} "
        "px. Choose another size."
      )
    if channels != self.architecture.in_channels:
      raise ValueError(
        f"images of {channels} channels: the VAE {self._name!r} takes "
        f"{self.architecture.in_channels}. Name other data or another vae."
      )
    return height // self.factor, width // self.factor, self.architecture.latent_channels

  def pixel_size(self, model_size: Size) -> Size:
    height, width, _ = model_size
    return height * self.factor, width * self.factor, self.architecture.out_channels

  def source_size(self, key: str, source: Source) -> Size:
    info = stored(source)
    try:
      if info is None:
        return self.model_size(source.image_size)
      check(info, self.sha256, self.architecture.scaling_factor, self.architecture.shift_factor)
    except ValueError as error:
      raise ValueError(f"{key}: {source.name}: {error}") from None
    return *source.image_size[:2], self.architecture.latent_channels

  def moments(self, params, images: Images) -> Float[Array, "b h w _"]:
    """Returns mean and log-variance of the posterior, joined on the last axis, unscaled."""

    def encode(params, images):
      mean_logvar = self._network.apply({"params": params}, images, method="encode")
      return jnp.concatenate(mean_logvar, axis=-1)

    return self._on_each_device(encode, params, images)

  def encode(self, params, images: Images, keys: Array) -> Encoded:
    """Returns what the network sees of images, or of their stored moments."""
    is_stored = images.shape[-1] == 2 * self.architecture.latent_channels
    moments = images if is_stored else self.moments(params, images)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    latents = mean + jnp.exp(0.5 * logvar) * noise
    return (latents - self.architecture.shift_factor) * self.architecture.scaling_factor

  def decode(self, params, x: Encoded) -> Images:
    def decode(params, latents):
      whole = lambda z: self._network.apply({"params": params}, z, method="decode")
      side = self._tile // self.factor
      if not side or side >= max(latents.shape[1:3]):
        return whole(latents)
      return tiled(whole, latents, side, max(1, side // OVERLAP), self.factor)

    latents = x / self.architecture.scaling_factor + self.architecture.shift_factor
    return self._on_each_device(decode, params, latents)

  def spread(self, x: Encoded) -> Images:
    """Returns a map over latents, the same in all their channels, as a map over pixels."""
    wide = jnp.repeat(jnp.repeat(x[..., :1], self.factor, axis=1), self.factor, axis=2)
    return jnp.broadcast_to(wide, (*wide.shape[:3], self.architecture.out_channels))

  def _on_each_device(self, fn: Callable, params, x):
    """Returns `fn(params, x)` of every device's own rows, `chunk` at a time."""

    def local(params, x):
      chunk = max(d for d in range(1, self._chunk + 1) if len(x) % d == 0)
      chunks = x.reshape(-1, chunk, *x.shape[1:])
      if len(chunks) == 1:
        return fn(params, x)
      out = jax.lax.map(lambda rows: fn(params, rows), chunks)
      return out.reshape(-1, *out.shape[2:])

    specs = dict(in_specs=(WHOLE, BATCH), out_specs=BATCH)
    return jax.shard_map(local, mesh=self._mesh, check_vma=False, **specs)(params, x)


class Weights(NamedTuple):
  """What a function needs that looks at images through a model.

  Attributes:
    model: the model's parameters.
    codec: the codec's parameters.
  """

  model: dict
  codec: dict


def make(settings: Mapping, mesh: Mesh) -> Codec:
  """Returns the codec of a config's `latents`: {} for pixels, else `vae` and those of `Latents`.

  Raises:
    FileNotFoundError: the VAE is neither here nor can it be fetched.
    ValueError: its files are not what they should be.
  """
  return _make(mesh, **settings) if settings else Pixels()


@functools.cache  # All parts of a run share one copy of the weights.
def _make(mesh: Mesh, vae: str, **settings) -> Latents:
  return Latents(vae_files.load(vae), mesh, **settings)


def encode_batch(codec: Codec, params, batch: Mapping, key: Array) -> dict:
  """Returns the batch with what a network sees in place of its images; `params` are the codec's."""
  keys = jax.random.split(jax.random.fold_in(key, ENCODING), len(batch["image"]))
  return {**batch, "image": codec.encode(params, batch["image"], keys)}


def encode_examples(codec: Codec, params, images: Images, keys: Array) -> Encoded:
  """Returns what a network sees of images, each with its own key; `params` are the codec's."""
  fold = jax.vmap(lambda key: jax.random.fold_in(key, ENCODING))
  return codec.encode(params, images, fold(keys))


def tiled(
  decode: Callable[[jax.Array], jax.Array],
  latents: Float[Array, "b h w c"],
  tile: int,
  overlap: int,
  factor: int,
) -> Float[Array, "b H W d"]:
  """Returns decode(latents) from overlapping tiles, one after the other, blended linearly.

  This equals the plain decode where an output depends on latents nearby alone. A KL auto-encoder's
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
    _blend_weights(factor * s, factor * t, factor * side)
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


def _starts(size: int, tile: int, overlap: int) -> np.ndarray:
  """Returns the first positions of the fewest tiles that cover `size`, evenly spread."""
  count = 1 + -(-(size - tile) // (tile - overlap))
  return np.arange(count) * (size - tile) // max(count - 1, 1)


def _blend_weights(starts: np.ndarray, tile: int, size: int) -> np.ndarray:
  """Returns weights [tiles, tile] that sum to one at each position of `size`.

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

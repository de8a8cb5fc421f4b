"""The ViT auto-encoder of UMD (Hansen-Estruch et al. 2024, arXiv:2406.17688).

An encoder reads class tokens and the patches it is shown; a decoder reads the pooled class tokens
and every patch position, and predicts one or more heads (x0, eps, v) for every patch. MAE, UMD,
DiT and MaskDiT are this one network with different inputs and losses.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from umd.devices.mesh import by_batch, join_rows, part_rows
from umd.masks import Mask, gather, patchify, scatter, unpatchify
from umd.models.layers.attention import IMPLEMENTATIONS
from umd.models.layers.blocks import CONDITIONS, REMAT, BlockDesign, Stack, modulate
from umd.models.network import Input, num_tokens

# name: width, encoder depth, decoder depth, attention heads. S, B, L are the paper's.
SIZES = {
  "nano": (32, 2, 1, 2),  # for tests
  "micro": (96, 4, 2, 4),  # for the quick start: minutes on two CPU cores
  "Ti": (192, 12, 4, 3),
  "S": (384, 12, 4, 6),
  "B": (768, 12, 4, 12),
  "L": (1024, 24, 8, 16),
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """The numbers of a variant such as "B/4": transformer sizes and patch side in pixels."""

  width: int
  depth: int
  decoder_depth: int
  heads: int
  patch: int


def parse_variant(variant: str) -> Shape:
  """Reads a variant such as "B/4"; raises ValueError naming the known sizes."""
  size, _, patch = variant.partition("/")
  if size not in SIZES or not patch.isdigit() or int(patch) < 1:
    raise ValueError(
      f"model.variant={variant!r} must be SIZE/PATCH with SIZE one of {list(SIZES)} "
      "and PATCH the side of a patch in pixels, as in 'B/4'."
    )
  return Shape(*SIZES[size], int(patch))


def sinusoid(t: Shaped[Array, "*n"], width: int) -> Float[Array, "*n d"]:
  """Computes [sin | cos] features of times of any shape (Vaswani et al. 2017), always in float32.

  bfloat16 cannot tell 999 from 1000, so t must not be rounded before this point.
  """
  half = width // 2
  freqs = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
  angles = t.astype(jnp.float32)[..., None] * freqs
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Trunk(nn.Module):
  """Dense(2D) - silu - Dense(D), in float32: it runs once per image and shapes every layer."""

  @nn.compact
  def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    width = x.shape[-1]
    return nn.Dense(width, name="out")(jax.nn.silu(nn.Dense(2 * width, name="hidden")(x)))


class TimeEmbedding(nn.Module):
  """Embeds times: [B] -> [B, D], or [B, N] -> [B, N, D] where every token has a time of its own."""

  width: int

  @nn.compact
  def __call__(self, t: Shaped[Array, "*n"]) -> Float[Array, "*n d"]:
    return Trunk(name="trunk")(sinusoid(t, self.width))


class LabelEmbedding(nn.Module):
  """Embeds labels in 0..num_classes: [B] -> [B, D]. The label `num_classes` means "no label"."""

  num_classes: int
  width: int

  @nn.compact
  def __call__(self, labels: Int[Array, "b"]) -> Float[Array, "b d"]:
    init = nn.initializers.normal(0.02)
    table = nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="table")
    return Trunk(name="trunk")(table(labels))


class Condition(NamedTuple):
  """Time and label as the network sees them: for its blocks, and for its head.

  [B, D] each, or [B, N, D] where every token has a time of its own; for the blocks it is the
  modulation of all layers, [..., 6 D], if they share it.
  """

  blocks: Array
  head: Array


class AutoEncoder(nn.Module):
  """Masked-diffusion auto-encoder.

  Attributes:
    variant: size and patch, e.g. "B/4".
    image_size: (H, W, C) of the images (or latents).
    num_classes: number of labels, 0 for a model without label embedding. Label `num_classes`
      stands for "no label".
    heads: what is predicted for every pixel, in order: names known to `umd.paths.Path`.
    class_tokens: number of class tokens; their mean after the encoder is the representation.
    condition: how blocks see timestep and label, key of `blocks.CONDITIONS`.
    dtype: of the computation ("float32" or "bfloat16"); parameters, softmax, norms and the
      time embedding stay float32.
    scan: run the layers as a loop.
    remat: what the backward pass computes again, key of `blocks.REMAT`.
    attention: one of `attention.IMPLEMENTATIONS`; "auto" chooses by platform and shape.
  """

  variant: str
  image_size: tuple[int, int, int]
  num_classes: int = 0
  heads: tuple[str, ...] = ("x0", "eps")
  class_tokens: int = 4
  condition: str = "adaln"
  dtype: str = "float32"
  scan: bool = False
  remat: str = "none"
  attention: str = "auto"

  def __post_init__(self):
    shape, (height, width, _) = parse_variant(self.variant), self.image_size
    if height % shape.patch or width % shape.patch:
      raise ValueError(
        f"model.variant={self.variant!r}: the patch of {shape.patch} px does not divide the image "
        f"of {height} x {width} px. Choose another patch or image size."
      )
    choices = dict(condition=CONDITIONS, remat=REMAT, attention=IMPLEMENTATIONS)
    for name, known in choices.items():
      if (value := getattr(self, name)) not in known:
        raise ValueError(f"model.{name}={value!r} is not one of {list(known)}.")
    super().__post_init__()

  @property
  def shape(self) -> Shape:
    """The transformer's sizes."""
    return parse_variant(self.variant)

  @property
  def patch(self) -> int:
    """The side of a patch in pixels."""
    return self.shape.patch

  def setup(self):
    s, dtype, tokens = self.shape, jnp.dtype(self.dtype), num_tokens(self)
    normal, pos = nn.initializers.normal(0.02), nn.initializers.normal(tokens**-0.5)
    design = BlockDesign(s.heads, self.condition, attention=self.attention)
    stack = lambda depth: Stack(depth, design, dtype, self.scan, self.remat)
    self.embed = nn.Dense(s.width, dtype=dtype)
    self.pos_embed = self.param("pos_embed", pos, (tokens, s.width))
    self.decoder_pos_embed = self.param("decoder_pos_embed", pos, (tokens, s.width))
    # Drawn at random: equal tokens without positions of their own would stay equal for ever.
    self.cls = self.param("class_tokens", normal, (self.class_tokens, s.width))
    self.mask_token = self.param("mask_token", normal, (s.width,))
    self.time_embed = TimeEmbedding(s.width)
    if self.num_classes:
      self.label_embed = LabelEmbedding(self.num_classes, s.width)
    self.encoder, self.decoder = stack(s.depth), stack(s.decoder_depth)
    outputs = len(self.heads) * self.image_size[2] * s.patch**2
    self.head = nn.Dense(outputs, kernel_init=normal)
    if self.condition == "adaln_shared":
      self.adaln = modulate(s.width, dtype, "adaln")
    if self.condition != "token":
      # AdaLN-zero (DiT): at first the head's tokens pass unchanged.
      self.head_adaln = nn.Dense(2 * s.width, kernel_init=nn.initializers.zeros)

  def embed_condition(self, t: Shaped[Array, "b *n"], labels: Int[Array, "b"]) -> Condition:
    """What times, [B] or [B, N], and labels [B] are to the blocks, and to the head."""
    if t.ndim == 2 and self.condition == "token":
      raise ValueError(
        "model.condition='token' shows a network one time per image, and every token has its own "
        "here. Use 'adaln' or 'adaln_shared'."
      )
    cond = self.time_embed(t)
    if self.num_classes:
      label = self.label_embed(labels)
      cond = cond + (label if t.ndim == 1 else label[:, None])
    if self.condition != "token":
      cond = jax.nn.silu(cond)
    shared = self.condition == "adaln_shared"
    return Condition(self.adaln(cond) if shared else cond, cond)

  def encoder_input(
    self, images: Float[Array, "b h w c"], mask: Mask | None
  ) -> Float[Array, "b m d"]:
    """What the encoder reads, [B, M, D]: the class tokens, then the K patches that are kept."""
    patches, pos = patchify(images, self.patch), self.pos_embed[None]
    if mask is not None:
      patches = gather(patches, mask.keep)
      pos = self.pos_embed[mask.keep]
    x = self.embed(patches)
    x = x + pos.astype(x.dtype)
    cls = jnp.broadcast_to(self.cls.astype(x.dtype), (x.shape[0], *self.cls.shape))
    return by_batch(jnp.concatenate([cls, x], axis=1))

  def pool(self, x: Float[Array, "b m d"]) -> tuple[Float[Array, "b d"], Float[Array, "b k d"]]:
    """(representation [B, D] float32, patches [B, K, D]) of encoded tokens."""
    rep = x[:, : self.class_tokens].astype(jnp.float32).mean(axis=1)
    return rep, x[:, self.class_tokens :]

  def decoder_input(self, rep: Float[Array, "b d"], x: Float[Array, "b k d"], mask: Mask | None):
    """What the decoder reads, [B, 1 + N, D]: the pooled class tokens, then every patch."""
    if mask is not None:
      x = scatter(x, mask, self.mask_token)
    x = x + self.decoder_pos_embed.astype(x.dtype)
    return jnp.concatenate([rep.astype(x.dtype)[:, None], x], axis=1)

  def decode(self, x: Float[Array, "b m d"], cond: Condition) -> Float[Array, "b n p"]:
    """Patches [B, N, P * P * C of each head], float32, of what `decoder_input` makes."""
    (x,) = self.decoder([(by_batch(x), with_front(cond.blocks, 1))])
    x = x[:, 1:].astype(jnp.float32)
    if self.condition != "token":
      head = cond.head[:, None] if cond.head.ndim == 2 else cond.head
      shift, scale = jnp.split(self.head_adaln(head), 2, axis=-1)
      x = x * (1 + scale) + shift
    return self.head(x)

  def predict(self, inputs: Sequence[Input], groups: int = 1) -> list[dict]:
    """Predicts every head for every pixel; see `umd.models.network.Network.predict`.

    The parts, whose encoder sees sequences of different lengths, go through the decoder together.
    """
    counts = [len(part.t) for part in inputs]
    null = lambda part: jnp.full(len(part.t), self.num_classes, jnp.int32)
    shown = [(part.t, null(part) if part.labels is None else part.labels) for part in inputs]
    cond = self.embed_condition(*join_rows(shown, groups))
    conds = part_rows(cond.blocks, counts, groups)
    encoded = self.encoder(
      [
        (
          self.encoder_input(part.images, part.mask),
          with_front(kept(blocks, part.mask), self.class_tokens),
        )
        for part, blocks in zip(inputs, conds, strict=True)
      ]
    )
    decoder_inputs = [
      self.decoder_input(*self.pool(x), part.mask) for x, part in zip(encoded, inputs, strict=True)
    ]
    patches = self.decode(join_rows(decoder_inputs, groups), cond)
    return [self.images_by_head(part) for part in part_rows(patches, counts, groups)]

  def images_by_head(self, patches: Float[Array, "b n p"]) -> dict[str, Float[Array, "b h w c"]]:
    """{head: images}; channels of a pixel of a patch are [head_0 | head_1 | ...]."""
    b, n, _ = patches.shape
    pixels = patches.reshape(b, n, self.patch**2, len(self.heads), -1)
    return {
      head: unpatchify(pixels[:, :, :, i].reshape(b, n, -1), self.patch, self.image_size[:2])
      for i, head in enumerate(self.heads)
    }

  def represent(
    self,
    images: Float[Array, "b h w c"],
    t: Shaped[Array, "b *n"],
    labels: Int[Array, "b"] | None = None,
  ) -> dict[str, Float[Array, "b _"]]:
    """What the encoder makes of whole images, float32.

    Returns {"class": the mean of the class tokens [B, D], which is the paper's representation;
    "mean": that of the patch tokens [B, D]; "patches": all of them side by side [B, N * D], which
    keeps places apart}.
    """
    labels = jnp.full(len(t), self.num_classes, jnp.int32) if labels is None else labels
    blocks = self.embed_condition(t, labels).blocks
    (x,) = self.encoder([(self.encoder_input(images, None), with_front(blocks, self.class_tokens))])
    rep, tokens = self.pool(x)
    tokens = tokens.astype(jnp.float32)
    return {
      "class": rep,
      "mean": tokens.mean(axis=1),
      "patches": tokens.reshape(len(images), -1),
    }


def kept(cond: Float[Array, "b *n d"], mask: Mask | None) -> Float[Array, "b *k d"]:
  """The condition of the tokens that are kept; unchanged where all tokens share one."""
  return cond if mask is None or cond.ndim == 2 else gather(cond, mask.keep)


def with_front(cond: Float[Array, "b *n d"], tokens: int) -> Float[Array, "b *m d"]:
  """The condition with `tokens` tokens in front, which see the mean of the patches'."""
  if cond.ndim == 2:
    return cond
  front = jnp.broadcast_to(cond.mean(axis=1, keepdims=True), (len(cond), tokens, cond.shape[-1]))
  return jnp.concatenate([front, cond], axis=1)

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
from jaxtyping import Array, Float, Int

from umd.devices.placement import by_batch, join_rows, part_rows
from umd.masks import Mask, gather, num_kept, patchify, scatter
from umd.models.layers.attention import IMPLEMENTATIONS
from umd.models.layers.blocks import CONDITIONS, REMAT, Stack, modulate
from umd.models.layers.embeddings import LabelEmbedding, TimeEmbedding

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


class Input(NamedTuple):
  """What the model is shown of a part of a batch.

  Attributes:
    images: x_t, [B, H, W, C]; only the patches in `mask.keep` are looked at.
    t: timesteps in 0..T, 0 being clean, [B].
    labels: class labels [B], or None for "no label".
    mask: which patches are kept; None keeps all.
  """

  images: Array
  t: Array
  labels: Array | None = None
  mask: Mask | None = None


class Condition(NamedTuple):
  """Timestep and label, [B, D] or what is made of it: for the blocks, and for the head."""

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
    return parse_variant(self.variant)

  @property
  def tokens(self) -> int:
    """N, the number of patches of an image."""
    return self.grid[0] * self.grid[1]

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of patches."""
    patch = self.shape.patch
    return self.image_size[0] // patch, self.image_size[1] // patch

  def keep(self, mask_ratio: float) -> int:
    """K, the number of patches that the encoder sees at `mask_ratio`."""
    return num_kept(self.tokens, mask_ratio)

  def setup(self):
    s, dtype = self.shape, jnp.dtype(self.dtype)
    normal, pos = nn.initializers.normal(0.02), nn.initializers.normal(self.tokens**-0.5)
    how = self.condition, dtype, self.scan, self.remat, self.attention
    stack = lambda depth: Stack(depth, s.heads, *how)
    self.embed = nn.Dense(s.width, dtype=dtype)
    self.pos_embed = self.param("pos_embed", pos, (self.tokens, s.width))
    self.decoder_pos_embed = self.param("decoder_pos_embed", pos, (self.tokens, s.width))
    # Drawn at random: equal tokens without positions of their own would stay equal for ever.
    self.cls = self.param("class_tokens", normal, (self.class_tokens, s.width))
    self.mask_token = self.param("mask_token", normal, (s.width,))
    self.time_embed = TimeEmbedding(s.width)
    if self.num_classes:
      self.label_embed = LabelEmbedding(self.num_classes, s.width)
    self.encoder, self.decoder = stack(s.depth), stack(s.decoder_depth)
    out = len(self.heads) * self.image_size[2] * s.patch**2
    self.head = nn.Dense(out, kernel_init=normal)
    if self.condition == "adaln_shared":
      self.adaln = modulate(s.width, dtype, "adaln")
    if self.condition != "token":
      self.head_adaln = nn.Dense(2 * s.width, kernel_init=nn.initializers.zeros)

  def embed_condition(self, t: Int[Array, "b"], labels: Int[Array, "b"] | None) -> Condition:
    """What timesteps and labels are to the blocks, and to the head."""
    cond = self.time_embed(t)
    if self.num_classes:
      null = jnp.full_like(t, self.num_classes)
      cond = cond + self.label_embed(null if labels is None else labels)
    if self.condition != "token":
      cond = jax.nn.silu(cond)
    shared = self.condition == "adaln_shared"
    return Condition(self.adaln(cond) if shared else cond, cond)

  def show(self, images: Float[Array, "b h w c"], mask: Mask | None) -> Float[Array, "b m d"]:
    """What the encoder reads, [B, M, D]: the class tokens, then the K patches that are kept."""
    patches, pos = patchify(images, self.shape.patch), self.pos_embed[None]
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

  def fill(self, rep: Float[Array, "b d"], x: Float[Array, "b k d"], mask: Mask | None):
    """What the decoder reads, [B, 1 + N, D]: the pooled class tokens, then every patch."""
    if mask is not None:
      x = scatter(x, mask, self.mask_token)
    x = x + self.decoder_pos_embed.astype(x.dtype)
    return jnp.concatenate([rep.astype(x.dtype)[:, None], x], axis=1)

  def decode(self, x: Float[Array, "b m d"], cond: Condition) -> Float[Array, "b n p"]:
    """Patches [B, N, P * P * C of each head], float32, of what `fill` makes."""
    (x,) = self.decoder([(by_batch(x), cond.blocks)])
    x = x[:, 1:].astype(jnp.float32)
    if self.condition != "token":
      shift, scale = jnp.split(self.head_adaln(cond.head)[:, None], 2, axis=-1)
      x = x * (1 + scale) + shift
    return self.head(x)

  def predict(self, inputs: Sequence[Input], groups: int = 1) -> list[dict]:
    """Predicts every head for every patch of several parts of a batch.

    The parts, whose encoder sees sequences of different lengths, go through the decoder together.

    Args:
      inputs: the parts.
      groups: of rows that belong together, see `umd.devices.placement.join_rows`.

    Returns {head: [B, N, P * P * C]}, float32, for each of them.
    """
    counts = [len(part.t) for part in inputs]
    null = lambda part: jnp.full_like(part.t, self.num_classes)
    said = [(p.t, null(p) if p.labels is None else p.labels) for p in inputs]
    cond = self.embed_condition(*join_rows(said, groups))
    conds = part_rows(cond.blocks, counts, groups)
    shown = [self.show(part.images, part.mask) for part in inputs]
    encoded = self.encoder(list(zip(shown, conds, strict=True)))
    filled = [self.fill(*self.pool(x), p.mask) for x, p in zip(encoded, inputs, strict=True)]
    out = self.decode(join_rows(filled, groups), cond)
    return [self.by_head(part) for part in part_rows(out, counts, groups)]

  def by_head(self, x: Float[Array, "b n p"]) -> dict[str, Float[Array, "b n _"]]:
    """The heads apart; channels of a pixel are [head_0 | head_1 | ...]."""
    x = x.reshape(*x.shape[:2], self.shape.patch**2, len(self.heads), -1)
    return {h: x[:, :, :, i].reshape(*x.shape[:2], -1) for i, h in enumerate(self.heads)}

  def represent(
    self,
    images: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    labels: Int[Array, "b"] | None = None,
  ) -> tuple[Float[Array, "b d"], Float[Array, "b n d"]]:
    """What the encoder makes of whole images: (mean of the class tokens, patch tokens)."""
    (x,) = self.encoder([(self.show(images, None), self.embed_condition(t, labels).blocks)])
    return self.pool(x)

  def __call__(
    self,
    images: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    labels: Int[Array, "b"] | None = None,
    mask: Mask | None = None,
  ) -> dict[str, Float[Array, "b n p"]]:
    """Predicts every head for every patch, [B, N, P * P * C]; arguments as in `Input`."""
    return self.predict([Input(images, t, labels, mask)])[0]

"""Transformer blocks of the published networks as choices of one block, and stacks of them."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umd.devices import mesh
from umd.devices.mesh import LAYERS
from umd.models.layers.attention import IMPLEMENTATIONS, attend
from umd.models.layers.positions import NOWHERE, RelativeBias, rotate

# How a block sees the time and the label.
CONDITIONS = {
  "adaln": "AdaLN of its own",  # Peebles & Xie 2023
  "adaln_shared": "AdaLN that all layers share",  # PixArt-alpha: Chen et al. 2024, "adaLN-single"
  "token": "one more token",
}
NORMS = ("layernorm", "rmsnorm")
# What a block's MLP computes between its matrices: GELU in its tanh form (DiT, MDT), the exact GELU
# (MAE, U-ViT), or silu(gate) * hidden (Shazeer 2020).
MLPS = ("gelu_tanh", "gelu_erf", "swiglu")
# The projections of attention that may have a bias.
BIASES = ("q", "k", "v", "out")

_policies = jax.checkpoint_policies
# What the backward pass finds again of a block; it computes the rest once more. None keeps all.
REMAT: Mapping[str, Callable | None] = {
  "none": None,
  "dots": _policies.dots_with_no_batch_dims_saveable,
  "full": _policies.nothing_saveable,
}


class Init(NamedTuple):
  """Initialisers of a block: of q, k and v [D, 3, D], of other matrices, of the MLP's biases."""

  qkv: Callable
  dense: Callable
  mlp_bias: Callable


xavier = nn.initializers.xavier_uniform()
_xavier_qkv = lambda out_axis, batch_axis: nn.initializers.variance_scaling(
  1.0, "fan_avg", "uniform", in_axis=0, out_axis=out_axis, batch_axis=batch_axis
)
_normal, _zeros = nn.initializers.normal(0.02), nn.initializers.zeros
INITS: Mapping[str, Init] = {
  # Xavier's, with q, k and v as three matrices [D, D].
  "xavier": Init(_xavier_qkv(2, 1), xavier, nn.initializers.normal(1e-6)),
  # Xavier's, with q, k and v as one matrix [D, 3 D], so that they start smaller: MAE, DiT, MDT.
  "xavier_fused": Init(_xavier_qkv((1, 2), ()), xavier, _zeros),
  # N(0, .02): U-ViT, MaskDM.
  "normal": Init(_normal, _normal, _zeros),
}


@dataclasses.dataclass(frozen=True)
class BlockDesign:
  """The choices that make a block; a network writes them once. The defaults are UMD's block.

  Attributes:
    heads: number of attention heads.
    condition: how the block sees time and label, key of CONDITIONS, or None for not at all.
    norm: one of NORMS, computed in float32.
    norm_eps: what is added to the variance.
    norm_affine: whether norms have a scale (and a bias) of their own.
    mlp: one of MLPS.
    mlp_ratio: width of the MLP's hidden layer in units of D; "swiglu" takes 2/3 of it, so that its
      three matrices have as many parameters as the two of the others.
    qk_norm: whether queries and keys go through an RMSNorm (Henry et al. 2020).
    rope: whether queries and keys are turned by their places, see `embeddings.rotate`.
    bias_grid: (rows, columns) of patches for a relative position bias, or None for no bias.
    biases: the projections that have a bias, some of BIASES.
    init: key of INITS.
    attention: one of `attention.IMPLEMENTATIONS`.

  Raises:
    ValueError: a value is not among those that are known.
  """

  heads: int
  condition: str | None = "adaln"
  norm: str = "layernorm"
  norm_eps: float = 1e-6
  norm_affine: bool = True
  mlp: str = "gelu_tanh"
  mlp_ratio: float = 4.0
  qk_norm: bool = False
  rope: bool = False
  bias_grid: tuple[int, int] | None = None
  biases: tuple[str, ...] = BIASES
  init: str = "xavier"
  attention: str = "auto"

  def __post_init__(self):
    known = {
      "condition": (*CONDITIONS, None),
      "norm": NORMS,
      "mlp": MLPS,
      "init": INITS,
      "attention": IMPLEMENTATIONS,
    }
    for name, values in known.items():
      if (value := getattr(self, name)) not in values:
        raise ValueError(f"model.{name}={value!r} is not one of {list(values)}.")
    if not set(self.biases) <= set(BIASES):
      raise ValueError(f"model.biases={self.biases} must be some of {BIASES}.")

  @property
  def needs_places(self) -> bool:
    """Whether the block must be told where its tokens are."""
    return self.rope or self.bias_grid is not None


class Norm(nn.Module):
  """LayerNorm or RMSNorm, computed in float32 and returned in the input's dtype."""

  kind: str = "layernorm"
  eps: float = 1e-6
  affine: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    if self.kind == "rmsnorm":
      norm = nn.RMSNorm(epsilon=self.eps, dtype=jnp.float32, use_scale=self.affine, name="norm")
    else:
      norm = nn.LayerNorm(
        epsilon=self.eps,
        dtype=jnp.float32,
        use_scale=self.affine,
        use_bias=self.affine,
        name="norm",
      )
    return norm(x).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head self-attention."""

  design: BlockDesign
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], place: Int[Array, "*b n 2"] | None = None
  ) -> Float[Array, "b n d"]:
    """Lets every token see all; `place` is what `embeddings.places` lists."""
    b, n, width = x.shape
    design, init = self.design, INITS[self.design.init]
    heads, head_dim = design.heads, width // design.heads
    # One [D, 3, D] array for the three matrices [D, D].
    kernel = self.param("qkv_kernel", init.qkv, (width, 3, width), jnp.float32)
    biased = [name for name in "qkv" if name in design.biases]
    if biased:
      bias = self.param("qkv_bias", _zeros, (len(biased), width), jnp.float32)

    # Three products: if there were one, q, k and v would be slices, which TPUs copy before use.
    def project(i: int, name: str):
      y = x @ kernel[:, i].astype(self.dtype)
      if name in biased:
        y = y + bias[biased.index(name)].astype(self.dtype)
      return y.reshape(b, n, heads, head_dim)

    q, k, v = (project(i, name) for i, name in enumerate("qkv"))
    if design.qk_norm:
      # Queries and keys of bounded length keep the logits from growing in long training.
      q = Norm("rmsnorm", design.norm_eps, name="norm_q")(q)
      k = Norm("rmsnorm", design.norm_eps, name="norm_k")(k)
    if design.rope:
      q, k = rotate(q, place), rotate(k, place)
    relative = None
    if design.bias_grid is not None:
      relative = RelativeBias(design.bias_grid, heads, name="relative_bias")(place)
    out = attend(q, k, v, design.attention, relative).reshape(b, n, width)
    return nn.Dense(
      width, "out" in design.biases, kernel_init=init.dense, dtype=self.dtype, name="out"
    )(out)


class MLP(nn.Module):
  """Dense(4D) - GELU - Dense(D), or the gated form of it."""

  design: BlockDesign
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    width, init = x.shape[-1], INITS[self.design.init]
    hidden = int(self.design.mlp_ratio * width)
    dense = lambda features, name: nn.Dense(
      features, kernel_init=init.dense, bias_init=init.mlp_bias, dtype=self.dtype, name=name
    )
    if self.design.mlp == "swiglu":
      hidden = 2 * hidden // 3
      y = nn.silu(dense(hidden, "gate")(x)) * dense(hidden, "hidden")(x)
    else:
      y = nn.gelu(dense(hidden, "hidden")(x), approximate=self.design.mlp == "gelu_tanh")
    return dense(width, "out")(y)


def modulate(width: int, dtype: jnp.dtype, name: str) -> nn.Dense:
  """Makes the layer [..., 6 D] of a block's shifts, scales and gates, which start at zero (DiT)."""
  return nn.Dense(6 * width, kernel_init=_zeros, dtype=dtype, name=name)


class Block(nn.Module):
  """Pre-norm transformer block.

  What the condition is depends on how the block sees it (see CONDITIONS):
  - "adaln" takes [B, D] and computes its own modulation.
  - "adaln_shared" takes the modulation of all layers, [B, 6 D], and adds a table of its own.
  - "token" takes [B, D] as one more token.
  - None takes None.
  AdaLN also takes [B, N, D] or [B, N, 6 D], which modulates every token in its own way: noise may
  then differ from token to token.
  """

  design: BlockDesign
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    cond: Float[Array, "b *n _"] | None = None,
    place: Int[Array, "*b n 2"] | None = None,
  ) -> tuple[Float[Array, "b n d"], None]:
    """Computes the next layer's tokens, and None beside them, as `nn.scan` asks.

    `place` says where the tokens are (see `embeddings.places`), for designs that need it.
    """
    design = self.design
    attention = Attention(design, self.dtype, name="attention")
    mlp = MLP(design, self.dtype, name="mlp")
    norm = lambda name: Norm(design.norm, design.norm_eps, design.norm_affine, name=name)
    norm1, norm2 = norm("norm1"), norm("norm2")
    if design.condition == "token":
      if cond.ndim != 2:
        raise ValueError(
          "model.condition='token' shows a block one time per image, not one per token. "
          "Set it to 'adaln' or 'adaln_shared'."
        )
      x = jnp.concatenate([cond.astype(x.dtype)[:, None], x], axis=1)
      if place is not None:
        around = [(0, 0)] * (place.ndim - 2)
        place = jnp.pad(place, [*around, (1, 0), (0, 0)], constant_values=NOWHERE)
    if design.condition in ("token", None):
      x = x + attention(norm1(x), place)
      x = x + mlp(norm2(x))
      return x[:, 1:] if design.condition == "token" else x, None
    if design.condition == "adaln":
      modulation = modulate(x.shape[-1], self.dtype, "adaln")(cond)
    else:
      table = self.param("adaln_table", _zeros, (6 * x.shape[-1],), jnp.float32)
      modulation = cond + table.astype(self.dtype)
    if modulation.ndim == 2:
      modulation = modulation[:, None]  # All tokens of an image share it.
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
    x = x + gate1 * attention(norm1(x) * (1 + scale1) + shift1, place)
    x = x + gate2 * mlp(norm2(x) * (1 + scale2) + shift2)
    return x, None


class Merge(nn.Module):
  """Dense(D) of [x | skip]: what a block reads that is given an earlier output (U-ViT, MDT v2)."""

  design: BlockDesign
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"]):
    """Computes the block's input, and None beside it, as `nn.scan` asks."""
    dense = nn.Dense(
      x.shape[-1], kernel_init=INITS[self.design.init].dense, dtype=self.dtype, name="dense"
    )
    return dense(jnp.concatenate([x, skip], axis=-1)), None


class Merges(nn.Module):
  """Keeps the parameters of `count` merges, stacked as those of blocks are."""

  count: int
  design: BlockDesign
  dtype: jnp.dtype

  def setup(self):
    self.blocks = _stacked(Merge, self.count)(self.design, self.dtype)

  def __call__(self, x: Array, skip: Array) -> Array:
    return self.blocks(x, skip)[0]


def _stacked(module, depth: int):
  """Makes a module of `depth` layers, whose parameters are [depth, ...]."""
  settings = dict(variable_axes={"params": 0}, split_rngs={"params": True})
  return nn.scan(module, **settings, in_axes=nn.broadcast, length=depth)


def _in_dtype(params: dict, dtype: jnp.dtype) -> dict:
  """Casts a block's parameters to the type that it computes in, but for those of its norms.

  This is done once for all parts of a batch: their gradients are then summed before devices
  exchange them, and parameters that are kept in parts are sent in that type.
  """
  is_norm = lambda path: any(key.key.startswith("norm") for key in path)
  cast = lambda path, x: x if is_norm(path) else x.astype(dtype)
  return jax.tree_util.tree_map_with_path(cast, params)


class Part(NamedTuple):
  """What a stack is shown of a part of a batch.

  Attributes:
    x: tokens [B, N, D].
    cond: the condition, see `Block`.
    place: where the tokens are, see `embeddings.places`, for designs that need it.
    skip: [B, N, D], what every block is given besides its input, if `Stack.skip` is "given".
  """

  x: Array
  cond: Array | None = None
  place: Array | None = None
  skip: Array | None = None


class Stack(nn.Module):
  """`depth` blocks and, unless `last_norm` is False, a norm after them.

  Parameters are stacked over the layers, [depth, ...], whether the layers run in a loop
  (`scan=True`: compiles faster, smaller program) or unrolled (`scan=False`: trains faster on
  accelerators), so a checkpoint serves both.

  Attributes:
    depth: number of layers.
    design: the choices that make the blocks.
    dtype: of the computation.
    scan: whether the layers run as a loop.
    remat: what the backward pass computes again, key of REMAT.
    skip: what blocks are given besides their input. "none" is nothing. "long" gives the blocks of
      the second half the outputs of the first half, last in first out, as in U-ViT and MDT v2; an
      odd depth has a middle layer that neither gives nor takes. "given" gives every block the
      array `Part.skip`, as in the decoder of MDT v2.
    last_norm: whether a norm follows the last block.
  """

  depth: int
  design: BlockDesign
  dtype: jnp.dtype
  scan: bool = False
  remat: str = "none"
  skip: str = "none"
  last_norm: bool = True

  @property
  def merges(self) -> int:
    """How many of the blocks, the last ones, are given a skip."""
    return {"none": 0, "long": self.depth // 2, "given": self.depth}[self.skip]

  def setup(self):
    design = self.design
    # These keep the parameters; `run` computes with them.
    self.blocks = _stacked(Block, self.depth)(design, self.dtype)
    if self.merges:
      self.skips = Merges(self.merges, design, self.dtype)
    if self.last_norm:
      self.norm = Norm(design.norm, design.norm_eps, design.norm_affine)

  def __call__(self, parts: Sequence[tuple]) -> list[Float[Array, "b n d"]]:
    """Takes each part, a `Part` or a tuple like it, through all layers.

    Parts may differ in B and N. Layer by layer they go together, so that one gathering of its
    parameters serves all.

    Raises:
      ValueError: the design needs the places of tokens, and a part has none.
    """
    parts = [Part(*part) for part in parts]
    if self.design.needs_places and any(part.place is None for part in parts):
      raise ValueError(
        "model.rope and model.bias_grid need the places of all tokens. Give each part its `place`."
      )
    xs = (
      self._create(parts) if self.is_initializing() else self.run(self.variables["params"], parts)
    )
    return [self.norm(x) for x in xs] if self.last_norm else list(xs)

  def _create(self, parts: Sequence[Part]) -> list[Array]:
    """Makes the parameters; of the outputs only the shapes are right."""
    xs = [self.blocks(part.x, part.cond, part.place)[0] for part in parts]
    return [self.skips(x, x) for x in xs] if self.merges else xs

  def run(
    self, params: dict, parts: Sequence[Part], scope: Callable = contextlib.nullcontext
  ) -> Sequence[Array]:
    """Takes the parts through the blocks, one after the other, without the last norm.

    Args:
      params: the stack's parameters.
      parts: see `Part`.
      scope: `scope(i)` is the context in which layer i is traced where layers are unrolled.
    """
    block = Block(self.design, self.dtype, parent=None)
    merge = Merge(self.design, self.dtype, parent=None)
    whole = lambda params: mesh.gathered(_in_dtype(params, self.dtype))

    given = [part.skip for part in parts]

    def layer(xs, params, merging=None, skips=given):
      params = whole(params)
      if merging is not None:
        merging = whole(merging)
        xs = [
          merge.apply({"params": merging}, x, skip)[0] for x, skip in zip(xs, skips, strict=True)
        ]
      outputs = [
        block.apply({"params": params}, x, part.cond, part.place)[0]
        for x, part in zip(xs, parts, strict=True)
      ]
      return mesh.by_batch(tuple(outputs))

    if policy := REMAT[self.remat]:
      layer = jax.checkpoint(layer, policy=policy, prevent_cse=not self.scan)
    blocks, merges = params[LAYERS], params["skips"][LAYERS] if self.merges else None
    if self.scan:
      return self._looped(layer, parts, blocks, merges)
    return self._unrolled(layer, parts, blocks, merges, scope)

  def _looped(self, layer: Callable, parts: Sequence[Part], blocks, merges) -> Sequence[Array]:
    xs = tuple(part.x for part in parts)
    step = lambda xs, params: (layer(xs, *params), None)
    if self.skip != "long":
      return jax.lax.scan(step, xs, (blocks, merges))[0]
    cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], blocks)
    n, second = self.merges, self.depth - self.merges

    def first_half(xs, params):
      xs = layer(xs, params)
      return xs, xs

    xs, waiting = jax.lax.scan(first_half, xs, cut(0, n))
    for i in range(n, second):  # The middle layer of an odd depth.
      xs = layer(xs, jax.tree.map(lambda leaf, i=i: leaf[i], blocks))
    last_in_first_out = jax.tree.map(lambda x: x[::-1], waiting)
    return jax.lax.scan(step, xs, (cut(second, None), merges, last_in_first_out))[0]

  def _unrolled(
    self, layer: Callable, parts: Sequence[Part], blocks, merges, scope: Callable
  ) -> Sequence[Array]:
    xs = tuple(part.x for part in parts)
    blocks, merges = _layers(blocks, self.depth), _layers(merges, self.merges)
    waiting = []
    for i, params in enumerate(blocks):
      merged = i - (self.depth - self.merges)  # The number of this block's merge, if it has one.
      with scope(i):
        if merged < 0:
          xs = layer(xs, params)
        elif self.skip == "given":
          xs = layer(xs, params, merges[merged])
        else:
          xs = layer(xs, params, merges[merged], waiting.pop())
      if self.skip == "long" and i < self.merges:
        waiting.append(xs)
    return xs


def _layers(params, depth: int) -> list:
  """Takes stacked parameters apart, layer by layer.

  All are cut at once, so that the gradient is put together at once, too, instead of added up.
  """
  leaves, structure = jax.tree.flatten(params)
  pieces = [jax.lax.split(leaf, [1] * depth) for leaf in leaves]
  return [jax.tree.unflatten(structure, [piece[i][0] for piece in pieces]) for i in range(depth)]

"""Transformer blocks with AdaLN or a conditioning token, and stacks of them."""

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from umd.devices import placement
from umd.devices.placement import LAYERS
from umd.models.layers.attention import attend

# How a block sees the timestep and the label.
CONDITIONS = {
  "adaln": "AdaLN of its own",  # Peebles & Xie 2023
  "adaln_shared": "AdaLN that all layers share",  # PixArt-alpha: Chen et al. 2024, "adaLN-single"
  "token": "one more token",
}
_policies = jax.checkpoint_policies
# What the backward pass finds again of a block; the rest it computes again. None: all is kept.
REMAT: Mapping[str, Callable | None] = {
  "none": None,
  "dots": _policies.dots_with_no_batch_dims_saveable,
  "full": _policies.nothing_saveable,
}

xavier = nn.initializers.xavier_uniform()


class LayerNorm(nn.Module):
  """LayerNorm with its own scale and bias, computed in float32, returned in the input's dtype."""

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(x).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head self-attention; `implementation` is one of `attention.IMPLEMENTATIONS`."""

  heads: int
  dtype: jnp.dtype
  implementation: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    b, n, width = x.shape
    # One [D, 3, D] matrix, initialised as the three [D, D] matrices it stands for.
    init = nn.initializers.variance_scaling(
      1.0, "fan_avg", "uniform", in_axis=0, out_axis=2, batch_axis=1
    )
    kernel = self.param("qkv_kernel", init, (width, 3, width), jnp.float32)
    bias = self.param("qkv_bias", nn.initializers.zeros, (3, width), jnp.float32)
    # Three products: of one, q, k and v would be slices, which TPUs copy before they use them.
    q, k, v = (
      (x @ kernel[:, i].astype(self.dtype) + bias[i].astype(self.dtype)).reshape(
        b, n, self.heads, width // self.heads
      )
      for i in range(3)
    )
    out = attend(q, k, v, self.implementation).reshape(b, n, width)
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


def modulate(width: int, dtype: jnp.dtype, name: str) -> nn.Dense:
  """Shifts, scales and gates of a block, [B, 6 D] from [B, D], zero at first (AdaLN-zero, DiT)."""
  return nn.Dense(6 * width, kernel_init=nn.initializers.zeros, dtype=dtype, name=name)


class Block(nn.Module):
  """Pre-LN transformer block that sees the condition in one of three ways, see CONDITIONS.

  "adaln" takes [B, D] and computes its own modulation; "adaln_shared" takes the one of all layers,
  [B, 6 D], and adds a table of its own; "token" takes [B, D] as one more token.
  """

  heads: int
  condition: str
  dtype: jnp.dtype
  attention: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], cond: Float[Array, "b _"]):
    attention = Attention(self.heads, self.dtype, self.attention, name="attention")
    mlp = MLP(self.dtype, name="mlp")
    norm1, norm2 = LayerNorm(name="norm1"), LayerNorm(name="norm2")
    if self.condition == "token":
      x = jnp.concatenate([cond.astype(x.dtype)[:, None], x], axis=1)
      x = x + attention(norm1(x))
      x = x + mlp(norm2(x))
      return x[:, 1:], None
    if self.condition == "adaln":
      modulation = modulate(x.shape[-1], self.dtype, "adaln")(cond)
    else:
      table = self.param("adaln_table", nn.initializers.zeros, (6 * x.shape[-1],), jnp.float32)
      modulation = cond + table.astype(self.dtype)
    parts = jnp.split(modulation[:, None], 6, axis=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    x = x + gate1 * attention(norm1(x) * (1 + scale1) + shift1)
    x = x + gate2 * mlp(norm2(x) * (1 + scale2) + shift2)
    return x, None


def _in_dtype(params: dict, dtype: jnp.dtype) -> dict:
  """A block's parameters in the type that it computes in, but for its norms'.

  Once for all parts that go through it: their gradients are then summed before devices exchange
  them, and parameters that are kept in parts are sent in that type.
  """
  cast = lambda x: x.astype(dtype)
  return {
    name: leaves if name.startswith("norm") else jax.tree.map(cast, leaves)
    for name, leaves in params.items()
  }


class Stack(nn.Module):
  """`depth` blocks and a final LayerNorm.

  Parameters are stacked over the layers, [depth, ...], whether the layers run in a loop
  (`scan=True`: compiles faster, smaller program) or unrolled (`scan=False`: trains faster on
  accelerators), so a checkpoint serves both.

  Attributes:
    depth, heads: numbers of layers, and of attention heads.
    condition: key of CONDITIONS.
    dtype: of the computation.
    scan: run the layers as a loop.
    remat: key of REMAT, what the backward pass computes again.
    attention: one of `attention.IMPLEMENTATIONS`.
  """

  depth: int
  heads: int
  condition: str
  dtype: jnp.dtype
  scan: bool = False
  remat: str = "none"
  attention: str = "auto"

  def setup(self):
    settings = dict(variable_axes={"params": 0}, split_rngs={"params": True})
    layers = nn.scan(Block, **settings, in_axes=nn.broadcast, length=self.depth)
    self.blocks = layers(*self.block)  # Keeps the parameters; `run` computes with them.
    self.norm = LayerNorm()

  @property
  def block(self) -> tuple:
    """Attributes of each block."""
    return self.heads, self.condition, self.dtype, self.attention

  def __call__(self, parts: Sequence[tuple[Array, Array]]) -> list[Float[Array, "b n d"]]:
    """Each part, tokens [B, N, D] and condition [B, _], after all layers.

    Parts may differ in B and N. Layer by layer they go together, so that one gathering of its
    parameters serves all.
    """
    if self.is_initializing():
      return [self.norm(self.blocks(*part)[0]) for part in parts]
    return [self.norm(x) for x in self.run(self.variables["params"][LAYERS], parts)]

  def run(self, layers: dict, parts: Sequence[tuple[Array, Array]]) -> tuple[Array, ...]:
    """The blocks one after the other; layers [depth, ...] are their parameters."""
    block, (xs, conds) = Block(*self.block, parent=None), zip(*parts, strict=True)

    def layer(xs, params):
      params = placement.gathered(_in_dtype(params, self.dtype))
      one = lambda x, cond: block.apply({"params": params}, x, cond)[0]
      return placement.by_batch(tuple(map(one, xs, conds)))

    if policy := REMAT[self.remat]:
      layer = jax.checkpoint(layer, policy=policy, prevent_cse=not self.scan)
    if self.scan:
      return jax.lax.scan(lambda xs, params: (layer(xs, params), None), xs, layers)[0]
    # Cut all at once: the gradient is put together at once, too, instead of added up.
    cut = lambda leaf: jax.lax.split(leaf, [1] * self.depth)
    apart = [cut(leaf) for leaf in jax.tree.leaves(layers)]
    for i in range(self.depth):
      own = jax.tree.unflatten(jax.tree.structure(layers), [pieces[i][0] for pieces in apart])
      xs = layer(xs, own)
    return xs

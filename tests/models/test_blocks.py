"""Blocks against official outputs and formulas; stacks with skips, places and times per token.

`golden/official_blocks.npz` holds weights, inputs and outputs of the official MDT v2 (its encoder:
two blocks, and two with long skips, whole and masked) and MAE (its last block and the norm after).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umd.models.autoencoder import TimeEmbedding
from umd.models.layers.blocks import Block, BlockDesign, Merge, Stack
from umd.models.layers.positions import RelativeBias, places, rotate

OFFICIAL = np.load(Path(__file__).resolve().parents[1] / "golden/official_blocks.npz")
FLOAT32 = jnp.dtype("float32")
RNG = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def random_like(params):
  """Random values for all parameters: AdaLN that starts at zero would hide the condition."""
  draw = lambda path, leaf: 0.3 * normal(*leaf.shape) + (path[-1].key == "scale")
  return jax.tree_util.tree_map_with_path(draw, params)


def dense(prefix):
  return {"kernel": OFFICIAL[f"{prefix}.weight"].T, "bias": OFFICIAL[f"{prefix}.bias"]}


def norm(prefix):
  return {"norm": {"scale": OFFICIAL[f"{prefix}.weight"], "bias": OFFICIAL[f"{prefix}.bias"]}}


def official_block(prefix):
  """A block's weights as our parameters."""
  weight = OFFICIAL[f"{prefix}.attn.qkv.weight"]
  width = weight.shape[1]
  attention = {
    "qkv_kernel": weight.reshape(3, width, width).transpose(2, 0, 1),
    "qkv_bias": OFFICIAL[f"{prefix}.attn.qkv.bias"].reshape(3, width),
    "out": dense(f"{prefix}.attn.proj"),
  }
  mlp = {"hidden": dense(f"{prefix}.mlp.fc1"), "out": dense(f"{prefix}.mlp.fc2")}
  return {"attention": attention, "mlp": mlp}


def official_mdt_block(prefix):
  block = official_block(prefix)
  table = OFFICIAL[f"{prefix}.attn.rel_pos_bias.relative_position_bias_table"]
  block["attention"]["relative_bias"] = {"table": table[:-3]}  # The last three are never read.
  return {**block, "adaln": dense(f"{prefix}.adaLN_modulation.1")}


@pytest.mark.parametrize("masked", [False, True])
def test_long_skips_and_relative_bias_are_mdts(masked):
  names = [f"mdt/en_{half}blocks.{i}" for half in ("in", "out") for i in range(2)]
  stack_up = lambda *layers: jax.tree.map(lambda *x: np.stack(x), *layers)
  params = {
    "blocks": stack_up(*map(official_mdt_block, names)),
    "skips": {"blocks": {"dense": stack_up(*(dense(f"{n}.skip_linear") for n in names[2:]))}},
  }
  design = BlockDesign(3, norm_affine=False, bias_grid=(4, 4), init="xavier_fused")
  stack = Stack(4, design, FLOAT32, skip="long", last_norm=False)
  x, keep = jnp.asarray(OFFICIAL["mdt/x"]), jnp.asarray(OFFICIAL["mdt/keep"])
  place = places((4, 4), keep if masked else None)
  if masked:
    x = jnp.take_along_axis(x, keep[:, :, None], axis=1)
  cond = jax.nn.silu(jnp.asarray(OFFICIAL["mdt/c"]))
  (out,) = jax.jit(stack.apply)({"params": params}, [(x, cond, place)])
  np.testing.assert_allclose(out, OFFICIAL["mdt/masked" if masked else "mdt/full"], atol=2e-5)
  # The parameters that we make have these shapes.
  made = jax.eval_shape(stack.init, jax.random.key(0), [(x, cond, place)])["params"]
  assert jax.tree.map(np.shape, params) == jax.tree.map(jnp.shape, made)


def test_without_condition_and_with_the_exact_gelu_a_block_is_maes():
  block = official_block("mae/blocks.3")
  block |= {name: norm(f"mae/blocks.3.{name}") for name in ("norm1", "norm2")}
  params = {"blocks": jax.tree.map(lambda x: x[None], block), "norm": norm("mae/norm")}
  stack = Stack(1, BlockDesign(2, None, mlp="gelu_erf"), FLOAT32)
  (out,) = jax.jit(stack.apply)({"params": params}, [(jnp.asarray(OFFICIAL["mae/x"]),)])
  np.testing.assert_allclose(out, OFFICIAL["mae/out"], atol=2e-5)


def test_a_block_of_jit_is_its_formula():
  """RMSNorm, QK-norm, rotary places and SwiGLU, written out for one image and head by head."""
  design = BlockDesign(
    2, None, norm="rmsnorm", mlp="swiglu", qk_norm=True, rope=True, biases=("v",), mlp_ratio=3.0
  )
  block, x, place = Block(design, FLOAT32), normal(1, 7, 16), places((2, 3), front=1)
  params = random_like(block.init(jax.random.key(0), x, None, place)["params"])
  found = np.asarray(block.apply({"params": params}, x, None, place)[0])[0]

  p, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x[0]))
  rms = lambda y, scale: y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) * scale
  turned_by = np.maximum(np.asarray(place), 0)  # [tokens, (row, column)]

  def turn(y):  # [tokens, 8]: two pairs by row, two by column, as complex numbers
    angles = (turned_by[:, :, None] * [1.0, 1e-2]).reshape(len(y), 4)
    z = (y[:, 0::2] + 1j * y[:, 1::2]) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], axis=-1).reshape(y.shape)

  y, heads, attention = rms(x, p["norm1"]["norm"]["scale"]), [], p["attention"]
  q, k, v = (y @ attention["qkv_kernel"][:, i] for i in range(3))
  v = v + attention["qkv_bias"][0]
  for one in (slice(0, 8), slice(8, 16)):
    query = turn(rms(q[:, one], attention["norm_q"]["norm"]["scale"]))
    key = turn(rms(k[:, one], attention["norm_k"]["norm"]["scale"]))
    weights = np.exp(query @ key.T / np.sqrt(8))
    heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, one])
  x = x + np.concatenate(heads, axis=1) @ attention["out"]["kernel"]
  y, mlp = rms(x, p["norm2"]["norm"]["scale"]), p["mlp"]
  layer = lambda name, y: y @ mlp[name]["kernel"] + mlp[name]["bias"]
  gate = layer("gate", y)
  expected = x + layer("out", gate / (1 + np.exp(-gate)) * layer("hidden", y))
  assert mlp["hidden"]["kernel"].shape == (16, 32) and "bias" not in attention["out"]
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rotary_products_depend_on_the_offset_alone():
  x = normal(1, 12, 2, 8)
  place = places((3, 4))
  products = lambda place: jnp.einsum("bqhd,bkhd->bhqk", rotate(x, place), rotate(x, place))
  np.testing.assert_allclose(products(place), products(place + jnp.array([5, 2])), atol=1e-4)
  assert np.abs(products(place) - products(place * 2)).max() > 0.1
  np.testing.assert_array_equal(rotate(x, jnp.full((12, 2), -1)), x)


def test_a_token_without_a_place_has_no_relative_bias():
  bias, place = RelativeBias((2, 3), 2), places((2, 3), jnp.array([[4, 0], [1, 5]]), front=1)
  params = random_like(bias.init(jax.random.key(0), place))
  found = np.asarray(bias.apply(params, place))
  assert found.shape == (2, 2, 3, 3)
  assert not found[:, :, 0].any() and not found[:, :, :, 0].any() and found[:, :, 1:, 1:].all()


# Stacks


def by_hand(stack, params, x, cond, given=None):
  """What a stack computes, one block after the other."""
  waiting, skips = [], stack.depth // 2 if given is None else stack.depth
  layer = lambda tree, i: {"params": jax.tree.map(lambda leaf: leaf[i], tree)}
  for i in range(stack.depth):
    if (merge := i - (stack.depth - skips)) >= 0:
      skip = waiting.pop() if given is None else given
      x = Merge(stack.design, FLOAT32).apply(layer(params["skips"]["blocks"], merge), x, skip)[0]
    x = Block(stack.design, FLOAT32).apply(layer(params["blocks"], i), x, cond)[0]
    if i < skips:
      waiting.append(x)
  return x


@pytest.mark.parametrize("depth, skip", [(5, "long"), (2, "given")])
def test_skips_reach_their_blocks_unrolled_and_in_a_loop(depth, skip):
  design = BlockDesign(2, "adaln_shared", init="normal")
  stack = Stack(depth, design, FLOAT32, skip=skip, last_norm=False)
  x, cond, given = normal(2, 5, 8), normal(2, 48), normal(2, 5, 8) if skip == "given" else None
  part = (x, cond, None, given)
  params = random_like(jax.jit(stack.init)(jax.random.key(0), [part])["params"])

  def with_gradient(run):
    def loss(params):
      out = run(params)
      return jnp.square(out).mean(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return out, gradient

  expected = with_gradient(lambda params: by_hand(stack, params, x, cond, given))
  for scan, remat in [(False, "none"), (True, "dots")]:
    other = stack.clone(scan=scan, remat=remat)
    found = with_gradient(lambda params, other=other: other.apply({"params": params}, [part])[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-3), found, expected)


@pytest.mark.parametrize("condition", ["adaln", "adaln_shared"])
def test_one_condition_for_all_tokens_is_that_of_their_image(condition):
  stack = Stack(1, BlockDesign(2, condition), FLOAT32)
  x, cond = normal(2, 5, 8), normal(2, 8 if condition == "adaln" else 48)
  params = random_like(jax.jit(stack.init)(jax.random.key(0), [(x, cond)]))

  def run(cond):
    loss = lambda params, x: jnp.square(stack.apply(params, [(x, cond)])[0]).mean()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

  by_token = jnp.broadcast_to(cond[:, None], (2, 5, cond.shape[-1]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), run(by_token), run(cond))
  apply = jax.jit(lambda cond: stack.apply(params, [(x, cond)])[0])
  differs = np.abs(apply(by_token.at[0, 3].add(1.0)) - apply(by_token)).max(axis=-1)
  assert differs[0, 3] > differs[0, :3].max() > 0 and not differs[1].any()


def test_times_of_any_shape_are_embedded_alike():
  t = jnp.array([[0, 3, 999], [1000, 500, 3]])
  embedding = TimeEmbedding(16)
  params = embedding.init(jax.random.key(0), t)
  one_by_one = jnp.stack([embedding.apply(params, row) for row in t])
  np.testing.assert_array_equal(embedding.apply(params, t), one_by_one)


def test_fused_initialisation_is_smaller_and_normal_is_normal():
  spread = {}
  for init in ("xavier", "xavier_fused", "normal"):
    block = Block(BlockDesign(2, None, init=init), FLOAT32)
    params = jax.jit(block.init)(jax.random.key(0), jnp.zeros((1, 2, 96)))["params"]
    spread[init] = float(params["attention"]["qkv_kernel"].std())
  # A uniform distribution up to sqrt(6 / (inputs + outputs)) has this deviation.
  uniform = lambda ins, outs: (2 / (ins + outs)) ** 0.5
  expected = {"xavier": uniform(96, 96), "xavier_fused": uniform(96, 288), "normal": 0.02}
  assert spread == pytest.approx(expected, rel=0.02)


def test_designs_and_parts_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match=r"model\.mlp='relu' is not one of \['gelu_tanh'"):
    BlockDesign(2, mlp="relu")
  with pytest.raises(ValueError, match=r"model\.biases=\('w',\) must be some of"):
    BlockDesign(2, biases=("w",))
  stack = Stack(1, BlockDesign(2, rope=True), FLOAT32)
  with pytest.raises(ValueError, match="Give each part its `place`"):
    stack.init(jax.random.key(0), [(normal(1, 3, 8), normal(1, 8))])
  stack = Stack(1, BlockDesign(2, "token"), FLOAT32)
  with pytest.raises(ValueError, match="one time per image"):
    stack.init(jax.random.key(0), [(normal(1, 3, 8), normal(1, 3, 8))])

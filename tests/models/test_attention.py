"""Attention: every implementation against the formula, and which of them runs where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AxisType, Mesh, NamedSharding, PartitionSpec

from umd.models.layers import attention, attention_tpu
from umd.models.layers.attention import attend, choose, current_platform
from umd.models.layers.attention_tpu import kernel_attention
from umd.models.layers.blocks import Attention, BlockDesign, Stack

TPU = AbstractDevice("TPU v5 lite", 1, "tpu")
interpreted = functools.partial(kernel_attention, interpret=True)


def draw(shape, dtype=jnp.float32, arrays=4, scale=1.0):
  """q, k, v and a gradient of the output."""
  rng = np.random.default_rng(0)
  return [jnp.asarray(scale * rng.standard_normal(shape), dtype) for _ in range(arrays)]


def formula(q, k, v, d_out, bias=None):
  """Attention and its gradients by the book, one head at a time, float64.

  The last gradient, with a bias [H, N, N] or [B, H, N, N], is that of the bias.
  """
  out, d_q, d_k, d_v = (np.zeros(q.shape) for _ in range(4))
  batch, tokens, heads, head_dim = q.shape
  shape = (batch, heads, tokens, tokens)
  biases = np.broadcast_to(0 if bias is None else np.asarray(bias, np.float64), shape)
  d_bias = np.zeros(shape)
  for b, h in np.ndindex(batch, heads):
    one, two, three, up = (np.asarray(x[b, :, h], np.float64) for x in (q, k, v, d_out))
    logits = one @ two.T / np.sqrt(head_dim) + biases[b, h]
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    d_weights = up @ three.T
    mean = (d_weights * weights).sum(axis=1, keepdims=True)
    d_bias[b, h] = weights * (d_weights - mean)
    out[b, :, h], d_v[b, :, h] = weights @ three, weights.T @ up
    d_q[b, :, h] = d_bias[b, h] @ two / np.sqrt(head_dim)
    d_k[b, :, h] = d_bias[b, h].T @ one / np.sqrt(head_dim)
  found = [out, d_q, d_k, d_v]
  return found if bias is None else [*found, d_bias.sum(axis=0) if bias.ndim == 3 else d_bias]


def with_gradients(function, q, k, v, d_out, *bias):
  def run(d_out, *inputs):
    out, pullback = jax.vjp(function, *inputs)
    return out, *pullback(d_out)

  return jax.jit(run)(d_out, q, k, v, *bias)


def assert_close(found, expected, tolerance):
  """Relative to the largest element: sums of many terms are rounded like their largest."""
  for x, y in zip(found, expected, strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max()  # False where x is not finite


TOLERANCE = {jnp.float32: 3e-6, jnp.bfloat16: 2e-2}
PLAIN = [attention.plain_attention, attention.plain_attention_on_cpu]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("function", PLAIN)
def test_plain_attention_is_the_formula(function, dtype):
  arrays = draw((2, 13, 3, 16), dtype, scale=2)
  found = with_gradients(function, *arrays)
  assert {x.dtype for x in found} == {jnp.dtype(dtype)}
  assert_close(found, formula(*arrays), TOLERANCE[dtype])


@pytest.fixture
def emulated_cudnn(monkeypatch):
  """cuDNN's call, computed by JAX."""
  plain = jax.nn.dot_product_attention
  emulated = lambda *x, implementation, **lengths: plain(*x, implementation="xla", **lengths)
  monkeypatch.setattr(jax.nn, "dot_product_attention", emulated)
  return attention.cudnn_attention


def test_the_token_that_cudnn_is_given_more_has_no_weight(emulated_cudnn):
  for tokens in (8, 9):
    arrays = draw((2, tokens, 2, 16))
    found = with_gradients(emulated_cudnn, *arrays)
    assert_close(found, formula(*arrays), TOLERANCE[jnp.float32])


@pytest.mark.parametrize("each_image", [False, True], ids=["one bias", "one for each image"])
@pytest.mark.parametrize("name", ["plain", "plain on CPU", "cuDNN", "cuDNN at an odd length"])
def test_a_bias_is_added_to_the_scaled_logits(emulated_cudnn, name, each_image):
  functions = dict(zip(["plain", "plain on CPU"], PLAIN, strict=True))
  tokens = 7 if "odd" in name else 8
  (bias,) = draw((2, 3, tokens, tokens) if each_image else (3, tokens, tokens), arrays=1)
  arrays = [*draw((2, tokens, 3, 16)), bias]
  found = with_gradients(functions.get(name, emulated_cudnn), *arrays)
  assert_close(found, formula(*arrays), TOLERANCE[jnp.float32])


@pytest.mark.parametrize("function", [*PLAIN, interpreted])
def test_large_logits_do_not_overflow(function):
  arrays = draw((1, 9, 1, 16), scale=30)  # one key has all the weight
  found = with_gradients(function, *arrays)
  assert_close(found[:1], formula(*arrays)[:1], 1e-4)
  assert all(np.isfinite(x).all() for x in found)


CASES = {  # B, N, H, Dh
  "a tile and a row; heads in pairs": ((2, 17, 4, 64), jnp.bfloat16),
  "half a pair: lanes hang over too": ((2, 20, 3, 64), jnp.float32),
  "whole tiles, eight heads a block": ((3, 32, 8, 16), jnp.float32),
  "a head that fills its block": ((1, 24, 2, 128), jnp.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_formula(name):
  shape, dtype = CASES[name]
  arrays = draw(shape, dtype, scale=2)
  found = with_gradients(interpreted, *arrays)
  assert {x.dtype for x in found} == {jnp.dtype(dtype)}
  assert_close(found, formula(*arrays), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [68, 257, 512])
def test_the_kernel_is_the_formula_at_the_lengths_of_models(tokens, dtype):
  arrays = draw((2, tokens, 3, 64), dtype, scale=2)
  assert_close(with_gradients(interpreted, *arrays), formula(*arrays), TOLERANCE[dtype])


def test_what_lies_beyond_the_end_is_garbage_and_does_not_leak(monkeypatch):
  arrays = draw((2, 20, 3, 64))
  assert all(np.isfinite(x).all() for x in with_gradients(interpreted, *arrays))
  monkeypatch.setattr(attention_tpu, "_clean", lambda x, tokens, lanes: x)
  assert not all(np.isfinite(x).all() for x in with_gradients(interpreted, *arrays))


@pytest.mark.parametrize("shape", [(1, 513, 2, 64), (1, 16, 4, 24), (1, 16, 2, 4), (1, 16, 1, 192)])
def test_the_kernel_says_what_it_does_not_take(shape):
  with pytest.raises(ValueError, match=r"model\.attention='xla'"):
    interpreted(*draw(shape, arrays=3))


# Which implementation runs

DECODER = (8, 260, 12, 64)


def shape_of(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def mesh_of(devices, device=None):
  """Axes ("data", "fsdp") over so many of the CPU's devices, said to be of another kind."""
  devices = np.asarray(jax.devices()[:devices]).reshape(-1, 1)
  mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  return mesh, mesh.abstract_mesh.update(abstract_device=device) if device else mesh.abstract_mesh


def test_unknown_implementations_are_refused():
  with pytest.raises(ValueError, match=r"model\.attention='flash' is not one of \['auto'"):
    choose(DECODER, jnp.bfloat16, "flash")


@pytest.mark.parametrize("name, needs", [("cudnn", "GPU"), ("pallas", "TPU")])
def test_what_the_platform_has_not_got_is_refused(name, needs):
  message = rf"model\.attention='{name}' needs a {needs}, and this program is for cpu\."
  with pytest.raises(ValueError, match=message):
    attend(*draw((1, 4, 2, 8), arrays=3), name)
  with pytest.raises(ValueError, match=message):
    Attention(BlockDesign(2, attention=name), jnp.dtype("float32")).init(
      jax.random.key(0), jnp.zeros((1, 4, 16))
    )


def test_the_platform_is_the_meshs_or_the_default_devices():
  assert current_platform() == "cpu"
  with jax.sharding.use_abstract_mesh(mesh_of(4, TPU)[1]):
    assert current_platform() == "tpu"
  with jax.sharding.use_abstract_mesh(mesh_of(4, AbstractDevice("NVIDIA H100", 132, "cuda"))[1]):
    assert current_platform() == "gpu"
  with jax.set_mesh(mesh_of(4)[0]):
    assert current_platform() == "cpu"
  with jax.default_device(jax.devices("cpu")[1]):
    assert current_platform() == "cpu"


@pytest.mark.parametrize(
  "shape, dtype, asked, chosen",
  [
    (DECODER, jnp.bfloat16, "auto", "pallas"),
    (DECODER, jnp.bfloat16, "xla", "xla"),
    (DECODER, jnp.float32, "auto", "xla"),
    (DECODER, jnp.float32, "pallas", "pallas"),
    ((8, 20, 12, 64), jnp.bfloat16, "auto", "xla"),
    ((8, 1028, 12, 64), jnp.bfloat16, "pallas", "xla"),
    ((8, 260, 4, 24), jnp.bfloat16, "pallas", "xla"),
    ((6, 260, 12, 64), jnp.bfloat16, "pallas", "xla"),  # rows that four devices do not share
  ],
)
def test_choice_on_tpu(shape, dtype, asked, chosen):
  with jax.sharding.use_abstract_mesh(mesh_of(4, TPU)[1]):
    assert choose(shape, dtype, asked) == chosen


def test_old_tpus_and_biases_get_what_the_compiler_makes():
  with jax.sharding.use_abstract_mesh(mesh_of(4, AbstractDevice("TPU v3", 1, "tpu"))[1]):
    assert choose(DECODER, jnp.bfloat16, "pallas") == "xla"
  with jax.sharding.use_abstract_mesh(mesh_of(4, TPU)[1]):
    assert choose(DECODER, jnp.bfloat16, "pallas", has_bias=True) == "xla"


def test_without_a_mesh_several_devices_get_what_the_compiler_can_split(monkeypatch):
  monkeypatch.setattr(attention, "current_platform", lambda: "tpu")
  assert choose(DECODER, jnp.bfloat16) == "xla"
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert choose(DECODER, jnp.bfloat16) == "pallas"


@pytest.mark.parametrize(
  "capability, head_dim, dtype, chosen",
  [
    (8.0, 64, jnp.bfloat16, "cudnn"),
    (8.0, 64, jnp.float32, "xla"),
    (7.5, 64, jnp.float16, "xla"),
    (0.0, 64, jnp.bfloat16, "xla"),  # not NVIDIA's
    (8.0, 60, jnp.bfloat16, "xla"),
    (8.0, 256, jnp.bfloat16, "xla"),
    (9.0, 256, jnp.bfloat16, "cudnn"),
  ],
)
def test_choice_on_gpu(monkeypatch, capability, head_dim, dtype, chosen):
  monkeypatch.setattr(attention, "current_platform", lambda: "gpu")
  monkeypatch.setattr(attention, "_compute_capability", lambda: capability)
  assert choose((8, 257, 12, head_dim), dtype, "auto") == chosen
  assert choose((8, 257, 12, head_dim), dtype, "cudnn") == chosen


# The programs for other platforms


def lowered(function, platform, *shapes, **shardings):
  traced = jax.jit(function, **shardings).trace(*shapes)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens, padded, mask", [(260, 260, "NO_MASK"), (257, 258, "PADDING")])
def test_cudnn_gets_even_lengths(monkeypatch, tokens, padded, mask, biased):
  fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(attention, "current_platform", lambda: "gpu")
  monkeypatch.setattr(attention, "_compute_capability", lambda: 9.0)
  bias = [shape_of(2, tokens, tokens)] * biased
  attend_with = lambda q, k, v, *bias: attend(q, k, v, "cudnn", *bias)
  step = lambda d, *inputs: jax.vjp(attend_with, *inputs)[1](d)
  text = lowered(step, "cuda", *[shape_of(4, tokens, 2, 64)] * 4, *bias)
  assert f"__cudnn$fmha{'ScaleBias' * biased}SoftmaxBackward" in text
  assert {m for m in ("NO_MASK", "PADDING") if m in text} == {mask}
  assert f"tensor<4x{padded}x2x64xbf16>" in text
  assert f"4x2x{padded}x{padded}x" not in text  # no logits outside the kernel


def test_a_stack_of_blocks_lowers_for_tpu_with_one_kernel_each_way():
  stack = Stack(2, BlockDesign(2), jnp.dtype("bfloat16"), scan=True, remat="full")
  x, cond = shape_of(8, 130, 128), shape_of(8, 128)
  params = jax.eval_shape(stack.init, jax.random.key(0), [(x, cond)])
  loss = lambda p, x, c: stack.apply(p, [(x, c)])[0].astype(jnp.float32).sum()
  mesh, abstract = mesh_of(4, TPU)
  rows, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in ([("data", "fsdp")], []))
  with jax.sharding.use_abstract_mesh(abstract):
    shardings = dict(in_shardings=(whole, rows, rows))
    text = lowered(jax.grad(loss), "tpu", params, x, cond, **shardings)
  assert text.count('kernel_name = "attention_backward"') == 1
  assert "8x2x130x130" not in text


def test_a_program_for_several_platforms_is_plain():
  exported = jax.export.export(jax.jit(attend), platforms=("cpu", "tpu", "cuda"))
  arrays = draw((2, 12, 2, 16), arrays=3)
  again = jax.export.deserialize(exported(*arrays).serialize())
  np.testing.assert_allclose(again.call(*arrays), attend(*arrays), rtol=1e-6)


COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "collective-permute")


def test_every_device_attends_to_its_own_rows(monkeypatch):
  monkeypatch.setattr(attention, "current_platform", lambda: "tpu")
  monkeypatch.setattr(attention, "kernel_attention", interpreted)
  mesh, _ = mesh_of(4)
  arrays = draw((8, 20, 2, 64))
  expected = with_gradients(interpreted, *arrays)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  step = lambda *x: jax.vjp(functools.partial(attend, implementation="pallas"), *x[:3])[1](x[3])
  with jax.set_mesh(mesh):
    program = jax.jit(step, in_shardings=rows, out_shardings=rows)
    compiled = program.lower(*arrays).compile()
    found = compiled(*jax.device_put(arrays, rows))
  assert not [name for name in COLLECTIVES if name in compiled.as_text()]
  assert_close(found, expected[1:], 1e-6)

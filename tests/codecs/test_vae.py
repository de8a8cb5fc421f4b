"""The KL auto-encoder against diffusers' where it is, and against NumPy in any case."""

import dataclasses
import hashlib
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from umd.codecs import vae
from umd.codecs.vae import Architecture, KLAutoEncoder, from_diffusers, to_diffusers

SMALL = Architecture(block_out_channels=(32, 64, 64), layers_per_block=1)
TINY = Architecture(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
SIXTEEN = dict(
  latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611
)

HAS_DIFFUSERS = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
needs_diffusers = pytest.mark.skipif(not HAS_DIFFUSERS, reason="needs PyTorch and diffusers")


def tensors_of(arch, seed=0):
  """Random tensors in diffusers' names and shapes; activations stay near 1."""
  rng = np.random.RandomState(seed)  # Its numbers are the same for ever, unlike default_rng's.
  model = KLAutoEncoder(arch)
  side = arch.factor
  images = jnp.zeros((1, side, side, arch.in_channels))
  noise = jnp.zeros((1, 1, 1, arch.latent_channels))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images, noise)["params"]
  tensors = to_diffusers(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes), arch)

  def draw(name, shape):
    noise = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("bias"):
      return 0.3 * noise
    return 1 + 0.3 * noise if len(shape) == 1 else noise / np.prod(shape[1:], dtype="f") ** 0.5

  return {name: draw(name, tensors[name].shape) for name in sorted(tensors)}


def images_of(arch, side, count=2):
  """Noise on gradients that differ between images, in [-1, 1]; not square."""
  rng = np.random.RandomState(side)
  shape = (count, side, side + arch.factor)
  ramp = np.linspace(-1, 1, shape[2])[:, None] * rng.uniform(-1, 1, (count, 1, 1, arch.in_channels))
  return np.clip(ramp + 0.3 * rng.standard_normal((*shape, arch.in_channels)), -1, 1).astype("f")


def latents_of(arch, images):
  h, w = (side // arch.factor for side in images.shape[1:3])
  shape = (len(images), h, w, arch.latent_channels)
  return np.random.RandomState(1).standard_normal(shape).astype(np.float32)


def apply(model, params, method, x):
  return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)


def torch_model(arch, tensors=None, folder=None):
  """diffusers' model of this architecture, with these tensors or from this folder."""
  import torch
  from diffusers import AutoencoderKL

  if folder is not None:
    return AutoencoderKL.from_pretrained(folder)
  levels = len(arch.block_out_channels)
  blocks = {"down": ("DownEncoderBlock2D",) * levels, "up": ("UpDecoderBlock2D",) * levels}
  settings = dataclasses.asdict(arch)
  model = AutoencoderKL(
    down_block_types=blocks["down"], up_block_types=blocks["up"], **settings
  ).eval()
  if tensors is not None:
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True)
  return model


def torch_outputs(model, images, latents):
  """(mean, logvar, decoded latents) of diffusers' model, NHWC."""
  import torch

  nchw = lambda x: torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
  with torch.no_grad():
    posterior = model.encode(nchw(images)).latent_dist
    decoded = model.decode(nchw(latents)).sample
  return [x.numpy().transpose(0, 2, 3, 1) for x in (posterior.mean, posterior.logvar, decoded)]


def our_outputs(arch, params, images, latents, dtype="float32"):
  model = KLAutoEncoder(arch, dtype)
  mean, logvar = apply(model, params, "encode", images)
  return [np.asarray(x) for x in (mean, logvar, apply(model, params, "decode", latents))]


def difference(got, expected):
  assert got.shape == expected.shape
  return np.abs(got - expected).max() / np.abs(expected).max()


def check_parity(arch, side):
  """Our outputs are diffusers' up to 1e-4 of the largest."""
  tensors, images = tensors_of(arch), images_of(arch, side)
  latents = latents_of(arch, images)
  expected = torch_outputs(torch_model(arch, tensors), images, latents)
  got = our_outputs(arch, from_diffusers(tensors, arch), images, latents)
  worst = [difference(g, e) for g, e in zip(got, expected, strict=True)]
  assert max(worst) < 1e-4


@needs_diffusers
@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"layers_per_block": 2, "norm_num_groups": 16},
    {**SIXTEEN, "shift_factor": 0.1159},
    {"mid_block_add_attention": False, "in_channels": 1, "out_channels": 1},
  ],
  ids=["SD", "deeper", "16 channels", "grey without attention"],
)
def test_outputs_are_those_of_diffusers(changes):
  check_parity(dataclasses.replace(SMALL, **changes), 32)


@needs_diffusers
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, SIXTEEN], ids=["SD 1.5", "SD 3"])
def test_outputs_of_the_full_size_are_those_of_diffusers(changes):
  check_parity(Architecture(**changes), 64)


# Every 10th, 10th, 30th number that diffusers 0.42 computes for `tensors_of(TINY)` in float32.
DIFFUSERS = {
  "mean": [-0.43122, -0.85437, -0.80334, -0.36382, -0.88274, -0.09478, -0.47727, -0.12006],
  "logvar": [0.18096, -0.47706, -0.05536, -1.29193, 0.19164, -1.24393, 0.66035, -0.94411],
  "decoded": [0.18172, 0.1196, -0.34864, -0.11739, 0.1937, 0.05624, -0.29626, -0.00895],
}


@pytest.fixture(scope="module")
def tiny():
  """(tensors, params, images, latents, (mean, logvar, decoded) in float32) of TINY."""
  tensors, images = tensors_of(TINY), images_of(TINY, 8, 1)
  params, latents = from_diffusers(tensors, TINY), latents_of(TINY, images)
  return tensors, params, images, latents, our_outputs(TINY, params, images, latents)


def test_outputs_are_the_numbers_that_diffusers_computed(tiny):
  for got, expected in zip(tiny[-1], DIFFUSERS.values(), strict=True):
    np.testing.assert_allclose(got.ravel()[:: got.size // 8], expected, atol=2e-5)


@needs_diffusers
def test_the_stored_numbers_are_those_of_diffusers(tiny):
  tensors, _, images, latents, _ = tiny
  for got, expected in zip(
    torch_outputs(torch_model(TINY, tensors), images, latents), DIFFUSERS.values(), strict=True
  ):
    np.testing.assert_allclose(got.ravel()[:: got.size // 8], expected, atol=2e-5)


def test_bfloat16_is_near_float32_and_its_outputs_and_parameters_are_float32(tiny):
  _, params, images, latents, exact = tiny
  for got, expected in zip(
    our_outputs(TINY, params, images, latents, "bfloat16"), exact, strict=True
  ):
    assert got.dtype == np.float32
    assert 1e-4 < difference(got, expected) < 0.05
  model = KLAutoEncoder(TINY, "bfloat16")
  shapes = jax.eval_shape(model.init, jax.random.key(0), images, latents)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_a_call_decodes_a_draw_from_the_posterior(tiny):
  _, params, images, noise, (mean, logvar, _) = tiny
  model = KLAutoEncoder(TINY)
  out = jax.jit(model.apply)({"params": params}, images, noise)
  latents = mean + np.exp(logvar / 2) * noise
  assert difference(out[0], apply(model, params, "decode", latents)) < 1e-5
  assert difference(out[1], mean) < 1e-5
  assert difference(out[2], logvar) < 1e-5


def test_the_logarithm_of_the_variance_is_bounded(tiny):
  tensors, _, images, *_ = tiny
  bias = np.zeros(8, np.float32)
  bias[4:6], bias[6:] = 1e3, -1e3
  params = from_diffusers({**tensors, "quant_conv.bias": bias}, TINY)
  _, logvar = apply(KLAutoEncoder(TINY), params, "encode", images)
  assert (np.asarray(logvar) == [20, 20, -30, -30]).all()


def naive_group_norm(x, groups, scale, bias):
  b, h, w, c = x.shape
  y = x.reshape(b, h, w, groups, c // groups)
  mean, var = y.mean((1, 2, 4), keepdims=True), y.var((1, 2, 4), keepdims=True)
  return ((y - mean) / (var + 1e-6) ** 0.5).reshape(x.shape) * scale + bias


# At a deviation of 1e-3 the variance is as small as epsilon.
@pytest.mark.parametrize("mean, deviation", [(0, 1), (0, 1e-3), (1000, 1)])
def test_group_norm_is_that_of_float64_even_beside_a_large_mean(mean, deviation):
  rng = np.random.default_rng(0)
  x = mean + deviation * rng.standard_normal((2, 5, 4, 6)) * rng.uniform(0.5, 2, 6)
  x = x.astype(np.float32)
  scale, bias = rng.standard_normal((2, 6))
  params = {"scale": jnp.asarray(scale, "f"), "bias": jnp.asarray(bias, "f")}
  norm = lambda x: vae.GroupNorm(3).apply({"params": params}, jnp.asarray(x))
  expected = naive_group_norm(x.astype(np.float64), 3, scale, bias)
  np.testing.assert_allclose(norm(x), expected, atol=1e-5 + 1e-6 * mean)
  if (mean, deviation) == (
    0,
    1,
  ):  # The pixel about which statistics are taken leaves no trace in the gradient.
    target = rng.standard_normal(x.shape)
    grads = [
      jax.grad(lambda x, f=f: (f(x) * target).sum())(jnp.asarray(x))
      for f in (norm, lambda x: naive_group_norm(x, 3, scale, bias))
    ]
    np.testing.assert_allclose(*grads, atol=1e-4)


def test_group_norm_of_bfloat16_is_that_of_float64_and_in_float32():
  rng = np.random.default_rng(0)
  x = jnp.asarray(100 + rng.standard_normal((2, 5, 4, 6)), jnp.bfloat16)
  params = {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
  got = vae.GroupNorm(3).apply({"params": params}, x)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, naive_group_norm(np.asarray(x, float), 3, 1, 0), atol=1e-2)


def test_attention_is_softmax_of_scaled_products_over_all_pixels():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 4, 8)).astype(np.float32)
  block = vae.SpatialAttention(4, "float32")
  shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.asarray(x))["params"]
  params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f"), shapes)
  dense = lambda name, y: y @ params[name]["kernel"] + params[name]["bias"]
  y = naive_group_norm(x, 4, **params["group_norm"]).reshape(2, 12, 8)
  logits = dense("to_q", y) @ dense("to_k", y).transpose(0, 2, 1) / 8**0.5
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = x + dense("to_out_0", weights @ dense("to_v", y)).reshape(x.shape)
  got = block.apply({"params": params}, jnp.asarray(x))
  np.testing.assert_allclose(got, expected, atol=1e-4)


def test_sides_are_halved_with_padding_below_and_to_the_right_and_doubled_by_repetition():
  rng = np.random.default_rng(0)
  x, kernel = rng.standard_normal((1, 4, 6, 2)), rng.standard_normal((3, 3, 2, 2))
  params = {"conv": {"kernel": jnp.asarray(kernel, "f"), "bias": jnp.zeros(2)}}
  padded = np.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
  expected = np.array(
    [
      [np.einsum("hwi,hwio->o", padded[0, i : i + 3, j : j + 3], kernel) for j in (0, 2, 4)]
      for i in (0, 2)
    ]
  )
  down = vae.Resample(True, "float32").apply({"params": params}, jnp.asarray(x, "f"))
  np.testing.assert_allclose(down[0], expected, atol=1e-5)
  np.testing.assert_array_equal(
    vae.upsample(jnp.asarray(x, "f")), x.astype("f").repeat(2, axis=1).repeat(2, axis=2)
  )


def test_the_names_and_shapes_of_the_published_size_are_those_of_diffusers():
  arch = Architecture()
  model = KLAutoEncoder(arch)
  init = lambda x, noise: model.init(jax.random.key(0), x, noise)["params"]
  shapes = jax.eval_shape(init, jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 1, 1, 4)))
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  tensors = to_diffusers(params, arch)
  assert (len(tensors), sum(x.size for x in tensors.values())) == (248, 83_653_863)
  lines = [f"{name} {tensors[name].shape}" for name in sorted(tensors)]
  digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()  # diffusers 0.42 has the same.
  assert digest == "600696bc94ffc80f250f7a2b836e289ff191e5f194ce89f9aa389cfc8ef4a0ab"
  back = from_diffusers(tensors, arch)
  assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, params)


def test_parameters_go_to_diffusers_and_back(tiny):
  tensors, params, *_ = tiny
  back = to_diffusers(params, TINY)
  assert back.keys() == tensors.keys()
  assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_the_attention_are_understood(tiny, convolutions):
  tensors, params, *_ = tiny
  old = {}
  for name, x in tensors.items():
    for new, before in OLD.items():
      if ".attentions." in name and f".{new}." in name:
        name = name.replace(f".{new}.", f".{before}.")
        x = x[:, :, None, None] if convolutions and x.ndim == 2 else x
    old[name] = x
  assert sum(any(f".{b}." in name for b in OLD.values()) for name in old) == 16
  got = flatten_dict(from_diffusers(old, TINY))
  assert all(np.array_equal(got[path], x) for path, x in flatten_dict(params).items())


def test_tensors_that_do_not_fit_are_named(tiny):
  tensors, params, *_ = tiny
  name = "decoder.mid_block.attentions.0.to_q.weight"
  query = name.replace("to_q", "query")
  fewer = {k: v for k, v in tensors.items() if k != name}
  for bad, message in (
    (fewer, f"{name} is missing"),
    ({**tensors, "loss.logvar": np.zeros(1)}, "loss.logvar is unexpected"),
    ({**tensors, name: np.zeros((16, 8))}, f"{name} has shape (16, 8), not (16, 16)"),
    ({**tensors, query: tensors[name]}, f"{query} and {name} are the same tensor"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      from_diffusers(bad, TINY)
  with pytest.raises(ValueError, match=r"decoder.conv_in.weight has shape"):
    to_diffusers(params, dataclasses.replace(TINY, latent_channels=8))


def test_images_and_latents_that_do_not_fit_are_refused(tiny):
  params = tiny[1]
  for method, shape, message in (
    ("encode", (1, 15, 16, 3), "15 x 16 pixels .* factor=2"),
    ("encode", (1, 16, 15, 3), "16 x 15 pixels .* factor=2"),
    ("encode", (1, 16, 16, 1), "1 channels, but in_channels=3"),
    ("decode", (1, 8, 8, 16), "16 channels, but latent_channels=4"),
  ):
    with pytest.raises(ValueError, match=message):
      apply(KLAutoEncoder(TINY), params, method, jnp.zeros(shape))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"block_out_channels": (128, 200)}, "multiples of norm_num_groups=32"),
    ({"block_out_channels": ()}, "one width or more"),
    ({"layers_per_block": 0}, "layers_per_block=0 must be at least 1"),
    ({"norm_num_groups": 0}, "norm_num_groups=0 must be at least 1"),
    ({"scaling_factor": 0.0}, "scaling_factor=0.0 must be positive"),
    ({"shift_factor": float("nan")}, "shift_factor=nan must be finite"),
  ],
)
def test_impossible_architectures_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    Architecture(**changes)


def test_the_factor_counts_the_levels():
  assert (Architecture().factor, TINY.factor, SMALL.factor) == (8, 2, 4)

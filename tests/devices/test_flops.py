"""Analytic FLOPs against those that are counted in what JAX traces and what XLA compiles."""

import flop_count
import jax
import jax.numpy as jnp
import pytest
from stand_ins import at_once

from configs import common
from umd import objectives
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.devices import flops
from umd.masks import mask_from_noise
from umd.models.autoencoder import AutoEncoder
from umd.objectives import Objective, Stream, Term, period, stream_rows
from umd.paths import make_path
from umd.trained.inference import Inference

# Sizes (image side, batch) of which no two numbers are alike, so that none can stand for another.
SIZES = {"nano/4": (24, 12), "Ti/4": (32, 64), "S/4": (64, 16), "L/2": (32, 8)}


def shapes(model):
  blank = jnp.zeros((1, *model.image_size)), jnp.zeros(1, jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), *blank)["params"]


def streams_of(method):
  return objectives.make_streams(common.streams(**common.METHODS[method]))


def train(model, streams, batch_size):
  """The loss of a batch, and what it is given."""
  loss = at_once(Objective(model, make_path("cosine", 1000), streams, batch_size))
  images = jax.ShapeDtypeStruct((batch_size, *model.image_size), jnp.float32)
  batch = {"image": images, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
  return loss, (shapes(model), batch, jax.random.key(0))


def rows_of(streams, batch_size):
  size = period(streams, batch_size)
  edges = [stream_rows(s, size) for s in streams]
  return sum(stop - start for start, stop in edges) * batch_size // size


def without_gradients(model, parts, rows):
  """What the backward pass leaves out: gradients of the patches and of the timesteps' features."""
  width = model.shape.width
  return parts["embed"] / 3 + 2 * rows * width * 2 * width


@pytest.mark.parametrize(
  "variant, method, condition",
  [
    ("nano/4", "maskdit", "token"),
    ("Ti/4", "mae", "token"),
    ("Ti/4", "umd", "adaln"),
    ("S/4", "maskdit", "adaln_shared"),
    ("L/2", "dit", "adaln"),
  ],
)
def test_a_step_takes_what_is_counted_in_the_loss_and_its_gradient(variant, method, condition):
  size, batch_size = SIZES[variant]
  model, streams = AutoEncoder(variant, (size, size, 3), condition=condition), streams_of(method)
  loss, given = train(model, streams, batch_size)
  parts = flops.train_step_parts(model, streams, batch_size)
  total = flops.train_step(model, streams, batch_size)
  assert total == sum(parts.values()) and tuple(parts) == flops.PARTS
  assert flop_count.count(loss, *given) == total / 3
  left_out = without_gradients(model, parts, rows_of(streams, batch_size))
  gradient = flop_count.count(jax.value_and_grad(loss, has_aux=True), *given)
  assert gradient == total - left_out
  assert left_out < 0.015 * total


@pytest.mark.parametrize(
  "settings",
  [
    dict(num_classes=7, heads=("x0",), scan=True),
    dict(class_tokens=1, image_size=(24, 16, 5), dtype="bfloat16"),
  ],
)
def test_every_setting_of_the_model_counts_as_it_should(settings):
  model = AutoEncoder(**{"variant": "nano/4", "image_size": (16, 16, 3), **settings})
  x0 = {"x0": Term("x0", "masked")}
  streams = (
    Stream("a", x0, (0.0, 0.75), mask_ratio=0.3),
    Stream("b", x0, (0.5, 1.0), "clean", 0.6),
  )
  loss, given = train(model, streams, 8)
  assert flop_count.count(loss, *given) == flops.train_step(model, streams, 8) / 3


def test_work_done_again_is_not_counted():
  streams, count = streams_of("umd"), {}
  for remat in ("none", "full"):
    model = AutoEncoder("nano/4", (16, 16, 3), remat=remat)
    loss, given = train(model, streams, 8)
    gradient = flop_count.count(jax.value_and_grad(loss, has_aux=True), *given)
    count[remat] = gradient, flops.train_step(model, streams, 8)
  assert count["full"][0] > 1.2 * count["none"][0] and count["full"][1] == count["none"][1]


@pytest.mark.parametrize("kept", [None, 9])
def test_xla_counts_as_many_in_the_unrolled_forward_pass(kept):
  # A width that dwarfs what is not a matrix product, which XLA counts as well.
  model = AutoEncoder("B/8", (64, 64, 3), num_classes=3)
  kept_of = lambda: mask_from_noise(jnp.tile(jnp.arange(64.0), (2, 1)), kept) if kept else None
  apply = lambda params, x: model.apply({"params": params}, x, jnp.ones(2, int), None, kept_of())
  given = shapes(model), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  lowered = jax.jit(apply).lower(*given)
  total = sum(flops.forward(model, 2, kept).values())
  assert flop_count.count(apply, *given) == total
  assert lowered.cost_analysis()["flops"] == pytest.approx(total, rel=0.02)


def test_parts_are_those_parts():
  """Each changes with what it is made of, and with nothing else."""
  build = lambda **kw: flops.forward(AutoEncoder(**{**base, **kw}), 3, 5)
  base = dict(variant="nano/4", image_size=(16, 16, 3), num_classes=7)
  changed = lambda **kw: {k for k, v in build(**kw).items() if v != build()[k]}
  assert changed(heads=("x0",)) == {"heads"}
  assert changed(num_classes=0) == {"condition"}
  assert changed(class_tokens=9) == {"encoder", "attention"}
  assert changed(image_size=(16, 16, 4)) == {"embed", "heads"}
  assert changed(image_size=(32, 16, 3)) == {"decoder", "attention", "heads"}
  assert changed(condition="token") == {"encoder", "decoder", "attention", "condition"}
  assert changed(condition="adaln_shared") == {"condition"}
  masked, whole = build(), flops.forward(AutoEncoder(**base), 3)
  assert {k for k in whole if whole[k] != masked[k]} == {"embed", "encoder", "attention"}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sampling_takes_what_is_counted_in_it(sampler, guided):
  model = AutoEncoder("nano/4", (16, 16, 3), num_classes=3)
  inference = Inference(model, make_path("cosine", 100))
  keys, labels = jax.random.split(jax.random.key(0), 4), jnp.zeros(4, jnp.int32)
  settings = dict(sampler=sampler, steps=5, cfg_scale=2.0 if guided else 1.0)
  draw = lambda params: inference.sample(params, keys, labels, **settings)
  assert flop_count.count(draw, shapes(model)) == 4 * flops.sample(model, 5, guided)


@pytest.mark.parametrize(
  "settings",
  [
    dict(),
    dict(in_channels=1, use_quant_conv=False, mid_block_add_attention=False),
    dict(block_out_channels=(32, 96), layers_per_block=1, latent_channels=3),
  ],
)
def test_a_latent_takes_what_is_counted_in_its_encoder(settings):
  architecture = Architecture(**settings)
  network, side = KLAutoEncoder(architecture), 4 * architecture.factor
  images = jax.ShapeDtypeStruct((1, side, 2 * side, architecture.in_channels), jnp.float32)
  noise = jax.ShapeDtypeStruct((1, 4, 8, architecture.latent_channels), jnp.float32)
  params = jax.eval_shape(network.init, jax.random.key(0), images, noise)
  encode = lambda params, images: network.apply(params, images, method="encode")
  assert flops.encode(architecture, images.shape[1:]) == flop_count.count(encode, params, images)


def test_the_counter_counts():
  """The oracle itself, on products that one can count by hand."""
  a, b = jnp.zeros((5, 2, 3)), jnp.zeros((5, 3, 7))
  assert flop_count.count(jnp.matmul, a, b) == 2 * 5 * 2 * 3 * 7
  many = lambda a: jax.lax.scan(lambda c, _: (jax.jit(jnp.dot)(c, c), None), a, length=6)[0]
  assert flop_count.count(many, jnp.zeros((4, 4))) == 6 * 2 * 4**3
  image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 10))
  layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
  conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", **layout)
  assert flop_count.count(conv, image, kernel) == 2 * 16 * 9 * 3 * 10

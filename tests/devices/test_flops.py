"""FLOPs counted in a jaxpr: by hand, against XLA, and against the sizes of published networks."""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import methods
from umd import objectives
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.devices import flops
from umd.masks import mask_from_noise, num_kept
from umd.models.autoencoder import AutoEncoder
from umd.models.network import param_shapes, predict
from umd.objectives import Objective, Stream, Term, period, stream_rows
from umd.paths import make_path


def of_a_block(tokens, width):
  """qkv, output and an MLP of four times the width; and the two products of tokens by tokens."""
  return 2.0 * tokens * 12 * width**2 + 2 * 2.0 * tokens**2 * width


def of_an_image(model, kept):
  """FLOPs of one image in the auto-encoder, from its sizes alone."""
  s, tokens = model.shape, model.image_size[0] * model.image_size[1] // model.patch**2
  pixels, extra = s.patch**2 * model.image_size[2], 1 if model.condition == "token" else 0
  total = 2.0 * kept * pixels * s.width
  total += s.depth * of_a_block(model.class_tokens + kept + extra, s.width)
  total += s.decoder_depth * of_a_block(1 + tokens + extra, s.width)
  total += 2.0 * tokens * s.width * len(model.heads) * pixels
  trunks = 4 * (2 if model.num_classes else 1)
  layers = {"adaln": s.depth + s.decoder_depth, "adaln_shared": 1, "token": 0}[model.condition]
  modulations = 6 * layers + (2 if model.condition != "token" else 0)
  return total + 2.0 * (trunks + modulations) * s.width**2


@pytest.mark.parametrize(
  "variant, side, method, settings",
  [
    ("nano/4", 24, "maskdit", dict(condition="token")),
    ("Ti/4", 32, "umd", dict(condition="adaln", scan=True)),
    ("nano/4", 16, "mae", dict(condition="adaln_shared", num_classes=7, heads=("x0", "eps", "v"))),
  ],
)
def test_a_training_step_counts_three_forward_passes_of_the_published_sizes(
  variant, side, method, settings
):
  batch_size = 8
  model = AutoEncoder(variant, (side, side, 3), **settings)
  streams = objectives.make_streams(methods.streams_of(method))
  objective = Objective(model, make_path("cosine", 1000), streams, batch_size)
  batch = {
    "image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32),
    "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  size, want = period(streams, batch_size), 0.0
  for stream in streams:
    start, stop = stream_rows(stream, size)
    kept = num_kept((side // model.patch) ** 2, stream.mask_ratio)
    want += 3 * (stop - start) * batch_size // size * of_an_image(model, kept)
  assert flops.train_step(objective, param_shapes(model), batch) == want


def test_work_done_again_is_not_counted():
  stream, counts = Stream("all", {"x0": Term("x0")}), []
  for remat in ("none", "full"):
    model = AutoEncoder("nano/4", (16, 16, 3), remat=remat)
    objective = Objective(model, make_path("cosine", 1000), [stream], 8)
    batch = {"image": jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)}
    counts.append(flops.train_step(objective, param_shapes(model), batch))
  assert counts[0] == counts[1]


@pytest.mark.parametrize("kept", [None, 9])
def test_xla_counts_as_many_in_the_unrolled_forward_pass(kept):
  # A width that dwarfs what is not a matrix product, which XLA counts as well.
  model = AutoEncoder("B/8", (64, 64, 3), num_classes=3)

  def forward(params, images):
    mask = mask_from_noise(jnp.tile(jnp.arange(64.0), (2, 1)), kept) if kept else None
    return predict(model, params, images, jnp.ones(2, int), None, mask)

  arguments = param_shapes(model), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  counted = jax.jit(forward).lower(*arguments).cost_analysis()["flops"]
  assert counted == pytest.approx(flops.count(forward, *arguments), rel=0.02)


def test_xla_counts_as_many_in_a_convolutional_encoder():
  """XLA counts norms and activations as well, which are a few percent of the convolutions."""
  network = KLAutoEncoder(Architecture())
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  noise = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
  params = jax.eval_shape(network.init, jax.random.key(0), images, noise)
  encode = functools.partial(network.apply, method="encode")
  lowered = jax.jit(encode).lower(params, images)
  counted = lowered.cost_analysis()["flops"]
  assert flops.count(encode, params, images) == pytest.approx(counted, rel=0.05)


def test_products_and_convolutions_that_one_can_count_by_hand():
  a, b = jnp.zeros((5, 2, 3)), jnp.zeros((5, 3, 7))
  assert flops.count(jnp.matmul, a, b) == 2 * 5 * 2 * 3 * 7
  many = lambda a: jax.lax.scan(lambda c, _: (jax.jit(jnp.dot)(c, c), None), a, length=6)[0]
  assert flops.count(many, jnp.zeros((4, 4))) == 6 * 2 * 4**3
  either = lambda a: jax.lax.cond(a.sum() > 0, lambda a: a @ a, lambda a: a @ a @ a, a)
  assert flops.count(either, jnp.zeros((4, 4))) == 2 * 2 * 4**3
  image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 10))
  layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
  conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", **layout)
  assert flops.count(conv, image, kernel) == 2 * 16 * 9 * 3 * 10

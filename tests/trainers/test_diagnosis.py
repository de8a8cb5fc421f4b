"""Where a step stops being finite: planted in a known place, it must be found there."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import Function

from trainers.diagnosis import Watch, diagnose, inspect
from umd import data
from umd.codecs.codec import Pixels
from umd.devices.mesh import make_mesh, put_batch, replicated, state_shardings
from umd.models.layers.blocks import BlockDesign, Stack
from umd.objectives import Objective, Stream, Term
from umd.paths import make_path
from umd.state import step_key

BATCH = 8
NAMES = ("clean", "noised")
HALF = {"eps": Term("eps", "visible", 0.5), "x0": Term("x0", "masked", 0.5)}
STREAMS = (
  Stream("clean", {"x0": Term("x0", "masked")}, (0.0, 0.5), "clean", 0.75, False),
  Stream("noised", HALF, (0.5, 1.0), "uniform", 0.5),
)


IMAGES = np.random.default_rng(0).uniform(-1, 1, (BATCH, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(BATCH, dtype=np.int32) % 3


def verdict(loss, params, devices=1, fsdp=1, rows=()):
  """First line of the diagnosis of a step in which these rows of the images are spoilt."""
  mesh = make_mesh(jax.devices()[:devices], fsdp)
  batch = {"image": IMAGES.copy(), "label": LABELS}
  batch["image"][list(rows), 3, 3] = np.nan
  placed = jax.device_put(params, state_shardings(params, mesh))
  report = diagnose(loss, NAMES, placed, put_batch(batch, mesh), step_key(0, 5))
  assert len(report.splitlines()) > 1
  return report.splitlines()[0]


@pytest.fixture(scope="module")
def method(nano):
  """(loss of two streams, parameters)."""
  model, params = nano(image_size=(8, 8, 1), variant="nano/2", num_classes=3, scan=True)
  return Objective(model, make_path("cosine", 10), STREAMS, BATCH), params


@pytest.fixture
def planted(method):
  """`planted(leaf, change, rows, devices) -> verdict`: a parameter changed or images spoilt."""
  loss, params = method

  def run(at="", change=None, rows=(), devices=4):
    def plant(path, leaf):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      return change(np.array(leaf)) if name == at else leaf

    changed = jax.tree_util.tree_map_with_path(plant, params)
    return verdict(loss, changed, devices, devices, rows)  # Each device keeps a part.

  return run


def layer(i, factor):
  """Multiplies layer i of a stack."""

  def change(x):
    x[i] *= factor
    return x

  return change


def huge_first_row(x):
  x[0] = 3e38
  return x


def test_a_parameter_is_named_with_its_layer(planted):
  name = "encoder/blocks/attention/out/kernel"
  assert planted(name, layer(1, np.nan)) == (
    "parameters not finite before the step: encoder/blocks/1/attention/out/kernel."
  )


def test_images_are_named_by_their_rows(planted):
  assert planted(rows=(2, 7)) == "images not finite: rows 2, 7 of the batch of 8."


@pytest.mark.parametrize(
  ("devices", "leaf", "change", "first"),
  [
    (
      4,
      "encoder/blocks/mlp/out/kernel",
      layer(1, 1e38),
      "stream 'clean': encoder/blocks/1/mlp/out.",
    ),
    # Logits are computed by the attention itself, and what comes of them enters its last part.
    (
      1,
      "encoder/blocks/attention/qkv_kernel",
      layer(0, 1e30),
      "stream 'clean': encoder/blocks/0/attention, before encoder/blocks/0/attention/out.",
    ),
    (1, "mask_token", lambda x: x * 1e30, "all streams: decoder/blocks/0/norm1/norm."),
    (1, "label_embed/table/embedding", huge_first_row, "all streams: label_embed/trunk/hidden."),
  ],
)
def test_an_overflow_is_named_by_the_layer_that_makes_it(planted, devices, leaf, change, first):
  expected = f"activations not finite, the first in {first}"
  assert planted(leaf, change, devices=devices) == expected


def test_watching_changes_no_number(method):
  """It goes through a stack layer by layer, where the model runs a loop."""
  loss, params = method
  mesh = make_mesh(jax.devices()[:1])
  batch = put_batch({"image": IMAGES, "label": LABELS}, mesh)
  params = jax.device_put(params, replicated(mesh))
  drawn = loss.draw(batch, step_key(0, 5))
  watch = Watch(NAMES)

  def watched(params, drawn):
    with nn.intercept_methods(watch):
      return loss(params, drawn)

  expected = jax.jit(loss)(params, drawn)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(close, jax.jit(watched)(params, drawn), expected)
  assert len(watch.values) == len(watch.names) > 60
  streams = {name.split(": ")[0] for name in watch.names}
  assert streams == {"all streams", *(f"stream {name!r}" for name in NAMES)}


class Model(nn.Module):
  """A stack that is called as an auto-encoder calls it: a part of something."""

  encoder: nn.Module

  def __call__(self, x, cond):
    return self.encoder([(x, cond)])[0]


TERMS = {"clean/x0": jnp.float32(1.0), "noised/x0": jnp.float32(2.0)}


@pytest.mark.parametrize(
  ("total", "terms", "expected"),
  [
    (
      jnp.nan,
      {**TERMS, "noised/x0": jnp.inf},
      "terms not finite, from finite predictions: noised/x0.",
    ),
    (
      jnp.inf,
      TERMS,
      "loss not finite, the sum of finite terms: they or their weights are too large.",
    ),
    (0.5, TERMS, "nothing: computed again, the step is finite, with a loss of 0.5."),
  ],
)
def test_terms_and_loss_come_after_the_layers(total, terms, expected):
  loss = Function(lambda params, batch, key: (total + 0 * params["w"].sum(), terms))
  assert verdict(loss, {"w": jnp.ones(3)}) == expected


def test_gradients_are_named_from_the_loss_backwards():
  """They overflow on their way through a layer, so that it and those before it are reached."""
  model = Stack(3, BlockDesign(1, "token"), jnp.dtype("float32"))
  x, cond = jnp.asarray(IMAGES[:, :, :, 0]), jnp.ones((BATCH, 8))
  params = {"encoder": jax.device_get(model.init(jax.random.key(0), [(x, cond)])["params"])}
  spoil = jax.custom_vjp(lambda x: x)
  spoil.defvjp(
    lambda x: (x, None), lambda _, g: (g.at[1].multiply(jnp.inf).at[0].multiply(jnp.inf),)
  )

  def loss(params, batch, key):
    blocks = params["encoder"]["blocks"]
    spoilt = {**blocks, "mlp": jax.tree.map(spoil, blocks["mlp"])}
    stack = Model(model)
    out = stack.apply({"params": {"encoder": {**params["encoder"], "blocks": spoilt}}}, x, cond)
    return out.std(), {}

  found = verdict(Function(loss), params)
  names = found.removeprefix("gradients not finite, from the loss backwards: ").split(", ")
  layers = [name.split("/")[2] for name in names if name.startswith("encoder/blocks/")]
  assert layers == sorted(layers, reverse=True) and set(layers) == {"0", "1"}


def test_the_batch_of_the_step_and_the_report_are_left_in_the_workdir(tmp_path, method):
  loss, params = method
  source = data.load("digits", "train")
  parts = types.SimpleNamespace(
    mesh=make_mesh(), source=source, codec=Pixels(), objective=loss, streams=STREAMS
  )
  config = types.SimpleNamespace(batch_size=BATCH, seed=3)
  bad = {**params, "mask_token": np.full_like(params["mask_token"], np.nan)}
  text = inspect(parts, config, bad, 12, str(tmp_path))
  path = tmp_path / "nonfinite_step_12.npz"
  assert text.startswith("Found: parameters not finite before the step: mask_token. ")
  assert str(path) in text
  batches = data.train_batches(source, BATCH, seed=3)
  twelfth = [next(batches) for _ in range(12)][-1]
  with np.load(path) as saved:
    np.testing.assert_array_equal(saved["images"], twelfth["image"])
    np.testing.assert_array_equal(saved["labels"], twelfth["label"])
  report = path.with_suffix(".txt").read_text(encoding="utf-8")
  assert report.startswith("Step 12\nparameters not finite") and "head/kernel" in report

"""Evaluators: schedules, errors, and numbers that padding and devices do not change."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluators
from evaluators import context as contexts
from evaluators import losses, reconstruction
from evaluators.context import Context
from umd.data import eval_batches, load
from umd.devices.mesh import make_mesh, state_shardings
from umd.objectives import Stream, Term
from umd.paths import make_path
from umd.runs.writers import Images
from umd.trained.inference import Inference

DIGITS = {"data": {"name": "digits", "split": "test"}}
TEST = load("digits", "test")
PATH = make_path("cosine", 20)
HALF = {"eps": Term("eps", "visible", 0.5), "x0": Term("x0", "masked", 0.5)}
STREAMS = (
  Stream("clean", {"x0": Term("x0", "masked")}, (0.0, 0.5), "clean", 0.75, False),
  Stream("noised", HALF, (0.5, 1.0), "uniform", 0.5),
)
STATE = types.SimpleNamespace(params={}, ema_params={})  # Of a stub that needs no weights.
# The first has no padding to get wrong: the whole set is one batch on one device.
SETTINGS = {"unpadded": (1, None), "many": (4, 64), "some": (2, 128), "larger": (1, 364)}


@pytest.fixture(scope="module")
def model_state(nano):
  """A nano model of the digits, and a state whose average is not its parameters."""
  model, params = nano("nano/2", (8, 8, 1))
  half = jax.tree.map(lambda x: 0.5 * x, params)
  return model, types.SimpleNamespace(params=params, ema_params=half)


class Network:
  """The protocol's attributes, for evaluators that ask nothing else of a network."""

  image_size, num_classes, heads, patch = (8, 8, 1), 0, ("x0",), 2

  def predict(self, inputs, groups=1):
    raise NotImplementedError

  def represent(self, images, t, labels=None):
    raise NotImplementedError


def make_context(inference, devices=4, batch_size=64, streams=STREAMS, cache=""):
  mesh = make_mesh(jax.devices()[:devices])
  return Context(inference, streams, mesh, batch_size or len(TEST), 0, cache)


def make(module, context, **settings):
  """The evaluator of a module with these settings."""
  return module.Evaluator(context, module.Settings(**settings))


@pytest.fixture(scope="module")
def values(model_state):
  """`values(evaluator, setting)`: everything an evaluator yields; each is run once."""
  model, state = model_state

  @functools.cache
  def run(kind, setting):
    context = make_context(Inference(model, PATH), *SETTINGS[setting])
    if kind == "losses":
      evaluator = make(losses, context, **DIGITS, bins=1)
    else:
      evaluator = make(reconstruction, context, **DIGITS, mask_ratio=0.75)
    return dict(evaluator(state))

  return run


@pytest.mark.parametrize("setting", ["many", "some", "larger"])
@pytest.mark.parametrize("kind", ["losses", "reconstruction"])
def test_numbers_do_not_depend_on_batch_padding_or_devices(values, kind, setting):
  expected, found = values(kind, "unpadded"), values(kind, setting)
  assert list(found) == list(expected)
  for name, value in expected.items():
    if isinstance(value, Images):
      # Rounding to 256 levels turns tiny differences into one level at most.
      gap = found[name].pixels.astype(int) - value.pixels.astype(int)
      assert np.abs(gap).max() <= 1
    else:
      assert found[name] == pytest.approx(value, rel=1e-4)


def test_parameters_that_are_split_over_the_devices_give_the_same(model_state, values):
  model, state = model_state
  context = make_context(Inference(model, PATH), *SETTINGS["many"])
  mesh = make_mesh(context.mesh.devices, fsdp=0)
  placed = jax.device_put(state.ema_params, state_shardings(state.ema_params, mesh))
  assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
  evaluator = make(reconstruction, context, **DIGITS, mask_ratio=0.75)
  found = dict(evaluator(types.SimpleNamespace(ema_params=placed)))["masked_mse"]
  assert found == pytest.approx(values("reconstruction", "many")["masked_mse"], rel=1e-5)


def test_losses_are_yielded_for_both_weights_and_all_terms(values):
  scores = ["clean/x0/t0", "noised/eps/t1-20", "noised/x0/t1-20"]
  found = values("losses", "unpadded")
  assert set(found) == {f"{weights}/{s}" for weights in ("ema", "raw") for s in scores}
  assert all(found[f"ema/{s}"] != found[f"raw/{s}"] for s in scores)
  assert len(set(found.values())) == len(found)


def test_losses_score_each_image_at_a_noise_level_of_the_bin(monkeypatch):
  """Instead of an error, `score` gives the timestep: its mean tells which were drawn."""
  monkeypatch.setattr(losses, "score", lambda *args: [{"t": args[4][0].t.astype(jnp.float32)}])
  model = Network()
  streams = (Stream("n", {}, timesteps="uniform"), Stream("c", {}, timesteps="clean"))
  context = make_context(types.SimpleNamespace(model=model, path=PATH), streams=streams)
  found = dict(make(losses, context, **DIGITS, bins=4)(STATE))
  centres = {"t1-5": 3, "t6-10": 8, "t11-15": 13, "t16-20": 18}
  assert {k.split("/")[-1] for k in found} == {"t0", *centres}
  for name, centre in centres.items():
    # 359 draws from 5 equally likely timesteps: their mean deviates by .075.
    assert found[f"ema/n/t/{name}"] == pytest.approx(centre, abs=0.3)
  assert found["ema/c/t/t0"] == 0


@pytest.fixture
def passes(monkeypatch):
  """Counts the passes over data: {name of the source: number}."""
  counts = {}

  def counted(source, *args, **kwargs):
    counts[source.name] = counts.get(source.name, 0) + 1
    return eval_batches(source, *args, **kwargs)

  for module in (contexts, reconstruction):
    monkeypatch.setattr(module, "eval_batches", counted)
  return counts


@pytest.fixture
def brightness(monkeypatch):
  """A losses evaluator for which the error of an image is its mean pixel."""
  score = lambda model, path, streams, params, draws: [{"mean": draws[0].x0.mean((1, 2, 3))}]
  monkeypatch.setattr(losses, "score", score)
  model = Network()
  context = make_context(types.SimpleNamespace(model=model, path=PATH), batch_size=32)
  return functools.partial(make, losses, context, **DIGITS)


@pytest.mark.parametrize("num, expected", [(0, len(TEST)), (100, 100), (10_000, len(TEST))])
def test_num_examples_are_the_first_ones(brightness, num, expected):
  images = TEST.arrays()[0][:expected]
  found = set(dict(brightness(num=num)(STATE)).values())
  assert list(found) == [pytest.approx(images.mean(), rel=1e-4)] * len(found)
  context = make_context(Filler(0.5), batch_size=32)
  evaluator = make(reconstruction, context, **DIGITS, mask_ratio=0.5, num=num, rows=2, scale=1)
  found = dict(evaluator(STATE))
  assert found["mean_image_mse"] == pytest.approx(images[:, 4:].var(axis=0).mean(), rel=1e-4)
  last = found["images"].pixels[10:18, 1:9] / 127.5 - 1
  np.testing.assert_allclose(last, images[-1], atol=1 / 127)


class Filler:
  """Stands for a model that fills in the lower half of every image, `off` by a constant."""

  def __init__(self, off):
    self.model = Network()
    self.path, self._off = PATH, off

  def reconstruct(self, params, images, keys, mask_ratio, t=0):
    masked = jnp.zeros_like(images).at[:, 4:].set(1.0)
    return images + self._off * masked, masked


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_reconstruction_error_is_over_masked_pixels_and_compared_with_the_mean_image(off):
  evaluator = make(reconstruction, make_context(Filler(off)), **DIGITS, mask_ratio=0.5)
  found = dict(evaluator(STATE))
  assert found["masked_mse"] == pytest.approx(off**2, abs=1e-12)
  lower = TEST.arrays()[0][:, 4:]
  assert found["mean_image_mse"] == pytest.approx(lower.var(axis=0).mean(), rel=1e-4)


def test_reconstruction_pictures_are_rows_of_original_masked_and_filled():
  evaluator = make(
    reconstruction, make_context(Filler(0.25)), **DIGITS, mask_ratio=0.5, rows=5, scale=2
  )
  pixels = dict(evaluator(STATE))["images"].pixels
  side = 2 * 8 + 1
  assert pixels.shape == (5 * side + 1, 3 * side + 1, 1)
  cells = pixels[1:, 1:].reshape(5, side, 3, side)[:, :16:2, :, :16:2].transpose(0, 2, 1, 3)
  original, masked, filled = cells.swapaxes(0, 1).astype(int)
  np.testing.assert_array_equal(masked[:, :4], original[:, :4])
  assert set(masked[:, 4:].ravel()) == {128}
  np.testing.assert_array_equal(filled[:, :4], original[:, :4])
  raised = np.minimum(original[:, 4:] + 0.25 * 127.5, 255)
  assert np.abs(filled[:, 4:] - raised).max() <= 1
  assert len(np.unique(original.reshape(5, -1), axis=0)) == 5


def test_the_mean_image_is_computed_when_needed_and_only_once(passes):
  evaluator = make(reconstruction, make_context(Filler(0.25)), **DIGITS, mask_ratio=0.5)
  assert passes == {}
  for expected in (2, 3):
    dict(evaluator(STATE))
    assert passes == {"digits:test": expected}


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 0.99])
def test_a_mask_that_drops_nothing_or_everything_is_an_error(model_state, ratio):
  context = make_context(Inference(model_state[0], PATH))
  with pytest.raises(ValueError, match=f"mask_ratio={ratio}"):
    make(reconstruction, context, **DIGITS, mask_ratio=ratio)


@pytest.mark.parametrize("t", [-1, 21])
def test_reconstruction_at_a_timestep_the_path_does_not_have_is_an_error(model_state, t):
  context = make_context(Inference(model_state[0], PATH))
  with pytest.raises(ValueError, match=rf"t={t}\b.*\b20\b"):
    make(reconstruction, context, **DIGITS, mask_ratio=0.5, t=t)


def test_reconstruction_without_the_head_it_reads_is_an_error(nano):
  model, _ = nano("nano/2", (8, 8, 1), heads=("eps", "v"))
  with pytest.raises(ValueError, match=r"'x0'.*'eps', 'v'"):
    make(reconstruction, make_context(Inference(model, PATH)), **DIGITS, mask_ratio=0.5)


def build(**configs):
  stub = types.SimpleNamespace(
    path=PATH, model=types.SimpleNamespace(image_size=(8, 8, 1), num_classes=0)
  )
  return evaluators.from_config(configs, make_context(stub))


RIGHT = {"type": "losses", "every": 5, **DIGITS}


@pytest.mark.parametrize(
  "wrong, told",
  [
    ({"type": "lossses"}, ["'lossses'", "fewshot", "generation", "losses", "reconstruction"]),
    ({"type": "context"}, ["'context'", "losses"]),
    ({"bins": 21}, ["bins=21", "20"]),
    ({"bins": 0}, ["bins=0"]),
    ({"data": {"name": "digits", "split": "val"}}, ["'val'", "train", "test"]),
    ({"data": {"name": "digit", "split": "test"}}, ["'digit'", "digits", "tfds"]),
    ({"data": "digits"}, ["data='digits'", "split=..."]),
    ({"num": -1}, ["num=-1"]),
  ],
)
def test_a_wrong_setting_is_an_error_that_names_evaluator_value_and_remedy(wrong, told):
  with pytest.raises(ValueError) as error:
    build(eval_name={**RIGHT, **wrong})
  for word in ["evals.eval_name", *told]:
    assert word in str(error.value)


def test_data_that_is_not_there_is_an_error_that_names_evaluator_and_data(tmp_path):
  missing = {"name": f"npz:{tmp_path}/no.npz", "split": "all"}
  with pytest.raises(FileNotFoundError, match=r"evals\.eval_name.*no\.npz"):
    build(eval_name={**RIGHT, "data": missing})


def test_an_evaluator_is_due_every_so_often_and_after_the_last_step():
  due = [n for n in range(1, 24) if evaluators.Scheduled("e", 5, print).due(n, steps=23)]
  assert due == [5, 10, 15, 20, 23]

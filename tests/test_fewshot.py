"""Few-shot probe: ridge regression against scikit-learn, shots, and features of known worth."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge as Reference

from evaluators import fewshot
from evaluators.context import Context
from evaluators.fewshot import draw_shots
from evaluators.ridge import BIAS, Ridge
from umd.data import Source, sources
from umd.inference import example_keys
from umd.paths import make_path
from umd.sharding import make_mesh

CLASSES = 4


def standardised(train, x):
  """Features as big_vision's few-shot probe has them: the bias column last."""
  scaled = (x - train.mean(axis=0)) / (train.std(axis=0) + 1e-5)
  return np.concatenate([scaled, np.full((len(x), 1), 100.0)], axis=1)


def problem(n, d, seed=0):
  """Features of various scales, the last one constant, and labels they say something about."""
  rng = np.random.default_rng(seed)
  y = rng.integers(0, CLASSES, n)
  x = rng.standard_normal((n, d)) * np.logspace(-1, 2, d) + 3 * rng.standard_normal(d)
  x[:, 0] += 0.1 * y
  x[:, -1] = 5.0
  return x, y


# More examples than features, fewer, and one short of as many as there are with the bias.
@pytest.mark.parametrize("n, d", [(60, 7), (9, 40), (12, 12), (13, 12)])
@pytest.mark.parametrize("l2", [1.0, 64.0, 1024.0])
def test_weights_are_those_of_sklearn(n, d, l2):
  x, y = problem(n, d)
  targets = np.where(np.arange(CLASSES) == y[:, None], 1.0, -1.0)
  reference = Reference(alpha=l2, fit_intercept=False, solver="svd")
  expected = reference.fit(standardised(x, x), targets).coef_.T
  found = Ridge(x, y, CLASSES).weights(l2)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
  assert BIAS == 100


@pytest.mark.parametrize("n, d", [(60, 7), (9, 40)])
def test_accuracy_counts_largest_outputs_on_features_scaled_by_the_training_set(n, d):
  x, y = problem(n, d)
  test, labels = problem(50, d, seed=1)
  ridge = Ridge(x.astype(np.float32), y, CLASSES)
  outputs = standardised(x.astype(np.float32).astype(float), test) @ ridge.weights(4.0)
  largest = [max(range(CLASSES), key=lambda c: row[c]) for row in outputs]
  hits = [guess == label for guess, label in zip(largest, labels, strict=True)]
  assert 0 < sum(hits) < 50
  assert ridge.accuracy(test, labels, 4.0) == pytest.approx(sum(hits) / 50)


@pytest.mark.parametrize("shots", [1, 3])
def test_shots_are_exactly_so_many_different_examples_of_every_class(shots):
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), 20))
  ids = draw_shots(labels, shots, CLASSES, seed=0)
  assert len(set(ids.tolist())) == shots * CLASSES
  np.testing.assert_array_equal(np.bincount(labels[ids]), np.full(CLASSES, shots))
  np.testing.assert_array_equal(ids, draw_shots(labels, shots, CLASSES, seed=0))
  draws = {tuple(draw_shots(labels, shots, CLASSES, seed)) for seed in range(5)}
  assert len(draws) == 5


def test_shots_beyond_a_class_are_an_error_that_names_it():
  labels = np.array([0] * 9 + [1] * 2 + [2] * 9)
  assert len(draw_shots(labels, 2, 3, seed=0)) == 6
  with pytest.raises(ValueError, match=r"shots=3.*class 1 has 2"):
    draw_shots(labels, 3, 3, seed=0)


class Stub:
  """Stands for a model: features are the label, which the image shows, or know nothing of it."""

  path = make_path("flow", 10)

  def represent(self, params, images, keys, t=0):
    label = images[:, 0, 0, 0].astype(jnp.int32)
    noise = jax.vmap(lambda key: jax.random.normal(key, (CLASSES,)))(keys)
    told = jax.nn.one_hot(label, CLASSES) + 0.05 * noise
    return {"class": told * params["scale"], "patches": noise * params["scale"]}


@pytest.fixture
def toy(monkeypatch):
  """Makes the data "toy": 200 + 201 images that show their label in their only pixel."""

  def load(split):
    n, seed = {"train": (200, 0), "test": (201, 1)}[split]
    labels = np.random.default_rng(seed).permutation(np.arange(n) % CLASSES).astype(np.int32)
    return Source(split, labels.astype(np.float32)[:, None, None, None], labels, CLASSES)

  monkeypatch.setitem(sources.SOURCES, "toy", load)


# Weights other than the average are useless: all features are zero.
STATE = types.SimpleNamespace(params={"scale": 0.0}, ema_params={"scale": 1.0})


def make_evaluator(batch_size=64, **settings):
  context = Context(Stub(), (), make_mesh(), batch_size, 0, "")
  defaults = {"shots": (1, 5), "features": ("class", "patches")}
  splits = {"data": "toy", "train_split": "train", "test_split": "test"}
  return fewshot.Evaluator(context, **splits, **{**defaults, **settings})


def probe(batch_size=64, **settings):
  """What the evaluator yields for the stub."""
  return dict(make_evaluator(batch_size, **settings)(STATE))


def test_features_that_tell_the_label_are_perfect_and_noise_is_at_chance(toy):
  values = probe()
  names = {
    f"{f}_{k}shot_{s}"
    for f in ("class", "patches", "pixels")
    for k in (1, 5)
    for s in ("mean", "std")
  }
  assert set(values) == names
  for k in (1, 5):
    assert values[f"class_{k}shot_mean"] > 0.97
    # Chance is 1 / 4; 603 guesses deviate by .018.
    assert abs(values[f"patches_{k}shot_mean"] - 0.25) < 0.08
  assert all(isinstance(v, float) for v in values.values())


def test_constant_features_are_at_chance(toy):
  constant = types.SimpleNamespace(ema_params={"scale": 0.0})
  values = dict(make_evaluator()(constant))
  assert abs(values["class_5shot_mean"] - 0.25) < 0.01


@pytest.mark.parametrize("batch_size", [4, 200, 512])
def test_the_batch_size_of_evaluation_changes_nothing(toy, batch_size):
  assert probe(batch_size) == probe(64)


def test_mean_and_deviation_are_over_draws_of_shots(toy):
  features = ("patches",)
  one, three = (probe(shots=(1,), seeds=s, features=features) for s in (1, 3))
  assert one["patches_1shot_std"] == 0 < three["patches_1shot_std"]
  assert one["patches_1shot_mean"] != three["patches_1shot_mean"]


@pytest.mark.parametrize("held_out", [1000, 50])
def test_the_penalty_is_the_best_one_on_training_examples_beside_the_shots(
  toy, monkeypatch, held_out
):
  class Fake:
    """Penalty 4 is best; on the test set the "accuracy" tells which penalty was taken."""

    def __init__(self, x, y, num_classes):
      self._shots = {row.tobytes() for row in x}

    def accuracy(self, x, y, l2):
      if len(x) == 201:
        return l2
      seen.append(len(x))
      assert not self._shots & {row.tobytes() for row in x} or pixels
      return {1.0: 0.2, 4.0: 0.9, 16.0: 0.5}[l2]

  seen, pixels = [], True  # Pixels of one class are all the same here, so shots come again.
  monkeypatch.setattr(fewshot, "Ridge", Fake)
  evaluator = make_evaluator(l2=(1.0, 4.0, 16.0), features=("patches",), held_out=held_out)
  pixels = False
  values = dict(evaluator(STATE))
  assert values["patches_1shot_mean"] == values["patches_5shot_mean"] == 4
  assert set(seen) == ({200 - 4, 200 - 20} if held_out == 1000 else {50})


def test_with_nothing_held_out_the_first_penalty_stands(toy, monkeypatch):
  fake = types.SimpleNamespace(accuracy=lambda x, y, l2: l2)
  monkeypatch.setattr(fewshot, "Ridge", lambda x, y, num_classes: fake)
  values = probe(shots=(50,), l2=(16.0, 1.0), features=("patches",))
  assert values["patches_50shot_mean"] == 16


def test_keys_of_examples_depend_on_seed_and_index_alone():
  """What makes results independent of batches: the same example has the same noise."""
  draw = lambda keys: np.asarray(jax.random.key_data(keys))
  whole = draw(example_keys(0, jnp.arange(8)))
  np.testing.assert_array_equal(draw(example_keys(0, jnp.arange(5, 8))), whole[5:])
  assert len(np.unique(np.concatenate([whole, draw(example_keys(1, jnp.arange(8)))]), axis=0)) == 16


@pytest.mark.parametrize(
  "settings, told",
  [
    ({"t": 11}, r"t=11.*\b10\b"),
    ({"t": -1}, r"t=-1"),
    ({"features": ("class", "mean")}, r"'mean'.*'class'.*'patches'"),
    ({"shots": (51,)}, r"shots=51"),
  ],
)
def test_settings_that_cannot_be_are_errors_that_name_them(toy, settings, told):
  with pytest.raises(ValueError, match=told):
    probe(**settings)

"""Few-shot probe: shots, protocols by hand, and features of known worth."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluators import context as contexts
from evaluators import fewshot
from evaluators.context import Context
from evaluators.fewshot import check_shots, draw_shots
from umd.data import Source, from_arrays
from umd.devices.mesh import make_mesh
from umd.paths import make_path
from umd.samplers.keys import example_keys
from umd.trained.inference import Inference

CLASSES = 4


def standardised(train, x):
  """Features as big_vision's few-shot probe has them: the bias column last."""
  scaled = (x - train.mean(axis=0)) / (train.std(axis=0) + 1e-5)
  return np.concatenate([scaled, np.full((len(x), 1), 100.0)], axis=1)


@pytest.mark.parametrize("shots", [1, 3])
def test_shots_are_exactly_so_many_different_examples_of_every_class(shots):
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), 20))
  ids = draw_shots(labels, shots, CLASSES, seed=0)
  assert len(set(ids.tolist())) == shots * CLASSES
  np.testing.assert_array_equal(np.bincount(labels[ids]), np.full(CLASSES, shots))
  np.testing.assert_array_equal(ids, draw_shots(labels, shots, CLASSES, seed=0))
  draws = {tuple(draw_shots(labels, shots, CLASSES, seed)) for seed in range(5)}
  assert len(draws) == 5


def test_shots_beyond_a_class_are_an_error_that_names_it_or_all_it_has():
  labels = np.array([0] * 9 + [1] * 2 + [2] * 9)
  check_shots(labels, 2, 3)
  with pytest.raises(ValueError, match=r"shots=3.*class 1 has 2"):
    check_shots(labels, 3, 3)
  with pytest.raises(ValueError, match=r"shots=1.*class 3 has 0"):
    check_shots(labels, 1, 4)
  ids = draw_shots(labels, 3, 4, seed=0)
  np.testing.assert_array_equal(np.bincount(labels[ids]), [3, 2, 3])
  assert len(set(ids.tolist())) == 8


class Stub:
  """Stands for a model: features are the label, which the image shows, or know nothing of it."""

  path = make_path("flow", 10)
  model = types.SimpleNamespace(image_size=(1, 1, 1))

  def features(self):
    return "class", "mean", "patches"

  def represent(self, params, images, keys, t=0):
    label = images[:, 0, 0, 0].astype(jnp.int32)
    noise = jax.vmap(lambda key: jax.random.normal(key, (CLASSES,)))(keys)
    told = jax.nn.one_hot(label, CLASSES) + 0.05 * noise
    found = {"class": told, "mean": told + noise, "patches": noise}
    return {name: values * params["scale"] for name, values in found.items()}


def toy_source(name, split, pp="", *, data_dir="", cache=False, shuffle_buffer=0):
  """200 + 201 images that show their label in their only pixel; "other": 60 others of class 0."""
  n, seed = {"train": (200, 0), "test": (201, 1), "other": (60, 2)}[split]
  labels = np.random.default_rng(seed).permutation(np.arange(n) % CLASSES)
  if split == "other":
    labels = np.zeros(n, int)
  classes = {"toy": CLASSES, "more": CLASSES + 1, "none": 0}[name]
  images = labels.astype(np.float32)[:, None, None, None]
  return from_arrays(f"{name}:{split}", images, labels if classes else None, classes)


@pytest.fixture
def toy(monkeypatch):
  """Makes the data "toy"."""
  monkeypatch.setattr(contexts, "load", toy_source)


# Weights other than the average are useless: all features are zero.
STATE = types.SimpleNamespace(params={"scale": 0.0}, ema_params={"scale": 1.0})


def make_evaluator(batch_size=64, **settings):
  context = Context(Stub(), (), make_mesh(), batch_size, 0, "")
  spec = lambda split: {"name": "toy", "split": split}
  defaults = {"train": spec("train"), "test": spec("test")}
  defaults |= {"shots": (1, 5), "features": ("class", "patches")}
  return fewshot.Evaluator(context, fewshot.Settings(**{**defaults, **settings}))


def probe(batch_size=64, **settings):
  """What the evaluator yields for the stub."""
  return dict(make_evaluator(batch_size, **settings)(STATE))


def test_features_that_tell_the_label_are_perfect_and_noise_is_at_chance(toy):
  values = probe()
  names = {
    f"{f}_strict_{k}shot_{s}"
    for f in ("class", "patches", "pixels")
    for k in (1, 5)
    for s in ("mean", "std")
  }
  assert set(values) == names
  for k in (1, 5):
    assert values[f"class_strict_{k}shot_mean"] > 0.97
    # Chance is 1 / 4; 603 guesses deviate by .018.
    assert abs(values[f"patches_strict_{k}shot_mean"] - 0.25) < 0.08
  assert all(isinstance(v, float) for v in values.values())


@pytest.mark.parametrize("batch_size", [4, 200, 512])
def test_the_batch_size_of_evaluation_changes_nothing(toy, batch_size):
  assert probe(batch_size) == probe(64)


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
      assert not self._shots & {row.tobytes() for row in x}
      return {1.0: 0.2, 4.0: 0.9, 16.0: 0.5}[l2]

  seen, settings = [], {"features": ("patches",), "pixels": False, "held_out": held_out}
  monkeypatch.setattr(fewshot, "Ridge", Fake)
  values = probe(l2=(1.0, 4.0, 16.0), **settings)
  assert values["patches_strict_1shot_mean"] == values["patches_strict_5shot_mean"] == 4
  assert set(seen) == ({200 - 4, 200 - 20} if held_out == 1000 else {50})


def features_of(split):
  """What the stub makes of a split, and the labels."""
  source = toy_source("toy", split)
  images, labels = source.arrays()
  found = Stub().represent({"scale": 1.0}, images, example_keys(0, jnp.arange(len(images))))
  return {**{k: np.asarray(v) for k, v in found.items()}, "pixels": images.reshape(-1, 1)}, labels


@pytest.mark.parametrize("shots", [5, 60])
def test_the_umd_protocol_is_ridge_with_a_fixed_penalty_on_what_there_is(toy, shots):
  """By hand: standardise, a bias column, targets +-1, normal equations; a class has 50, not 60."""
  (train, y), (test, answers) = features_of("train"), features_of("test")
  found = probe(shots=[shots], protocol="umd", features=["mean"])
  for name in ("mean", "pixels"):
    hits = []
    for seed in range(3):
      rng = np.random.default_rng(seed)
      ids = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:shots] for c in range(4)])
      assert len(ids) == 4 * min(shots, 50)
      x = standardised(train[name][ids], train[name][ids].astype(float))
      targets = np.where(np.arange(CLASSES) == y[ids][:, None], 1.0, -1.0)
      weights = np.linalg.solve(x.T @ x + 1024.0 * np.eye(x.shape[1]), x.T @ targets)
      guesses = (standardised(train[name][ids], test[name].astype(float)) @ weights).argmax(axis=1)
      hits.append((guesses == answers).mean())
    assert found[f"{name}_umd_{shots}shot_mean"] == pytest.approx(np.mean(hits), abs=1e-3)
    assert found[f"{name}_umd_{shots}shot_std"] == pytest.approx(np.std(hits), abs=1e-3)


def test_both_protocols_and_neighbours_are_what_each_is_alone(toy):
  settings = {"features": ["mean"], "shots": [5]}
  both = probe(protocol=["strict", "umd"], knn=[3, 10], **settings)
  assert both == {**probe(**settings), **probe(protocol="umd", knn=[3, 10], **settings)}
  kinds = ("strict_5shot_mean", "strict_5shot_std", "umd_5shot_mean", "umd_5shot_std", "knn3")
  assert set(both) == {f"{f}_{k}" for f in ("mean", "pixels") for k in (*kinds, "knn10")}


def test_neighbours_that_know_the_label_are_right_and_noise_is_at_chance(toy):
  values = probe(shots=(), knn=(10,))
  assert values["class_knn10"] == 1
  assert abs(values["patches_knn10"] - 0.25) < 0.12  # 201 guesses deviate by .03.


def test_features_are_extracted_once_for_all_and_pixels_once_for_ever(toy, monkeypatch):
  passes = []

  def counted(self, fn, params, source, **kwargs):
    passes.append(source.name)
    return honest(self, fn, params, source, **kwargs)

  honest = Context.map
  monkeypatch.setattr(Context, "map", counted)
  evaluator = make_evaluator(protocol=("strict", "umd"), knn=(1, 5))
  assert passes == []
  first = dict(evaluator(STATE))
  assert sorted(passes) == ["toy:test"] * 2 + ["toy:train"] * 2  # Features and pixels.
  assert dict(evaluator(STATE)) == first
  assert sorted(passes) == ["toy:test"] * 3 + ["toy:train"] * 3


def test_labels_that_are_known_from_batches_only_give_the_same(toy, monkeypatch):
  expected = probe(protocol=("strict", "umd"))
  monkeypatch.setattr(Source, "labels", None)
  assert probe(protocol=("strict", "umd")) == expected


def test_too_few_examples_are_an_error_at_start_or_as_soon_as_it_is_known(toy, monkeypatch):
  with pytest.raises(ValueError, match=r"shots=51.*class 0 has 50"):
    make_evaluator(shots=(51,))
  monkeypatch.setattr(Source, "labels", None)
  evaluator = make_evaluator(shots=(51,))
  with pytest.raises(ValueError, match=r"shots=51.*class 0 has 50"):
    dict(evaluator(STATE))
  assert dict(make_evaluator(shots=(51,), protocol="umd", features=())(STATE))


def test_examples_without_a_label_are_an_error(toy, monkeypatch):
  honest = Context.map

  def unlabelled(self, *args, **kwargs):
    found = honest(self, *args, **kwargs)
    return {**found, "label": np.full_like(found["label"], -1)}

  monkeypatch.setattr(Context, "map", unlabelled)
  with pytest.raises(ValueError, match=r"toy:train has examples without a label"):
    probe()


@pytest.mark.parametrize(
  "settings, told",
  [
    ({"t": 11}, r"t=11.*\b10\b"),
    ({"t": -1}, r"t=-1"),
    ({"features": ("class", "men")}, r"'men'.*'class'.*'mean'.*'patches'"),
    ({"protocol": "upstream"}, r"'upstream'.*'strict'.*'umd'"),
    ({"protocol": ["umd", "many"]}, r"'many'.*'strict'.*'umd'"),
    ({"shots": (0, 5)}, r"shots=\[0\]"),
    ({"seeds": 0}, r"seeds=\[0\]"),
    ({"knn": (10, 201)}, r"knn=201.*200 examples"),
    ({"test": {"name": "more", "split": "test"}}, r"toy:train has 4 .*more:test has 5"),
    ({"train": {"name": "none", "split": "train"}}, r"train: none:train has no labels"),
  ],
)
def test_settings_that_cannot_be_are_errors_that_name_them(toy, settings, told):
  with pytest.raises(ValueError, match=told):
    make_evaluator(**settings)


def test_mean_features_are_the_mean_of_the_patch_tokens_and_nothing_else(nano):
  model, params = nano("nano/4", (16, 16, 3))
  images = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3))
  inference = Inference(model, make_path("flow", 10))
  found = inference.represent(params, images, example_keys(0, jnp.arange(3)))
  assert set(found) == {"class", "mean", "patches"}
  tokens = np.asarray(found["patches"]).reshape(3, 16, -1)
  np.testing.assert_allclose(found["mean"], tokens.mean(axis=1), rtol=1e-5, atol=1e-6)

"""The judge of samples, and the generation evaluator that asks it."""

import dataclasses
import functools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluators import classifier, generation
from evaluators.classifier import load_or_train
from evaluators.context import Context
from umd import fid
from umd.data import load
from umd.sharding import make_mesh

TRAIN, TEST = load("digits", "train"), load("digits", "test")


@pytest.fixture
def quick(monkeypatch):
  """One epoch is enough to be far above chance."""
  monkeypatch.setattr(classifier, "EPOCHS", 1)


def forbidden(*args):
  raise AssertionError("The weights were in the cache: nothing is to be trained.")


def test_weights_are_trained_once_and_the_same_from_the_cache(quick, monkeypatch, tmp_path):
  cache = str(tmp_path / "new" / "cache")
  first = load_or_train(TRAIN, cache)(TEST.images)
  monkeypatch.setattr(classifier, "_train", forbidden)
  again = load_or_train(TRAIN, cache)(TEST.images)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert len(os.listdir(cache)) == 1
  probabilities, features = first
  assert probabilities.shape == (len(TEST), 10)
  assert features.shape == (len(TEST), classifier.FEATURES)
  np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
  assert (probabilities.argmax(axis=1) == TEST.labels).mean() > 0.5


def test_training_is_deterministic(quick, tmp_path):
  files = []
  for cache in (tmp_path / "a", tmp_path / "b"):
    load_or_train(TEST, str(cache))
    files.append({f.name: f.read_bytes() for f in cache.iterdir()})
  assert files[0] == files[1]


@pytest.mark.parametrize("changed", ["images", "labels", "seed"])
def test_other_data_or_another_seed_have_weights_of_their_own(monkeypatch, tmp_path, changed):
  monkeypatch.setattr(classifier, "_train", lambda model, params, source, seed: params)
  load_or_train(TEST, str(tmp_path))
  source, seed = TEST, 0
  if changed == "seed":
    seed = 1
  else:
    array = getattr(TEST, changed).copy()
    array[0] = (array[0] + 1) % 2
    source = dataclasses.replace(TEST, **{changed: array})
  load_or_train(source, str(tmp_path), seed)
  assert len(os.listdir(tmp_path)) == 2


class Artist:
  """Stands for a model: asked for a class, it copies test images of it, in the order of the keys.

  With `lies`, those of the next class.
  """

  def __init__(self, num_classes=10, lies=False):
    self.model = types.SimpleNamespace(
      num_classes=num_classes, image_size=(8, 8, 1), init=lambda key, images, t: {"params": {}}
    )
    self._lies = lies
    self._known = jnp.stack([TEST.images[TEST.labels == c][:30] for c in range(10)])

  def sample(self, params, keys, labels, **settings):
    pick = jax.vmap(lambda key: jax.random.randint(key, (), 0, 30))(keys)
    assert (labels is None) == (self.model.num_classes == 0)
    if labels is None:
      labels = pick % 10
    return 1.5 * self._known[(labels + self._lies) % 10, pick]


def make(inference, cache, num=30, batch_size=16, **settings):
  context = Context(inference, (), make_mesh(), batch_size, 0, str(cache))
  splits = {"data": "digits", "train_split": "train", "test_split": "test"}
  return generation.Evaluator(context, **splits, num=num, sampling={}, **settings)


@functools.cache
def evaluate(cache, lies=False):
  """What a truthful or a lying artist gets, measured once."""
  return dict(make(Artist(lies=lies), cache)(STATE))


STATE = types.SimpleNamespace(ema_params={})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """A cache with trained weights: two epochs, since one leaves too much to chance."""
  folder = tmp_path_factory.mktemp("cache")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(classifier, "EPOCHS", 2)
    load_or_train(TRAIN, str(folder))
  return folder


def test_samples_are_measured_as_by_hand(cache):
  found = evaluate(cache)
  classify = load_or_train(TRAIN, str(cache))
  labels = np.arange(30) % 10
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(30))
  images = np.clip(Artist().sample({}, keys, labels), -1, 1)
  moments = lambda x: fid.moments(np.asarray(classify(x)[1]))
  distances = {
    k: fid.frechet_distance(*moments(x), *moments(TRAIN.images))
    for k, x in {"": images, "_floor": TEST.images}.items()
  }
  for name, distance in distances.items():
    assert found[f"frechet_classifier{name}"] == pytest.approx(distance, rel=1e-3)
  probabilities = np.asarray(classify(images)[0])
  assert found["agreement"] == (probabilities.argmax(axis=1) == labels).mean()
  assert found["score_classifier"] == pytest.approx(fid.inception_score(probabilities), rel=1e-4)
  accuracy = (np.asarray(classify(TEST.images)[0]).argmax(axis=1) == TEST.labels).mean()
  assert found["classifier_accuracy"] == pytest.approx(accuracy)
  low, high = (found[f"frechet_classifier_{k}"] for k in ("floor", "ceiling"))
  position = (found["frechet_classifier"] - low) / (high - low)
  assert found["frechet_classifier_position"] == pytest.approx(position)
  assert 0 < low < high


def test_agreement_is_with_the_class_asked_for(cache):
  right, wrong = evaluate(cache), evaluate(cache, lies=True)
  assert right["agreement"] > 0.7
  assert wrong["agreement"] < 0.2


def test_a_model_without_labels_is_asked_for_none_and_has_no_agreement(cache):
  found = dict(make(Artist(num_classes=0), cache)(STATE))
  assert "agreement" not in found
  assert "frechet_classifier" in found


def test_the_batch_size_changes_nothing(cache):
  few, many = evaluate(cache), dict(make(Artist(), cache, batch_size=64)(STATE))
  for name, value in few.items():
    if name == "images":
      np.testing.assert_array_equal(value.pixels, many[name].pixels)
    else:
      assert value == pytest.approx(many[name], rel=1e-4)


@pytest.mark.parametrize("num, columns, width", [(30, 2, 2), (20, 5, 2)])
def test_pictures_are_one_row_per_class(cache, num, columns, width):
  """Also where a class has fewer samples than there are columns."""
  evaluator = make(Artist(), cache, num=num, columns=columns, scale=1)
  pixels = dict(evaluator(STATE))["images"].pixels
  assert pixels.shape[0] == 10 * 9 + 1
  known = {i.tobytes(): c for i, c in zip(as_levels(1.5 * TEST.images), TEST.labels, strict=True)}
  for row in range(10):
    for column in range(width):
      cell = pixels[9 * row + 1 : 9 * row + 9, 9 * column + 1 : 9 * column + 9]
      assert known[cell.tobytes()] == row


def as_levels(images):
  return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


@pytest.mark.parametrize("num", [0, 1, 15])
def test_a_number_of_samples_that_is_unfair_to_classes_is_an_error(cache, num):
  with pytest.raises(ValueError, match=rf"num={num}\b.*\b10\b"):
    make(Artist(), cache, num=num)

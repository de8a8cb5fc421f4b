"""Samples of models that copy real images, measured as by hand."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluators import classifier, generation
from evaluators import context as contexts
from evaluators.classifier import load_or_train
from evaluators.context import Context
from umd import fid
from umd.data import eval_batches, from_arrays, load
from umd.sharding import make_mesh

TRAIN, TEST = load("digits", "train"), load("digits", "test")
IMAGES, LABELS = TEST.arrays()
SPECS = {k: {"name": "digits", "split": k} for k in ("train", "test")}


class Artist:
  """Stands for a model: asked for a class, it copies test images of it, in the order of the keys.

  With `lies`, those of the next class.
  """

  def __init__(self, num_classes=10, lies=False):
    self.model = types.SimpleNamespace(
      num_classes=num_classes, image_size=(8, 8, 1), init=lambda key, images, t: {"params": {}}
    )
    self._lies = lies
    self._known = jnp.stack([IMAGES[np.equal(LABELS, c)][:30] for c in range(10)])

  def sample(self, params, keys, labels, **settings):
    pick = jax.vmap(lambda key: jax.random.randint(key, (), 0, 30))(keys)
    assert (labels is None) == (self.model.num_classes == 0)
    if labels is None:
      labels = pick % 10
    return 1.5 * self._known[(labels + self._lies) % 10, pick]


def make(inference, cache, num=30, batch_size=16, **settings):
  context = Context(inference, (), make_mesh(), batch_size, 0, str(cache))
  return generation.Evaluator(context, **{**SPECS, **settings}, num=num, sampling={})


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
    k: fid.frechet_distance(*moments(x), *moments(TRAIN.arrays()[0]))
    for k, x in {"": images, "_floor": IMAGES}.items()
  }
  for name, distance in distances.items():
    assert found[f"frechet_classifier{name}"] == pytest.approx(distance, rel=1e-3)
  probabilities = np.asarray(classify(images)[0])
  assert found["agreement"] == (probabilities.argmax(axis=1) == labels).mean()
  assert found["score_classifier"] == pytest.approx(fid.inception_score(probabilities), rel=1e-4)
  accuracy = (np.asarray(classify(IMAGES)[0]).argmax(axis=1) == LABELS).mean()
  assert found["classifier_accuracy"] == pytest.approx(accuracy)
  low, high = (found[f"frechet_classifier_{k}"] for k in ("floor", "ceiling"))
  position = (found["frechet_classifier"] - low) / (high - low)
  assert found["frechet_classifier_position"] == pytest.approx(position)
  assert 0 < low < high


def test_the_classifier_is_trained_when_it_is_first_needed(monkeypatch, tmp_path):
  monkeypatch.setattr(classifier, "EPOCHS", 1)
  evaluator = make(Artist(), tmp_path)
  assert not list(tmp_path.iterdir())
  assert dict(evaluator(STATE))["classifier_accuracy"] > 0.5
  assert len(list(tmp_path.iterdir())) == 1


def test_agreement_is_with_the_class_asked_for(cache):
  right, wrong = evaluate(cache), evaluate(cache, lies=True)
  assert right["agreement"] > 0.7
  assert wrong["agreement"] < 0.2


def test_a_model_without_labels_is_asked_for_none_and_has_no_agreement(cache):
  """Nor need the number of samples be a multiple of anything; the first ones are shown."""
  found = dict(make(Artist(num_classes=0), cache, num=17, rows=2, columns=3, scale=1)(STATE))
  assert "agreement" not in found
  assert "frechet_classifier" in found
  assert found["images"].pixels.shape == (2 * 9 + 1, 3 * 9 + 1, 1)


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
  known = {i.tobytes(): c for i, c in zip(as_levels(1.5 * IMAGES), LABELS, strict=True)}
  for row in range(10):
    for column in range(width):
      cell = pixels[9 * row + 1 : 9 * row + 9, 9 * column + 1 : 9 * column + 9]
      assert known[cell.tobytes()] == row


def as_levels(images):
  return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def test_rows_are_classes_spread_over_all(cache):
  evaluator = make(Artist(), cache, rows=4, columns=2, scale=1)
  pixels = dict(evaluator(STATE))["images"].pixels
  assert pixels.shape == (4 * 9 + 1, 2 * 9 + 1, 1)
  known = {i.tobytes(): c for i, c in zip(as_levels(1.5 * IMAGES), LABELS, strict=True)}
  cells = [pixels[9 * row + 1 : 9 * row + 9, 1:9] for row in range(4)]
  assert [known[cell.tobytes()] for cell in cells] == [0, 3, 6, 9]


def test_real_data_is_read_once_and_not_before_it_is_needed(cache, monkeypatch):
  read = []
  counted = lambda source, *args, **kwargs: (
    read.append(source.name) or eval_batches(source, *args, **kwargs)
  )
  monkeypatch.setattr(contexts, "eval_batches", counted)
  evaluator = make(Artist(), cache)
  assert read == []
  first, again = dict(evaluator(STATE)), dict(evaluator(STATE))
  assert sorted(read) == ["digits:test", "digits:train"]
  numbers = lambda found: {k: v for k, v in found.items() if k != "images"}
  assert numbers(first) == numbers(again)


@pytest.mark.parametrize("num", [0, 1, 15])
def test_a_number_of_samples_that_is_unfair_to_classes_is_an_error(cache, num):
  with pytest.raises(ValueError, match=rf"num={num}\b.*\b10\b"):
    make(Artist(), cache, num=num)


OTHERS = {
  "unlabelled": (IMAGES, None, 0),
  "large": (np.zeros((20, 16, 16, 1)), np.arange(20) % 10, 10),
  "few": (IMAGES, LABELS % 3, 3),
}


@pytest.mark.parametrize(
  "settings, told",
  [
    ({"train": "unlabelled"}, r"unlabelled has no labels"),
    ({"test": "unlabelled"}, r"test: unlabelled has 0 classes.* 10\b"),
    ({"test": "large"}, r"test: images of large are \(16, 16, 1\).*\(8, 8, 1\).*test\.pp"),
    ({"test": "few"}, r"test: few has 3 classes, train has 10"),
    ({"train": "few", "test": "few"}, r"train: few has 3 classes, the model has 10"),
  ],
)
def test_data_that_does_not_fit_is_an_error_that_says_what_is_what(
  cache, monkeypatch, settings, told
):
  def fake(name, split, pp=""):
    return from_arrays(name, *OTHERS[name]) if name in OTHERS else load(name, split)

  monkeypatch.setattr(contexts, "load", fake)
  with pytest.raises(ValueError, match=told):
    make(Artist(), cache, **{k: {"name": v, "split": "all"} for k, v in settings.items()})

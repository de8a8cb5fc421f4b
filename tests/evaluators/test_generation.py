"""Samples of models that copy real images, measured as by hand."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluators
from evaluators import context as contexts
from evaluators import generation
from evaluators.context import Context
from umd.data import eval_batches, from_arrays, load
from umd.devices.mesh import make_mesh
from umd.metrics import classifier, frechet, pairwise, statistics
from umd.metrics import features as extraction
from umd.metrics.classifier import load_or_train

TRAIN, TEST = load("digits", "train"), load("digits", "test")
IMAGES, LABELS = TEST.arrays()
SPECS = {k: {"name": "digits", "split": k} for k in ("train", "test")}


class Network:
  """The protocol's attributes, of a network without parameters."""

  image_size, heads, patch = (8, 8, 1), ("eps",), 1

  def __init__(self, num_classes):
    self.num_classes = num_classes

  def init(self, key, inputs, method):
    return {"params": {}}

  def predict(self, inputs, groups=1):
    raise NotImplementedError

  def represent(self, images, t, labels=None):
    raise NotImplementedError


class Artist:
  """Stands for a model: asked for a class, it copies test images of it, in the order of the keys.

  With `lies`, those of the next class.
  """

  def __init__(self, num_classes=10, lies=False):
    self.model = Network(num_classes)
    self._lies = lies
    self._known = jnp.stack([IMAGES[np.equal(LABELS, c)][:30] for c in range(10)])

  def sample(self, params, keys, labels, sampling=None):
    pick = jax.vmap(lambda key: jax.random.randint(key, (), 0, 30))(keys)
    assert (labels is None) == (self.model.num_classes == 0)
    if labels is None:
      labels = pick % 10
    return 1.5 * self._known[(labels + self._lies) % 10, pick]


def make(inference, cache, num=30, batch_size=16, **settings):
  context = Context(inference, (), make_mesh(), batch_size, 0, str(cache))
  settings = generation.Settings(**{**SPECS, **settings}, num=num, sampling={})
  return generation.Evaluator(context, settings)


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
  moments = lambda x: frechet.moments(np.asarray(classify(x)[1]))
  distances = {
    k: frechet.frechet_distance(*moments(x), *moments(TRAIN.arrays()[0]))
    for k, x in {"": images, "_floor": IMAGES}.items()
  }
  for name, distance in distances.items():
    assert found[f"frechet_classifier{name}"] == pytest.approx(distance, rel=1e-3)
  probabilities = np.asarray(classify(images)[0])
  assert found["agreement"] == (probabilities.argmax(axis=1) == labels).mean()
  assert found["score_classifier"] == pytest.approx(
    frechet.inception_score(probabilities), rel=1e-4
  )
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


# Under Inception, whose place random projections take.

REAL = {"name": "digits", "split": "test[:60]"}


def judged(inference, cache, num=30, batch_size=32, devices=4, **settings):
  mesh = make_mesh(jax.devices()[:devices])
  context = Context(inference, (), mesh, batch_size, 0, str(cache), progress=lambda line: None)
  settings = {"features": "inception", "reference": REAL, "sampling": {}, **settings}
  return generation.Evaluator(context, generation.Settings(num=num, **settings))


def drawn(num):
  """The samples of the artist, as levels."""
  labels = np.arange(num) % 10
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(num))
  return as_levels(Artist().sample({}, keys, labels))


def described(levels, features):
  rows = features(levels)
  return [frechet.moments(rows[part]) for part in ("pool", "spatial")], rows


def test_inceptions_metrics_are_those_of_the_samples_and_the_reference(small_inception, tmp_path):
  metrics = ("fid", "sfid", "is", "precision_recall", "kid")
  found = dict(judged(Artist(), tmp_path, metrics=metrics)(STATE))
  (pool, spatial), rows = described(drawn(30), small_inception)
  (real_pool, real_spatial), real = described(as_levels(IMAGES[:60]), small_inception)
  assert found["fid_30"] == pytest.approx(frechet.frechet_distance(*pool, *real_pool), rel=1e-4)
  sfid = frechet.frechet_distance(*spatial, *real_spatial)
  assert found["sfid_30"] == pytest.approx(sfid, rel=1e-4)
  probs = np.asarray(jax.nn.softmax(rows["logits"]), np.float64)
  assert found["is_30"] == pytest.approx(frechet.inception_score(probs), rel=1e-5)
  expected = pairwise.precision_recall(real["pool"], rows["pool"])
  assert (found["precision_30"], found["recall_30"]) == pytest.approx(expected)
  kid = pairwise.kernel_distance(rows["pool"], real["pool"], subset_size=30)
  assert (found["kid_30"], found["kid_std_30"]) == pytest.approx(kid, rel=1e-3)
  assert (found["reference"], found["quantize"]) == ("digits:test[:60]", "round")
  assert (found["sampler"], found["cfg_scale"]) == ("ddim, 125 steps", 1.0)


@pytest.mark.parametrize("devices, batch_size", [(1, 7), (4, 64)])
def test_samples_and_metrics_are_the_same_on_any_number_of_devices(
  small_inception, tmp_path, devices, batch_size
):
  one = dict(judged(Artist(), tmp_path)(STATE))
  other = dict(judged(Artist(), tmp_path, devices=devices, batch_size=batch_size)(STATE))
  np.testing.assert_array_equal(one["images"].pixels, other["images"].pixels)
  for name in ("fid_30", "sfid_30", "is_30"):
    assert other[name] == pytest.approx(one[name], rel=1e-4)


def test_samples_are_drawn_once_for_both_judges_and_the_pictures(small_inception, cache):
  """Traced twice: once on shapes at start, once to be compiled; the second time nothing is new."""

  class Counting(Artist):
    calls = 0

    def sample(self, *args, **kwargs):
      Counting.calls += 1
      return super().sample(*args, **kwargs)

  evaluator = judged(Counting(), cache, features="classifier+inception", **SPECS)
  found = dict(evaluator(STATE))
  assert {"agreement", "fid_30", "images"} <= found.keys()
  assert found["agreement"] == evaluate(cache)["agreement"]
  dict(evaluator(STATE))
  assert Counting.calls == 2


def test_the_reference_is_described_once_and_kept(small_inception, tmp_path, monkeypatch):
  first = dict(judged(Artist(), tmp_path)(STATE))
  assert [p.suffix for p in tmp_path.iterdir()] == [".npz"]
  monkeypatch.setattr(extraction, "describe", lambda *args, **kwargs: pytest.fail("again"))
  again = dict(judged(Artist(), tmp_path)(STATE))
  assert again["fid_30"] == first["fid_30"]
  assert again["reference"] == "digits:test[:60]"


def test_a_reference_may_be_a_file(small_inception, tmp_path):
  (pool, spatial), _ = described(as_levels(IMAGES[:60]), small_inception)
  path, both = str(tmp_path / "real.npz"), [statistics.Gaussian(*g) for g in (pool, spatial)]
  statistics.write(path, statistics.Statistics("x", 60, *both, inception="5eed"))
  with pytest.raises(ValueError, match="'real' was made with other Inception weights"):
    judged(Artist(), tmp_path, reference=path)
  statistics.write(path, statistics.Statistics("x", 60, *both))
  found = dict(judged(Artist(), tmp_path, reference=path)(STATE))
  assert found["fid_30"] == pytest.approx(dict(judged(Artist(), tmp_path)(STATE))["fid_30"], 1e-4)
  assert found["reference"] == "real"
  with pytest.raises(ValueError, match=r"'real' cannot serve \['precision_recall'\]"):
    judged(Artist(), tmp_path, reference=path, metrics=("fid", "precision_recall"))


def test_few_samples_are_told_of(small_inception, tmp_path):
  lines = []
  context = Context(Artist(), (), make_mesh(), 16, 0, str(tmp_path), progress=lines.append)
  settings = dict(features="inception", reference=REAL, sampling={})
  generation.Evaluator(context, generation.Settings(num=2040, **settings))
  assert "num=2040" in lines[0] and "2048" in lines[0]
  lines.clear()
  generation.Evaluator(context, generation.Settings(num=2050, **settings))
  assert not lines


@pytest.mark.parametrize(
  "settings, told",
  [
    ({"features": "vgg"}, r"features='vgg'.*classifier.*inception"),
    ({"features": "classifier"}, r"needs the data train= and test="),
    ({"reference": None}, r"needs reference="),
    ({"reference": "gone.npz"}, r"gone\.npz.*no such file"),
    ({"quantize": "floor"}, r"quantize='floor'.*round"),
    ({"metrics": ("fid", "fld")}, r"\['fld'\]"),
    (
      {"reference": {"name": "cats", "split": "all"}},
      r"reference: images of cats are \(16, 16, 1\)",
    ),
  ],
)
def test_settings_of_inception_that_cannot_work_are_errors(
  small_inception, monkeypatch, tmp_path, settings, told
):
  cats = from_arrays("cats", np.zeros((9, 16, 16, 1)), None, 0)
  fake = lambda name, split, pp="": cats if name == "cats" else load(name, split)
  monkeypatch.setattr(contexts, "load", fake)
  with pytest.raises((ValueError, FileNotFoundError), match=told):
    judged(Artist(), tmp_path, **settings)


def test_missing_weights_are_an_error_at_start(monkeypatch, tmp_path):
  """Before anything is trained: when evaluators are built."""

  def unreachable(*args, **kwargs):
    raise FileNotFoundError("https://weights is out of reach")

  monkeypatch.setattr(extraction, "find_network", unreachable)
  context = Context(Artist(), (), make_mesh(), 16, 0, str(tmp_path))
  settings = dict(features="inception", reference=REAL, sampling={}, num=30)
  configs = {"samples": dict(type="generation", every=1, **settings)}
  with pytest.raises(FileNotFoundError, match=r"evals\.samples: https://weights is out"):
    evaluators.from_config(configs, context)

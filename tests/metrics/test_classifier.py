"""The judge of samples: trained once, deterministically, at a bounded cost."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from umd.data import from_arrays, load
from umd.metrics import classifier
from umd.metrics.classifier import Classifier, load_or_train

TRAIN, TEST = load("digits", "train"), load("digits", "test")
IMAGES, LABELS = TEST.arrays()


@pytest.fixture
def quick(monkeypatch):
  """One epoch is enough to be far above chance."""
  monkeypatch.setattr(classifier, "EPOCHS", 1)


def forbidden(*args):
  raise AssertionError("The weights were in the cache: nothing is to be trained.")


def test_weights_are_trained_once_and_the_same_from_the_cache(quick, monkeypatch, tmp_path):
  cache = str(tmp_path / "new" / "cache")
  first = load_or_train(TRAIN, cache)(IMAGES)
  monkeypatch.setattr(classifier, "_train", forbidden)
  again = load_or_train(TRAIN, cache)(IMAGES)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert len(os.listdir(cache)) == 1
  probabilities, features = first
  assert probabilities.shape == (len(TEST), 10)
  assert features.shape == (len(TEST), classifier.FEATURES)
  np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
  assert (probabilities.argmax(axis=1) == LABELS).mean() > 0.5


def test_training_is_deterministic(quick, tmp_path):
  files = []
  for cache in (tmp_path / "a", tmp_path / "b"):
    load_or_train(TEST, str(cache))
    files.append({f.name: f.read_bytes() for f in cache.iterdir()})
  assert files[0] == files[1]


@pytest.mark.parametrize("changed", ["images", "labels", "seed"])
def test_other_data_or_another_seed_have_weights_of_their_own(monkeypatch, tmp_path, changed):
  monkeypatch.setattr(classifier, "_train", lambda model, params, *rest: params)
  load_or_train(TEST, str(tmp_path))
  arrays, seed = {"images": IMAGES.copy(), "labels": LABELS.copy()}, 0
  if changed == "seed":
    seed = 1
  else:
    arrays[changed][0] = (arrays[changed][0] + 1) % 2
  load_or_train(from_arrays("digits:test", **arrays, num_classes=10), str(tmp_path), seed)
  assert len(os.listdir(tmp_path)) == 2
  same = from_arrays("another name", IMAGES.copy(), LABELS.copy(), 10)
  load_or_train(same, str(tmp_path))
  assert len(os.listdir(tmp_path)) == 2


class Small(nn.Module):
  """The classifier of 8x8 images, layer by layer."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(32, (3, 3), name="conv1")(x))
    x = nn.relu(nn.Conv(64, (3, 3), name="conv2")(x))
    x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
    features = nn.relu(nn.Dense(64, name="hidden")(x))
    return nn.Dense(10, name="logits")(features), features


def test_small_images_are_trained_as_by_hand(quick, tmp_path):
  """One epoch over 8x8 images: the same network, initialisation, order, schedule and weights."""
  model, steps = Small(), len(TEST) // 64
  params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
  tx = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3), weight_decay=1e-2)

  def loss(params, x, y):
    logits, _ = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  @jax.jit
  def update(params, state, x, y):
    updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for ids in np.random.default_rng(0).permutation(len(TEST))[: steps * 64].reshape(steps, -1):
    params, state = update(params, state, IMAGES[ids], LABELS[ids])
  expected = model.apply({"params": params}, IMAGES[:50])[1]
  found = load_or_train(TEST, str(tmp_path))(IMAGES[:50])[1]
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  "size, side", [((8, 8, 1), 8), ((28, 28, 1), 7), ((32, 32, 3), 8), ((64, 64, 3), 8)]
)
def test_larger_images_are_halved_to_eight_pixels_first(size, side):
  model = Classifier(7)
  init = lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, *size)))
  (logits, features), variables = jax.eval_shape(init)
  assert logits.shape == (2, 7) and features.shape == (2, 64)
  params = variables["params"]
  assert params["hidden"]["kernel"].shape == ((side // 2) ** 2 * 64, 64)
  assert len(params) == 4 + {8: 0, 28: 2, 32: 2, 64: 3}[size[0]]


def test_data_without_labels_is_an_error_that_says_what_to_do(tmp_path):
  source = from_arrays("cats", IMAGES, None, 0)
  with pytest.raises(ValueError, match=r"cats has no labels.*Name labelled data"):
    load_or_train(source, str(tmp_path))


def test_data_that_is_too_large_for_memory_is_an_error_before_it_is_read(monkeypatch):
  monkeypatch.setattr(classifier, "MAX_BYTES", len(TEST) * 64 * 4 - 1)
  monkeypatch.setattr(type(TEST), "arrays", lambda self: pytest.fail("read"))
  with pytest.raises(ValueError, match=r"digits:test.*train\[:50000\]"):
    classifier.check(TEST)
  monkeypatch.setattr(classifier, "MAX_BYTES", len(TEST) * 64 * 4)
  classifier.check(TEST)

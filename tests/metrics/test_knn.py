"""Nearest neighbours: scikit-learn's with the same votes, whatever the blocks and devices."""

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from umd.devices.mesh import make_mesh
from umd.metrics import knn

KS = (1, 5, 20)


def problem(n, m, d=6, classes=5):
  """Features of both, of various lengths, and labels that they say something about."""
  rng = np.random.default_rng(0)
  centres = rng.standard_normal((classes, d))
  labels = rng.integers(0, classes, n + m)
  x = centres[labels] + 1.5 * rng.standard_normal((n + m, d))
  x *= rng.uniform(0.1, 10, (n + m, 1))
  x = x.astype(np.float32)
  return (x[:n], labels[:n]), (x[n:], labels[n:])


def reference(train, test, k):
  """scikit-learn's predictions: neighbours by cosine distance, votes exp(similarity / .07)."""
  votes = lambda distance: np.exp((1.0 - distance) / 0.07)
  model = KNeighborsClassifier(k, weights=votes, algorithm="brute", metric="cosine")
  return model.fit(*train).predict(test[0])


# All training rows at once; blocks of 256 with a last one that is not full.
@pytest.mark.parametrize("n, m, devices", [(100, 30, 1), (600, 201, 4), (513, 3, 2)])
def test_accuracies_are_those_of_sklearn(monkeypatch, n, m, devices):
  monkeypatch.setattr(knn, "BLOCK", 1)
  train, test = problem(n, m)
  found = knn.accuracies(train, test, 5, KS, make_mesh(jax.devices()[:devices]))
  expected = {k: float((reference(train, test, k) == test[1]).mean()) for k in KS}
  assert found == pytest.approx(expected)
  assert len(set(expected.values())) > 1 or m == 3


@pytest.mark.parametrize("block", [1, 2**20])
def test_neighbours_are_the_most_similar_ones_best_first(monkeypatch, block):
  monkeypatch.setattr(knn, "BLOCK", block)
  (x, _), (queries, _) = problem(700, 50)
  unit = lambda x: x / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
  similarity = unit(queries) @ unit(x).T
  found, ids = knn.nearest(x, queries, 20, make_mesh())
  np.testing.assert_array_equal(ids, np.argsort(-similarity, axis=1)[:, :20])
  np.testing.assert_allclose(found, np.take_along_axis(similarity, ids, 1), atol=1e-5)


def test_near_neighbours_outvote_many_far_ones():
  """Of class 0 one at an angle of 0, of class 1 two at right angles: exp(1 / .07) against 2."""
  x = np.array([[2.0, 0], [0, 1], [0, -3]], np.float32)
  found = knn.accuracies((x, np.array([0, 1, 1])), (x[:1], np.array([0])), 2, (1, 3), make_mesh())
  assert found == {1: 1.0, 3: 1.0}


def test_features_that_are_all_zero_are_at_chance_and_not_an_error():
  zero = np.zeros((8, 3), np.float32)
  labels = np.arange(8) % 4
  assert knn.accuracies((zero, labels), (zero, labels), 4, (8,), make_mesh()) == {8: 0.25}

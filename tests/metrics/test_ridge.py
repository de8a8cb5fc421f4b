"""Ridge regression of few-shot probes, against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge as Reference

from umd.metrics.ridge import BIAS, Ridge

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

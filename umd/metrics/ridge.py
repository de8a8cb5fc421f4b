"""Ridge regression on one-hot targets as a classifier, the way few-shot probes use it."""

import numpy as np
from jaxtyping import Float, Int

BIAS = 100.0  # The value of the constant feature: large, so that the penalty spares the bias.


class Ridge:
  """Least squares to targets +-1 with an l2 penalty; one decomposition serves all penalties.

  Features are standardised by the training examples' mean and deviation (+ 1e-5), and a constant
  feature is added. With x^T x = V diag(s) V^T the weights are V (V^T x^T y / (s + l2)). If there
  are fewer examples than features, x x^T is decomposed, for (x^T x + l2)^-1 x^T =
  x^T (x x^T + l2)^-1. All is computed in float64.
  """

  def __init__(self, x: Float[np.ndarray, "n d"], y: Int[np.ndarray, "n"], num_classes: int):
    x = x.astype(np.float64)
    self._mean, self._std = x.mean(axis=0), x.std(axis=0) + 1e-5
    x = self._features(x)
    self._primal = x.shape[1] <= x.shape[0]
    gram = x.T @ x if self._primal else x @ x.T
    self._values, self._vectors = np.linalg.eigh(gram)
    if self._primal:
      # x^T targets by sums over classes: n x classes numbers can be too many.
      sums = np.stack([x[y == c].sum(axis=0) for c in range(num_classes)], axis=1)
      self._right = self._vectors.T @ (2.0 * sums - x.sum(axis=0)[:, None])
      self._left = self._vectors
    else:
      self._right = self._vectors.T @ (2.0 * np.eye(num_classes)[y] - 1.0)
      self._left = x.T @ self._vectors

  def _features(self, x):
    x = (x.astype(np.float64) - self._mean) / self._std
    return np.concatenate([x, np.full((len(x), 1), BIAS)], axis=1)

  def weights(self, l2: float) -> Float[np.ndarray, "d1 c"]:
    """Returns coefficients of the standardised features and, last, of the constant one."""
    return self._left @ (self._right / (self._values + l2)[:, None])

  def accuracy(self, x: Float[np.ndarray, "m d"], y: Int[np.ndarray, "m"], l2: float) -> float:
    """Returns the share of examples whose largest output is their class."""
    weights, right = self.weights(l2), 0
    for start in range(0, len(x), 4096):  # Of many examples, a part is in memory at a time.
      outputs = self._features(x[start : start + 4096]) @ weights
      right += int((outputs.argmax(axis=1) == y[start : start + 4096]).sum())
    return right / len(x)

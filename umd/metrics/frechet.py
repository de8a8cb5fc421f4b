"""Frechet distance and Inception score of sets of images, from features of some network.

The caller chooses the network and the name: only with Inception's features is a Frechet distance an
FID. Metrics that compare examples in pairs are in `umd.metrics.pairwise`.
"""

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1024  # Rows that are held in float64 at a time.
ADM_SPLIT = 5000  # Samples in a split of ADM's Inception score.
FIDELITY_SPLITS, FIDELITY_SEED = 10, 2020  # Of torch-fidelity's Inception score.


class Moments:
  """Accumulates mean and covariance of rows that come in batches of any size, in float64.

  Each batch is centred on its own mean before it is squared, so that data far from zero lose
  nothing (Chan, Golub and LeVeque 1979).

  Attributes:
    count: the number of rows so far.
    mean: their mean [d], zero while there are none.
  """

  def __init__(self, dim: int):
    self.count, self.mean = 0, np.zeros(dim)
    # The scatter, the sum of the outer products of deviations from the mean, is symmetric: only its
    # lower triangle is kept. Fortran's order lets BLAS add to it in place.
    self._lower = np.zeros((dim, dim), order="F")

  def update(self, rows: Float[np.ndarray, "..."]) -> None:
    """Takes in rows [n, d]; n may be 0. Raises ValueError for rows of another width."""
    if rows.ndim != 2 or rows.shape[1] != len(self.mean):
      known = f"[n, {len(self.mean)}]"
      raise ValueError(f"rows are {list(rows.shape)}, not {known}: give features of one network.")
    for start in range(0, len(rows), CHUNK):
      self._update(rows[start : start + CHUNK])

  def _update(self, rows: np.ndarray) -> None:
    from scipy.linalg.blas import dsyrk  # SciPy's linear algebra takes .1 s to import.

    n = len(rows)
    centred = np.empty((n + 1, len(self.mean)))
    centred[:n] = rows
    mean = centred[:n].mean(axis=0)
    centred[:n] -= mean
    # With d the difference of the two means, the scatter of the union is the sum of both scatters
    # and of n m / (n + m) d d^T. As one more row of the batch, that term costs no second product.
    delta, total = mean - self.mean, self.count + n
    centred[n] = np.sqrt(self.count * n / total) * delta
    self._lower = dsyrk(1.0, centred.T, beta=1.0, c=self._lower, lower=1, overwrite_c=1)
    self.count, self.mean = total, self.mean + n / total * delta

  def merge(self, other: "Moments") -> None:
    """Takes in all rows of `other`, which stays as it is. Raises ValueError for another width."""
    if other.mean.shape != self.mean.shape:
      raise ValueError(
        f"Moments of {len(other.mean)} features cannot be merged into those of {len(self.mean)}."
      )
    delta, total = other.mean - self.mean, max(self.count + other.count, 1)
    self._lower += other._lower
    self._lower += self.count * other.count / total * np.multiply.outer(delta, delta)
    self.count, self.mean = self.count + other.count, self.mean + other.count / total * delta

  @property
  def scatter(self) -> np.ndarray:
    """The sum of the outer products of deviations from the mean, [d, d]."""
    return np.tril(self._lower) + np.tril(self._lower, -1).T

  @property
  def covariance(self) -> np.ndarray:
    """The unbiased covariance (with n - 1), [d, d]. Raises ValueError for fewer than two rows."""
    if self.count < 2:
      raise ValueError(f"A covariance needs at least 2 examples, got {self.count}.")
    return self.scatter / (self.count - 1)

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns {"count", "mean", "scatter"}, to be sent to other processes."""
    return {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter}

  @classmethod
  def from_arrays(cls, count, mean: np.ndarray, scatter: np.ndarray) -> "Moments":
    """Makes the moments whose `arrays()` are these."""
    moments = cls(len(mean))
    moments.count, moments.mean = int(count), np.array(mean, np.float64)
    moments._lower = np.array(scatter, np.float64, order="F")
    return moments


def moments(features: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean [d] and covariance [d, d] (with n - 1) of two examples or more, in float64."""
  total = Moments(features.shape[1])
  total.update(features)
  return total.mean, total.covariance


def _factor(sigma: np.ndarray) -> np.ndarray:
  """Factors sigma = F F^T with F [d, rank], by Cholesky's method with pivots, which finds the rank.

  Pivots below d * 2^-53 times the largest variance count as zero (LAPACK's choice).
  """
  from scipy.linalg.lapack import dpstrf

  lower, pivots, rank, _ = dpstrf(sigma, lower=1)
  factor = np.zeros((len(sigma), max(rank, 1)))  # Without any variance, a column of zeros.
  factor[pivots - 1, :rank] = np.tril(lower)[:, :rank]  # Fortran counts from 1.
  return factor


def frechet_distance(
  mu1: Float[np.ndarray, "_"],
  sigma1: Float[np.ndarray, "_ _"],
  mu2: Float[np.ndarray, "_"],
  sigma2: Float[np.ndarray, "_ _"],
) -> float:
  """Computes |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Frechet 1957; Heusel et al. 2017).

  With S1 = F F^T and S2 = G G^T the trace of the root is the sum of the singular values of G^T F.
  The eigenvalues of its Gram matrix, which is symmetric and of the smaller rank, are their squares:
  that is fast, and exact also where a covariance is singular. Means are [d], covariances [d, d];
  all is computed in float64. Rounding may leave a distance just below zero.

  Raises:
    ValueError: shapes do not fit one another, or values are not finite.
  """
  from scipy.linalg import eigvalsh

  mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
  for which, mu, sigma in (("first", mu1, sigma1), ("second", mu2, sigma2)):
    if mu.shape * 2 != sigma.shape:
      shapes = f"{list(mu.shape)} and {list(sigma.shape)}"
      raise ValueError(f"The {which} mean and covariance are {shapes}, but must be [d] and [d, d].")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
      raise ValueError(f"The {which} mean or covariance is not finite: are all its features?")
  if len(mu1) != len(mu2):
    raise ValueError(
      f"The first distribution is of {len(mu1)} features, the second of {len(mu2)}. Compare "
      "statistics of one and the same network."
    )
  cross = _factor(sigma2).T @ _factor(sigma1)
  gram = cross @ cross.T if cross.shape[0] < cross.shape[1] else cross.T @ cross
  squares = eigvalsh(gram, driver="evd", overwrite_a=True, check_finite=False)
  root = np.sqrt(np.maximum(squares, 0.0)).sum()
  return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2.0 * root)


def _score(count: np.ndarray, probs: np.ndarray, plogp: np.ndarray | np.floating) -> np.ndarray:
  """Computes the scores of splits from sums over their rows: of 1, of p [c], and of sum p log p.

  E sum p log(p / q) = E sum p log p - sum q log q, where q is the mean of p.
  """
  q = probs / count[:, None]
  return np.exp(plogp / count - _plogp(q))


def _plogp(p: np.ndarray) -> np.ndarray:
  """Sums p log p over each row; 0 log 0 counts as 0."""
  return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(axis=1)


def inception_score(probs: Float[np.ndarray, "n c"]) -> float:
  """Computes exp(E KL(p(y|x) || p(y))) over one split (Salimans et al. 2016), between 1 and c."""
  p = probs.astype(np.float64)
  return float(_score(np.array([len(p)]), p.sum(axis=0, keepdims=True), _plogp(p).sum())[0])


def _adm_splits(n: int) -> np.ndarray:
  """Splits samples as ADM's evaluator does: 5000 at a time in order; the last may be shorter."""
  return np.arange(n) // ADM_SPLIT


def _fidelity_splits(n: int) -> np.ndarray:
  """Splits samples as torch-fidelity does: into ten, after shuffling."""
  splits = np.empty(n, int)
  bounds = np.arange(1, FIDELITY_SPLITS) * n // FIDELITY_SPLITS
  order = np.random.RandomState(FIDELITY_SEED).permutation(n)
  splits[order] = np.searchsorted(bounds, np.arange(n), side="right")
  return splits


# n -> the split of each of n positions, by whose evaluator it is; and the least n.
SPLITTINGS = {"adm": _adm_splits, "torch-fidelity": _fidelity_splits}
LEAST = {"adm": 1, "torch-fidelity": FIDELITY_SPLITS}


class Scores:
  """Accumulates Inception scores over splits, of logits that come in any order and batch size.

  Only sums over the splits are kept, in float64.

  Attributes:
    count, probs, plogp: the sums of 1, of p [c] and of sum p log p of each split.
  """

  def __init__(self, n: int, classes: int, splitting: str = "adm"):
    """Prepares for n rows, each at a position of its own in 0..n - 1.

    Raises:
      ValueError: there are fewer rows than splits.
    """
    if n < LEAST[splitting]:
      raise ValueError(f"n={n}: splitting={splitting!r} needs at least {LEAST[splitting]} samples.")
    self._split = SPLITTINGS[splitting](n)
    self._sizes = np.bincount(self._split)
    self.count = np.zeros(len(self._sizes), np.int64)
    self.plogp = np.zeros(len(self._sizes))
    self.probs = np.zeros((len(self._sizes), classes))

  def update(self, logits: Float[np.ndarray, "_ _"], index: Int[np.ndarray, "_"]) -> None:
    """Takes in logits [b, c] of positions `index` [b].

    Raises:
      ValueError: a logit is not a number, or infinite.
    """
    if np.isnan(logits).any() or np.isposinf(logits).any():
      raise ValueError("Logits hold NaN or infinity: are all images finite?")
    logs = logits.astype(np.float64)
    logs -= logs.max(axis=1, keepdims=True)
    p = np.exp(logs)
    p /= p.sum(axis=1, keepdims=True)
    member = np.arange(len(self.count))[:, None] == self._split[index]  # [splits, b]
    self.count += member.sum(axis=1)
    self.probs += member.astype(np.float64) @ p
    self.plogp += member @ _plogp(p)

  def add(self, count: np.ndarray, probs: np.ndarray, plogp: np.ndarray) -> None:
    """Adds the `arrays()` of another part of the rows."""
    self.count = self.count + count
    self.probs = self.probs + probs
    self.plogp = self.plogp + plogp

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns {"count", "probs", "plogp"}, to be sent to other processes."""
    return {"count": self.count, "probs": self.probs, "plogp": self.plogp}

  @property
  def scores(self) -> np.ndarray:
    """The score of each split, [splits]. Raises ValueError if rows are missing or came twice."""
    if not np.array_equal(self.count, self._sizes):
      raise ValueError(
        f"{self.count.sum()} rows came for n={len(self._split)} samples, by splits "
        f"{self.count.tolist()} for {self._sizes.tolist()}. Give each position once."
      )
    return _score(self.count, self.probs, self.plogp)

  @property
  def mean(self) -> float:
    """The mean score over splits, which papers report."""
    return float(self.scores.mean())

  @property
  def std(self) -> float:
    """The standard deviation over splits (np.std)."""
    return float(self.scores.std())

"""Distances between sets of images, computed on features of some network.

What the features are is the caller's business, and so is the name: only Inception's features
make a Frechet distance an FID. What compares examples in pairs is in `umd.metrics.pairwise`.
"""

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1024  # rows that are held in float64 at a time
ADM_SPLIT = 5000  # samples in a split of ADM's Inception score
FIDELITY_SPLITS, FIDELITY_SEED = 10, 2020  # of torch-fidelity's


class Moments:
  """Mean and covariance of rows that come in batches of any size, in float64.

  Each batch is centred on its own mean before it is squared, so that data far from zero lose
  nothing (Chan, Golub and LeVeque 1979).

  Attributes:
    count: rows so far.
    mean: [d], zero while there are none.
  """

  def __init__(self, dim: int):
    self.count, self.mean = 0, np.zeros(dim)
    # Of the sum of outer products of deviations only the lower triangle is kept up to date;
    # Fortran's order lets BLAS add to it in place.
    self._lower = np.zeros((dim, dim), order="F")

  def update(self, rows: Float[np.ndarray, "..."]) -> None:
    """Takes in rows [n, d]; n may be 0.

    Raises:
      ValueError: they are not rows of d features.
    """
    if rows.ndim != 2 or rows.shape[1] != len(self.mean):
      known = f"[n, {len(self.mean)}]"
      raise ValueError(f"rows are {list(rows.shape)}, not {known}: give features of one network.")
    for start in range(0, len(rows), CHUNK):
      self._update(rows[start : start + CHUNK])

  def _update(self, rows: np.ndarray) -> None:
    from scipy.linalg.blas import dsyrk  # Takes .1 s to import, and little needs it.

    n = len(rows)
    centred = np.empty((n + 1, len(self.mean)))
    centred[:n] = rows
    mean = centred[:n].mean(axis=0)
    centred[:n] -= mean
    # What the two means differ by is one more row: a single product adds it all.
    delta, total = mean - self.mean, self.count + n
    centred[n] = np.sqrt(self.count * n / total) * delta
    self._lower = dsyrk(1.0, centred.T, beta=1.0, c=self._lower, lower=1, overwrite_c=1)
    self.count, self.mean = total, self.mean + n / total * delta

  def merge(self, other: "Moments") -> None:
    """Takes in all that `other` has seen; `other` stays as it is.

    Raises:
      ValueError: the two are of different numbers of features.
    """
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
    """Sum of the outer products of deviations from the mean, [d, d]."""
    return np.tril(self._lower) + np.tril(self._lower, -1).T

  @property
  def covariance(self) -> np.ndarray:
    """Unbiased (n - 1) covariance, [d, d].

    Raises:
      ValueError: fewer than two rows.
    """
    if self.count < 2:
      raise ValueError(f"A covariance needs at least 2 examples, got {self.count}.")
    return self.scatter / (self.count - 1)

  def arrays(self) -> dict[str, np.ndarray]:
    """{"count", "mean", "scatter"}, to be sent or saved (int64 and float64)."""
    return {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter}

  @classmethod
  def from_arrays(cls, count, mean: np.ndarray, scatter: np.ndarray) -> "Moments":
    """The moments of which `arrays()` were these."""
    moments = cls(len(mean))
    moments.count, moments.mean = int(count), np.array(mean, np.float64)
    moments._lower = np.array(scatter, np.float64, order="F")
    return moments


def moments(features: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
  """Mean [d] and covariance [d, d] (with n - 1) of features, in float64.

  Raises:
    ValueError: fewer than two examples.
  """
  found = Moments(features.shape[1])
  found.update(features)
  return found.mean, found.covariance


def _factor(sigma: np.ndarray) -> np.ndarray:
  """F [d, rank] with F F^T = sigma: Cholesky's with pivots, which finds the rank.

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
  """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Frechet 1957; Heusel et al. 2017).

  With S1 = F F^T and S2 = G G^T the trace of the root is the sum of the singular values of G^T F,
  whose Gram matrix is symmetric and of the smaller rank: fast, and exact also where a covariance is
  singular. Means are [d], covariances [d, d]; computed in float64. Rounding may leave a distance
  just below zero.

  Raises:
    ValueError: shapes that do not fit one another, or values that are not finite.
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


def _score(count: np.ndarray, probs: np.ndarray, plogp: np.ndarray) -> np.ndarray:
  """Scores [splits] by sums over rows: their number [splits], of p [splits, c], of p log p.

  E sum p log(p / q) = E sum p log p - sum q log q, where q is the mean of p.
  """
  q = probs / count[:, None]
  logs = np.log(q, out=np.zeros_like(q), where=q > 0)
  return np.exp(plogp / count - (q * logs).sum(axis=1))


def _plogp(p: np.ndarray, logs: np.ndarray) -> np.ndarray:
  """Sum of p log p of each row; 0 log 0 counts as 0."""
  return np.multiply(p, logs, out=np.zeros_like(p), where=p > 0).sum(axis=1)


def inception_score(probs: Float[np.ndarray, "n c"]) -> float:
  """exp(E KL(p(y|x) || p(y))) over one split (Salimans et al. 2016); between 1 and c.

  0 log 0 counts as 0.
  """
  p = probs.astype(np.float64)
  logs = np.log(p, out=np.zeros_like(p), where=p > 0)
  sums = [x.sum(axis=0, keepdims=True) for x in (p, _plogp(p, logs))]
  return float(_score(np.array([len(p)]), *sums)[0])


def _shuffled(n: int) -> np.ndarray:
  """torch-fidelity's split of each of n positions, in 0..9."""
  splits = np.empty(n, int)
  bounds = np.arange(1, FIDELITY_SPLITS) * n // FIDELITY_SPLITS
  order = np.random.RandomState(FIDELITY_SEED).permutation(n)
  splits[order] = np.searchsorted(bounds, np.arange(n), side="right")
  return splits


# By whose evaluator it is: n -> the split that each of n positions is in.
SPLITTINGS = {"adm": lambda n: np.arange(n) // ADM_SPLIT, "torch-fidelity": _shuffled}
LEAST = {"adm": 1, "torch-fidelity": FIDELITY_SPLITS}  # samples, for no split to be empty


class Scores:
  """Inception score over splits, of rows that come in any order and in batches of any size.

  "adm" splits as ADM's evaluator does: 5000 in the order of the samples, the last may be shorter.
  "torch-fidelity" shuffles and makes 10 splits. Only sums over the splits are kept, in float64.

  Attributes:
    count, probs, plogp: of each split the number of rows, and the sums of p [c] and of p log p.
  """

  def __init__(self, n: int, classes: int, splitting: str = "adm"):
    """`n`: how many rows there will be in all, each at its own position in 0..n - 1.

    Raises:
      ValueError: an unknown splitting, or fewer rows than splits.
    """
    if splitting not in SPLITTINGS:
      raise ValueError(f"splitting={splitting!r} is unknown: choose from {sorted(SPLITTINGS)}.")
    if n < LEAST[splitting]:
      raise ValueError(f"n={n}: splitting={splitting!r} needs at least {LEAST[splitting]} samples.")
    self._split = SPLITTINGS[splitting](n)
    self._sizes = np.bincount(self._split)
    splits = len(self._sizes)
    self.count, self.plogp = np.zeros(splits, np.int64), np.zeros(splits)
    self.probs = np.zeros((splits, classes))

  def update(
    self, rows: Float[np.ndarray, "_ _"], index: Int[np.ndarray, "_"], *, from_logits: bool = True
  ) -> None:
    """Takes in logits (or probabilities, with from_logits=False) [b, c] of positions `index` [b].

    Raises:
      ValueError: shapes do not fit, positions are not in 0..n - 1, values are not finite.
    """
    self._check(rows, index, from_logits)
    rows = rows.astype(np.float64)
    if from_logits:
      logs = rows - rows.max(axis=1, keepdims=True)
      logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
      p = np.exp(logs)
    else:
      p, logs = rows, np.log(rows, out=np.zeros_like(rows), where=rows > 0)
    member = np.arange(len(self.count))[:, None] == self._split[index]  # [splits, b]
    self.count += member.sum(axis=1)
    self.probs += member.astype(np.float64) @ p
    self.plogp += member @ _plogp(p, logs)

  def _check(self, rows: np.ndarray, index: np.ndarray, from_logits: bool) -> None:
    n, classes = len(self._split), self.probs.shape[1]
    if rows.shape != (len(index), classes):
      known = f"[b, {classes}] at b"
      raise ValueError(f"rows are {list(rows.shape)} at {len(index)} positions, not {known}.")
    if len(index) and not 0 <= index.min() <= index.max() < n:
      raise ValueError(f"Positions {index.min()}..{index.max()} are not all in 0..{n - 1} (n={n}).")
    if np.isnan(rows).any() or np.isposinf(rows).any():
      raise ValueError("rows hold NaN or infinity: are all images finite?")
    if not from_logits and (rows < 0).any():
      raise ValueError(f"A probability is {rows.min():.3g}: for logits, set from_logits=True.")

  def add(self, count: np.ndarray, probs: np.ndarray, plogp: np.ndarray) -> None:
    """Adds the `arrays()` of another part, or sums of those of several parts."""
    self.count, self.probs, self.plogp = self.count + count, self.probs + probs, self.plogp + plogp

  def merge(self, other: "Scores") -> None:
    """Takes in all that `other` has seen; ValueError unless it was begun with the same."""
    if self.probs.shape != other.probs.shape or not np.array_equal(self._split, other._split):
      raise ValueError("Scores can be merged that have the same n, classes and splitting only.")
    self.add(**other.arrays())

  def arrays(self) -> dict[str, np.ndarray]:
    """{"count", "probs", "plogp"}: plain sums, so those of several processes may be added up."""
    return {"count": self.count, "probs": self.probs, "plogp": self.plogp}

  @property
  def scores(self) -> np.ndarray:
    """The score of each split, [splits].

    Raises:
      ValueError: some rows are missing, or came twice.
    """
    if not np.array_equal(self.count, self._sizes):
      raise ValueError(
        f"{self.count.sum()} rows came for n={len(self._split)} samples, by splits "
        f"{self.count.tolist()} for {self._sizes.tolist()}. Give each position once."
      )
    return _score(self.count, self.probs, self.plogp)

  @property
  def mean(self) -> float:
    """Mean score over splits: what papers report."""
    return float(self.scores.mean())

  @property
  def std(self) -> float:
    """Standard deviation over splits (np.std)."""
    return float(self.scores.std())

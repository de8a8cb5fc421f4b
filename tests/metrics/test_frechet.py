"""Moments, Frechet distance and Inception score against closed forms, SciPy and loops."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from umd.metrics.frechet import Moments, Scores, frechet_distance, inception_score, moments


def orthogonal(d, rng):
  return np.linalg.qr(rng.standard_normal((d, d)))[0]


def gaussian(d, rng, rank=None):
  """A mean and a covariance, of full rank and well-conditioned unless `rank` is given."""
  x = rng.standard_normal((rank or 4 * d, d))
  return rng.standard_normal(d), x.T @ x / len(x)


@pytest.mark.parametrize("rotated", [False, True], ids=["diagonal", "commuting"])
def test_distance_is_the_closed_form_where_covariances_commute(rotated):
  rng, d = np.random.default_rng(0), 6
  mu1, mu2 = rng.standard_normal((2, d))
  # One variance is zero in one of the two, one in both.
  var1, var2 = np.array([1, 4, 0.3, 9, 0, 0]), np.array([2, 1, 0.3, 0.1, 5, 0])
  basis = orthogonal(d, rng) if rotated else np.eye(d)
  sigma1, sigma2 = (basis @ np.diag(v) @ basis.T for v in (var1, var2))
  expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(var1) - np.sqrt(var2)) ** 2)
  assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("d", [1, 2, 10, 40])
def test_distance_agrees_with_the_matrix_root_of_scipy_and_is_symmetric(d):
  rng = np.random.default_rng(d)
  (mu1, sigma1), (mu2, sigma2) = gaussian(d, rng), gaussian(d, rng)
  root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
  expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)
  assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)
  assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank", [None, 7], ids=["full rank", "singular"])
def test_distance_of_a_distribution_to_itself_is_zero(rank):
  mu, sigma = gaussian(30, np.random.default_rng(0), rank)
  assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-5)


def test_distance_is_right_with_fewer_samples_than_dimensions():
  rng, d = np.random.default_rng(0), 20
  few, shift = rng.standard_normal((5, d)), rng.standard_normal(d)
  # A shift moves the mean alone; a factor of 3 scales deviations, so tr (S + 9 S - 6 S) = 4 tr S.
  mu, sigma = moments(few)
  moved = frechet_distance(mu, sigma, *moments(few + shift))
  assert moved == pytest.approx(np.sum(shift**2), rel=1e-6)
  scaled = frechet_distance(mu, sigma, *moments(3 * few))
  assert scaled == pytest.approx(4 * np.sum(mu**2) + 4 * np.trace(sigma), rel=1e-6)


@pytest.mark.parametrize("ranks", [(7, 30), (30, 7), (7, 5), (0, 9)])
def test_distance_is_right_wherever_covariances_are_singular(ranks):
  """Against singular values of the data themselves, of which no root is taken."""
  rng, d = np.random.default_rng(1), 30
  x, y = (rng.standard_normal((rank, d)) * np.geomspace(1, 1e-3, d) for rank in ranks)
  sigma1, sigma2, zero = x.T @ x, y.T @ y, np.zeros(d)
  root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
  scale = np.sum(x**2) + np.sum(y**2)
  for pair in ((sigma1, sigma2), (sigma2, sigma1)):
    found = frechet_distance(zero, pair[0], zero, pair[1])
    assert found == pytest.approx(scale - 2 * root, abs=1e-10 * scale)


@pytest.mark.parametrize("decades", [0, 8, 16])
@pytest.mark.parametrize("n", [20, 100])
def test_distance_to_itself_is_zero_however_steep_the_spectrum(n, decades):
  rng, d = np.random.default_rng(0), 60
  rows = rng.standard_normal((n, d)) * np.logspace(0, -decades / 2, d) @ orthogonal(d, rng)
  mu, sigma = moments(rows)
  assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-11 * np.trace(sigma)


def test_distance_of_statistics_that_do_not_fit_is_an_error():
  of = lambda d, e=None: (np.zeros(d), np.eye(e or d))
  with pytest.raises(ValueError, match=r"first distribution is of 64 features.*second of 2048"):
    frechet_distance(*of(64), *of(2048))
  with pytest.raises(ValueError, match=r"second mean and covariance are \[4\] and \[3, 3\]"):
    frechet_distance(*of(4), *of(4, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", range(4))
def test_distance_of_statistics_that_are_not_finite_is_an_error(where, value):
  statistics = [np.zeros(3), np.eye(3), np.zeros(3), np.eye(3)]
  statistics[where][0] = value
  with pytest.raises(ValueError, match="first" if where < 2 else "second"):
    frechet_distance(*statistics)


def test_score_of_equal_rows_is_one():
  assert inception_score(np.tile([0.1, 0.2, 0.7], (5, 1))) == pytest.approx(1, rel=1e-12)


def test_score_of_certain_and_balanced_rows_is_the_number_of_classes():
  """Every row is full of zeros, and 0 log 0 is 0."""
  assert inception_score(np.tile(np.eye(7), (3, 1))) == pytest.approx(7, rel=1e-12)


def test_score_is_the_exponential_of_the_mean_divergence_from_the_mean_row():
  probs = np.random.default_rng(0).dirichlet(np.full(4, 0.3), 50)
  probs[0] = [0, 0.5, 0.5, 0]
  mean, divergence = probs.mean(axis=0), 0.0
  for row in probs:
    divergence += sum(p * np.log(p / q) for p, q in zip(row, mean, strict=True) if p > 0)
  expected = np.exp(divergence / len(probs))
  assert 1 < expected < 4
  assert inception_score(probs) == pytest.approx(expected, rel=1e-10)
  assert inception_score(probs.astype(np.float32)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n, d", [(2, 3), (9, 4), (5, 1)])
def test_moments_are_mean_and_unbiased_covariance_in_float64(n, d):
  # Far from zero: float32 sums would lose the covariance.
  features = (1000 + np.random.default_rng(0).standard_normal((n, d))).astype(np.float32)
  mean, sigma = moments(features)
  assert mean.dtype == sigma.dtype == np.float64
  exact = features.astype(np.float64)
  centre = [sum(exact[i, a] for i in range(n)) / n for a in range(d)]
  product = lambda i, a, b: (exact[i, a] - centre[a]) * (exact[i, b] - centre[b])
  expected = [
    [sum(product(i, a, b) for i in range(n)) / (n - 1) for b in range(d)] for a in range(d)
  ]
  np.testing.assert_allclose(mean, centre, rtol=1e-12)
  np.testing.assert_allclose(sigma, expected, rtol=1e-9)


@pytest.mark.parametrize("n", [0, 1])
def test_moments_of_fewer_than_two_examples_are_an_error(n):
  with pytest.raises(ValueError, match=f"at least 2.*got {n}"):
    moments(np.zeros((n, 3)))


def far_from_zero(n, d=5, dtype=np.float32):
  """Rows with mean 1e3 and deviation 1, the first two features correlated."""
  rows = np.random.default_rng(2).standard_normal((n, d))
  rows[:, 1] += rows[:, 0]
  return (1000 + rows).astype(dtype)


def exact_moments(rows):
  """Mean and covariance by two passes in extended precision."""
  rows = rows.astype(np.longdouble)
  centred = rows - rows.mean(axis=0)
  products = [
    [np.sum(centred[:, a] * centred[:, b]) for b in range(rows.shape[1])]
    for a in range(rows.shape[1])
  ]
  return np.float64(rows.mean(axis=0)), np.float64(np.array(products) / (len(rows) - 1))


def assert_equal_moments(found, rows, rtol=1e-12):
  mean, sigma = exact_moments(rows)
  assert found.count == len(rows)
  np.testing.assert_allclose(found.mean, mean, rtol=rtol)
  scale = np.sqrt(np.outer(np.diag(sigma), np.diag(sigma)))  # Covariances may be about 0.
  np.testing.assert_allclose(found.covariance / scale, sigma / scale, atol=rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
  "sizes", [[300], [1] * 300, [128, 128, 44], [0, 1, 0, 299, 0], [2, 1, 297]], ids=str
)
def test_batches_of_any_size_have_the_moments_of_all_rows(sizes, dtype):
  rows, found = far_from_zero(300, dtype=dtype), Moments(5)
  for start, end in itertools.pairwise([0, *np.cumsum(sizes)]):
    found.update(rows[start:end])
  assert_equal_moments(found, rows)


@pytest.mark.parametrize("cuts", [(0, 0), (0, 300), (1, 2), (100, 250)])
def test_parts_merge_to_the_moments_of_all_rows(cuts):
  rows, whole = far_from_zero(300), Moments(5)
  for start, end in itertools.pairwise((0, *cuts, 300)):
    part = Moments(5)
    part.update(rows[start:end])
    sent = Moments.from_arrays(**part.arrays())
    assert sent.count == part.count == end - start
    before = part.arrays()
    whole.merge(sent)
    np.testing.assert_equal(part.arrays(), before)
  assert_equal_moments(whole, rows)
  whole.update(rows)  # Merged moments go on as others do.
  assert_equal_moments(whole, np.concatenate([rows, rows]))


def random_logits(n, c=6, seed=0):
  return 3 * np.random.default_rng(seed).standard_normal((n, c))


def softmax(logits):
  e = np.exp(logits - logits.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def direct_score(probs):
  """By its definition, split by split, as evaluators write it."""
  divergence = probs * (np.log(probs) - np.log(probs.mean(axis=0)))
  return np.exp(divergence.sum(axis=1).mean())


def adm_scores(probs):
  return [direct_score(probs[i : i + 5000]) for i in range(0, len(probs), 5000)]


def fidelity_scores(probs):
  probs, n = probs[np.random.RandomState(2020).permutation(len(probs))], len(probs)
  return [direct_score(probs[i * n // 10 : (i + 1) * n // 10]) for i in range(10)]


@pytest.mark.parametrize(
  "splitting, n, direct",
  [
    ("adm", 30, adm_scores),
    ("adm", 5000, adm_scores),
    ("adm", 12_001, adm_scores),
    ("torch-fidelity", 10, fidelity_scores),
    ("torch-fidelity", 1237, fidelity_scores),
  ],
)
def test_streamed_scores_are_those_of_all_rows(splitting, n, direct):
  logits = random_logits(n)
  probs, order = softmax(logits), np.random.default_rng(1).permutation(n)
  parts = [Scores(n, 6, splitting) for _ in range(3)]
  for i, index in enumerate(np.array_split(order, 7)):
    parts[i % 3].update(logits[index], index)
  for part in parts[1:]:
    parts[0].add(**part.arrays())
  expected = direct(probs)
  np.testing.assert_allclose(parts[0].scores, expected, rtol=1e-10)
  assert parts[0].mean == pytest.approx(np.mean(expected), rel=1e-10)
  assert parts[0].std == pytest.approx(np.std(expected), rel=1e-9, abs=1e-10)


def test_torch_fidelity_says_the_same_of_its_splitting():
  torch = pytest.importorskip("torch", reason="torch is in no requirements: parity only")
  try:
    from torch_fidelity import metric_isc as isc
  except (ImportError, RuntimeError) as error:  # The latter of a torchvision for another torch.
    pytest.skip(f"torch-fidelity is in no requirements: {error}")
  logits, found = np.float32(random_logits(1237)), Scores(1237, 6, "torch-fidelity")
  found.update(logits, np.arange(1237))
  expected = isc.isc_features_to_metric(torch.from_numpy(logits))
  assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
  assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_certain_rows_score_the_number_of_classes():
  """Of logits 1e4 apart float64 makes probabilities of exactly 0; so do those of -inf."""
  found = Scores(6, 3)
  rows = 1e4 * np.tile(np.eye(3), (2, 1))
  rows[0, 1:] = -np.inf
  found.update(rows, np.arange(6))
  assert found.mean == pytest.approx(3, rel=1e-12)


def test_a_shift_of_logits_and_a_batch_of_none_do_not_matter():
  logits, found, shifted = np.float32(random_logits(20)), Scores(20, 6), Scores(20, 6)
  found.update(logits, np.arange(20))
  shifted.update(logits.astype(np.float64) + 1000.0, np.arange(20))
  shifted.update(logits[:0], np.arange(0))
  assert shifted.mean == pytest.approx(found.mean, rel=1e-10)


@pytest.mark.parametrize("value, match", [(np.nan, "NaN"), (np.inf, "infinity")])
def test_logits_that_are_not_finite_are_an_error(value, match):
  with pytest.raises(ValueError, match=match):
    Scores(9, 4).update(np.full((1, 4), value), np.array([0]))


def test_scores_of_missing_or_repeated_rows_are_an_error():
  found, logits = Scores(20, 6), random_logits(20)
  found.update(logits[:19], np.arange(19))
  with pytest.raises(ValueError, match="19 rows came for n=20"):
    _ = found.mean
  found.update(logits[:2], np.arange(2))
  with pytest.raises(ValueError, match="21 rows came for n=20"):
    _ = found.std


def test_scores_of_fewer_samples_than_splits_are_an_error():
  with pytest.raises(ValueError, match="n=9: splitting='torch-fidelity' needs at least 10"):
    Scores(9, 6, "torch-fidelity")

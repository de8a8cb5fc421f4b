"""Frechet distance and Inception score against closed forms, SciPy and loops."""

import numpy as np
import pytest
import scipy.linalg

from umd.fid import frechet_distance, inception_score, moments


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


def test_score_of_equal_rows_is_one():
  assert inception_score(np.tile([0.1, 0.2, 0.7], (5, 1))) == pytest.approx(1, rel=1e-12)


def test_score_of_certain_and_balanced_rows_is_the_number_of_classes():
  """Every row is full of zeros, and 0 log 0 is 0."""
  assert inception_score(np.tile(np.eye(7), (3, 1))) == pytest.approx(7, rel=1e-12)


def test_score_of_a_class_that_never_comes_is_finite():
  assert inception_score(np.array([[1.0, 0, 0], [0, 1, 0]])) == pytest.approx(2, rel=1e-12)


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

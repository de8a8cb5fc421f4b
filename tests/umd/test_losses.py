"""Losses against outputs of the official codes, and weights of t against their closed forms.

`golden/official_losses.npz` holds what the official DiT, MAE and MaskDiT computed; arrays are
[B, C, H, W] there, and DiT's index i is t = i + 1 here.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umd import losses
from umd.losses import Scored
from umd.masks import patchify
from umd.paths import make_path

OFFICIAL = np.load(Path(__file__).resolve().parents[1] / "golden/official_losses.npz")
LINEAR = make_path("linear", 1000)


def images(name, channels=slice(None)):
  """An official array [B, C, H, W] as images [B, H, W, C]."""
  return jnp.asarray(OFFICIAL[name][:, channels].transpose(0, 2, 3, 1))


def scored(predictions, x0, eps, x_t, t, patch=2):
  cut = lambda x: patchify(x, patch)
  return Scored({k: cut(x) for k, x in predictions.items()}, cut(x0), cut(eps), cut(x_t), t)


def test_the_reverse_step_of_a_learned_variance_is_dits():
  eps, variance = images("dit/out", slice(0, 4)), images("dit/out", slice(4, 8))
  t = jnp.asarray(OFFICIAL["dit/t"]) + 1
  mean, log_variance = losses.reverse_step(LINEAR, eps, variance, images("dit/x"), t)
  np.testing.assert_allclose(log_variance, images("dit/log_variance"), atol=2e-5)
  np.testing.assert_allclose(mean, images("dit/mean"), atol=2e-5)


def test_divergence_and_likelihood_are_dits():
  names = "mean", "log_scale", "log_prob", "x"
  mean, log_scale, log_prob, x = (OFFICIAL[f"decoder/{name}"] for name in names)
  likelihood = losses.discretised_log_likelihood(x, mean, 2 * log_scale)
  well_conditioned = log_prob > -8  # A difference of float32 numbers near 1 beyond.
  assert well_conditioned.sum() > 20
  np.testing.assert_allclose(likelihood[well_conditioned], log_prob[well_conditioned], atol=1e-4)
  other_mean, other, value = (OFFICIAL[f"kl/{name}"] for name in ("mean2", "logvar2", "value"))
  kl = losses.gaussian_kl(mean, 2 * log_scale, other_mean, other)
  np.testing.assert_allclose(kl, value, rtol=1e-4, atol=1e-5)


def bound_by_hand(eps, variance, x0, x_t, t):
  """The variational bound of one image in bits per dimension, in float64, from DiT's formulas."""
  alpha_bar = np.cumprod([1.0, *(1 - np.linspace(1e-4, 2e-2, 1000))])
  beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
  of = lambda t: (1 - alpha_bar[t] / alpha_bar[t - 1]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
  true_log_variance = np.log(of(max(t, 2)))
  fraction = (variance + 1) / 2
  log_variance = fraction * np.log(beta) + (1 - fraction) * true_log_variance
  x0_prediction = (x_t - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t])

  def mean(x0):
    first = beta * np.sqrt(alpha_bar[t - 1]) * x0
    return (first + (1 - alpha_bar[t - 1]) * np.sqrt(1 - beta) * x_t) / (1 - alpha_bar[t])

  if t == 1:
    return -np.mean(
      losses.discretised_log_likelihood(x0, mean(x0_prediction), log_variance)
    ) / np.log(2)
  gap = true_log_variance - log_variance
  square = (mean(x0) - mean(x0_prediction)) ** 2 * np.exp(-log_variance)
  return np.mean(0.5 * (np.exp(gap) - gap - 1 + square)) / np.log(2)


def test_the_variational_bound_is_the_one_computed_by_hand():
  rng = np.random.default_rng(0)
  t = np.array([1, 2, 500, 1000])
  x0, eps, guess, variance = rng.uniform(-0.9, 0.9, (4, 4, 4, 4, 3))
  x_t = np.asarray(
    LINEAR.combine("x_t", *(jnp.asarray(x, jnp.float32) for x in (x0, eps)), jnp.asarray(t))
  )
  # A small mistake at t = 1, where the likelihood would be ill-conditioned, and larger ones later.
  guess = eps + np.array([0.01, 1, 1, 1])[:, None, None, None] * guess
  arrays = [jnp.asarray(x, jnp.float32) for x in (guess, variance, x0, eps, x_t)]
  predictions = {"eps": arrays[0], "variance": arrays[1]}
  example = scored(predictions, *arrays[2:], jnp.asarray(t))
  bound = losses.variational_bound(LINEAR, "variance", "", example).mean(axis=1)
  want = [bound_by_hand(guess[i], variance[i], x0[i], x_t[i], t[i]) for i in range(4)]
  np.testing.assert_allclose(bound, want, rtol=2e-3)


def test_the_variational_bound_trains_the_variance_alone():
  rng = np.random.default_rng(0)
  x0, eps, guess, variance = jnp.asarray(rng.uniform(-1, 1, (4, 2, 4, 4, 3)), jnp.float32)
  t = jnp.array([1, 500])
  x_t = LINEAR.combine("x_t", x0, eps, t)

  def total(guess, variance):
    predictions = {"eps": guess, "variance": variance}
    example = scored(predictions, x0, eps, x_t, t)
    return losses.variational_bound(LINEAR, "variance", "", example).sum()

  of_eps, of_variance = jax.grad(total, (0, 1))(guess, variance)
  assert not np.any(of_eps) and np.all(of_variance)


@pytest.mark.parametrize("loss, official", [("mse", 0), ("norm_pix", 1)])
def test_errors_of_patches_are_maes(loss, official):
  """MAE's patches are (row, column, channel) like ours; one of them is constant."""
  x0 = images("mae/images")
  clean = scored({}, x0, jnp.zeros_like(x0), x0, jnp.zeros(3, jnp.int32), patch=4)
  example = clean._replace(predictions={"x0": jnp.asarray(OFFICIAL["mae/pred"])})
  error = losses.LOSSES[loss](LINEAR, "x0", "x0", example)
  np.testing.assert_allclose(error, OFFICIAL[f"mae/loss_per_patch_{official}"], rtol=5e-5)


T = jnp.array([1, 10, 300, 1000])


def snr(path):
  alpha, sigma = path.coefs("x_t", T)
  return np.asarray(alpha / sigma, np.float64) ** 2


@pytest.mark.parametrize("head, scale", [("x0", lambda s: 1), ("eps", lambda s: s)])
def test_min_snr_bounds_how_much_an_error_in_x0_counts(head, scale):
  weight = losses.min_snr(LINEAR, head, T)
  want = np.minimum(snr(LINEAR), 5) / scale(snr(LINEAR))
  np.testing.assert_allclose(weight, want, rtol=1e-5)


def test_an_error_in_v_is_one_in_x0_times_the_root_of_snr_plus_1():
  """So Min-SNR weighs the same mistake alike, whichever head makes it."""
  rng = np.random.default_rng(0)
  x0, eps, wrong = jnp.asarray(rng.standard_normal((3, 4, 1, 12)), jnp.float32)
  totals = []
  for head in ("x0", "v"):
    right, guess = (LINEAR.combine(head, x, eps, T) for x in (x0, wrong))
    x_t = LINEAR.combine("x_t", x0, eps, T)
    # The head that explains x_t by `wrong` instead of x0, with the noise that follows.
    alpha, sigma = (c[:, None, None] for c in LINEAR.coefs("x_t", T))
    guess = LINEAR.combine(head, wrong, (x_t - alpha * wrong) / sigma, T)
    error = jnp.square(guess - right).mean((1, 2))
    totals.append(losses.min_snr(LINEAR, head, T) * error)
  np.testing.assert_allclose(totals[0], totals[1], rtol=1e-3)


def test_logit_normal_weights_are_a_density():
  path = make_path("flow", 1000)
  weight = losses.logit_normal(path, "v", jnp.arange(1, 1000))
  assert float(weight.mean()) == pytest.approx(1, abs=1e-2)
  np.testing.assert_allclose(weight, weight[::-1], rtol=1e-3)
  assert weight[0] < 0.01 < weight[499]

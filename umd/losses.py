"""Losses: the error of a prediction on every token, and how much a time counts.

An error compares one head of the network with what the path says it should be. All quantities come
in patches, [B, N, P * P * C], so that an error is a mean over the pixels of a patch, [B, N]; the
objective then averages over the tokens that a term scores. A time t is [B], or [B, N] where every
token has its own.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from umd.paths import Path

NORM_PIX_EPS = 1e-6  # MAE's, under the root of a patch's variance
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023
SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1] (Karras et al. 2022)
BIN = 1 / 255  # half the width of one of the 256 levels of a pixel in [-1, 1]


class Scored(NamedTuple):
  """What the terms of a stream compare.

  Attributes:
    predictions: {head: [B, N, P * P * C]} of the network.
    x0: clean images in patches, [B, N, P * P * C].
    eps: the noise in them, likewise.
    x_t: what the network was shown, likewise; also of patches that were masked.
    t: times, [B] or [B, N].
  """

  predictions: Mapping[str, Array]
  x0: Array
  eps: Array
  x_t: Array
  t: Array


def mse(path: Path, head: str, target: str, scored: Scored) -> Float[Array, "b n"]:
  """Mean squared error of a head against `target`, a quantity of the path."""
  wanted = path.combine(target, scored.x0, scored.eps, scored.t)
  return jnp.square(scored.predictions[head] - wanted).mean(axis=-1)


def norm_pix_mse(path: Path, head: str, target: str, scored: Scored) -> Float[Array, "b n"]:
  """Mean squared error against a target whose patches are standardised (MAE: He et al. 2022).

  Each patch of the target has its own mean subtracted and is divided by its own standard deviation,
  sqrt(var + 1e-6) with the unbiased variance over its P * P * C numbers, as in the official code.
  """
  wanted = path.combine(target, scored.x0, scored.eps, scored.t)
  mean = wanted.mean(axis=-1, keepdims=True)
  variance = wanted.var(axis=-1, keepdims=True, ddof=1)
  wanted = (wanted - mean) / jnp.sqrt(variance + NORM_PIX_EPS)
  return jnp.square(scored.predictions[head] - wanted).mean(axis=-1)


def _posterior_tables(path: Path) -> dict[str, np.ndarray]:
  """Coefficients of q(x_{t-1} | x_t, x0) and log-variances of a step at t = 0..T, float64.

  Row t describes the step from t to t - 1 of a discrete path; row 0 repeats row 1. The posterior's
  variance is 0 at t = 1, so its logarithm there is replaced by the one at t = 2 (Nichol & Dhariwal
  2021).
  """
  alpha_bar = np.square(path.coefs("x_t", path.grid)[0])
  now, before = alpha_bar[1:], alpha_bar[:-1]
  beta = 1.0 - now / before
  variance = beta * (1.0 - before) / (1.0 - now)
  variance[0] = variance[min(1, len(variance) - 1)]
  rows = {
    "x0": beta * np.sqrt(before) / (1.0 - now),
    "x_t": (1.0 - before) * np.sqrt(1.0 - beta) / (1.0 - now),
    "log_beta": np.log(beta),
    "log_variance": np.log(variance),
  }
  return {name: np.concatenate([row[:1], row]) for name, row in rows.items()}


def gaussian_kl(mean, log_variance, other_mean, other_log_variance) -> Array:
  """KL(N(mean, exp(log_variance)) || N(other_mean, ...)) in nats, elementwise."""
  difference = log_variance - other_log_variance
  scaled = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
  return 0.5 * (jnp.exp(difference) - difference - 1.0 + scaled)


def discretised_log_likelihood(x0, mean, log_variance) -> Array:
  """log P of the 8-bit level that x0 in [-1, 1] stands for, under a Gaussian, in nats, elementwise.

  The distribution function is the tanh approximation of the official code, and so are the guards;
  the two outermost levels take all that lies beyond them (Ho et al. 2020, eq. 13).
  """

  def cdf(u):
    return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (u + 0.044715 * u**3)))

  precision = jnp.exp(-0.5 * log_variance)
  upper = cdf(precision * (x0 - mean + BIN))
  lower = cdf(precision * (x0 - mean - BIN))
  inside = jnp.log(jnp.maximum(upper - lower, 1e-12))
  lowest, highest = jnp.log(jnp.maximum(upper, 1e-12)), jnp.log(jnp.maximum(1.0 - lower, 1e-12))
  return jnp.where(x0 < -0.999, lowest, jnp.where(x0 > 0.999, highest, inside))


def reverse_step(
  path: Path, eps: Array, variance: Array, x_t: Array, t: Shaped[Array, "*b"]
) -> tuple[Array, Array]:
  """(mean, log-variance) of p(x_{t-1} | x_t) of a network with learned variance, t >= 1.

  The network's second output v in [-1, 1] interpolates in the logarithm between the smallest and
  the largest sensible variance (Nichol & Dhariwal 2021, eq. 15):
  log var = f log beta_t + (1 - f) log posterior variance, f = (v + 1) / 2. Nothing is clipped.
  """
  tables = _posterior_tables(path)
  row = lambda name: _along(jnp.asarray(tables[name], jnp.float32)[t], x_t)
  fraction = (variance + 1.0) / 2.0
  log_variance = fraction * row("log_beta") + (1.0 - fraction) * row("log_variance")
  x0, _ = path.invert("eps", eps, x_t, t)
  return row("x0") * x0 + row("x_t") * x_t, log_variance


def variational_bound(path: Path, head: str, target: str, scored: Scored) -> Float[Array, "b n"]:
  """The term of the variational bound at t, in bits per dimension, of a learned variance.

  `head` is the variance v, which has no target of its own (`target` is not read): the loss compares
  whole distributions, KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and at t = 1 the likelihood of
  the 8-bit image (Nichol & Dhariwal 2021, eq. 4-7). The predicted noise enters with its gradient
  stopped, so that this term trains the variance alone and the mean squared error the mean.
  """
  eps = jax.lax.stop_gradient(scored.predictions["eps"])
  mean, log_variance = reverse_step(path, eps, scored.predictions[head], scored.x_t, scored.t)
  tables = _posterior_tables(path)
  row = lambda name: _along(jnp.asarray(tables[name], jnp.float32)[scored.t], scored.x_t)
  true_mean = row("x0") * scored.x0 + row("x_t") * scored.x_t
  kl = gaussian_kl(true_mean, row("log_variance"), mean, log_variance)
  likelihood = discretised_log_likelihood(scored.x0, mean, log_variance)
  nats = jnp.where(_along(scored.t, kl) > 1, kl, -likelihood)
  return nats.mean(axis=-1) / np.log(2.0)


def _along(t: Array, x: Array) -> Array:
  """Appends axes to t so that it broadcasts against x."""
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


LOSSES: Mapping[str, Callable] = {
  "mse": mse,
  "norm_pix": norm_pix_mse,
  "vb": variational_bound,
}
# Losses of heads that are no quantity of the path, and the other heads that each reads.
WITHOUT_TARGET: Mapping[str, tuple[str, ...]] = {"vb": ("eps",)}


def one(path: Path, head: str, t: Array) -> float:
  """Every time counts alike."""
  return 1.0


def min_snr(path: Path, head: str, t: Array) -> Array:
  """Min-SNR-gamma (Hang et al. 2023): an error in x0 counts min(SNR, 5), whatever the head.

  SNR = (alpha / sigma)^2. An error in eps is one in x0 times sqrt(SNR), one in v times
  sqrt(SNR + 1), so that their weights are min(SNR, 5) / SNR and min(SNR, 5) / (SNR + 1).
  """
  alpha, sigma = path.coefs("x_t", t)
  snr = jnp.square(alpha / sigma)
  per_head = {"x0": 1.0, "eps": snr, "v": snr + 1.0}
  return jnp.minimum(snr, MIN_SNR_GAMMA) / per_head[head]


def edm(path: Path, head: str, t: Array) -> Array:
  """EDM (Karras et al. 2022, table 1): (s^2 + s_d^2) / (s s_d)^2 with s = sigma / alpha.

  It makes an error in x0 as large as the error of the network's own output, F, which has unit
  variance.
  """
  alpha, sigma = path.coefs("x_t", t)
  noise = sigma / alpha
  return (jnp.square(noise) + SIGMA_DATA**2) / jnp.square(noise * SIGMA_DATA)


def logit_normal(path: Path, head: str, t: Array) -> Array:
  """The density of a logit-normal(0, 1) time, for t drawn uniformly (Esser et al. 2024).

  exp(-logit(s)^2 / 2) / (sqrt(2 pi) s (1 - s)) with s = t / T: in expectation the same as drawing
  the times so, with less weight where the task is trivial or hopeless. It is 0 at both ends.
  """
  share = jnp.clip(t / path.end, 1e-5, 1.0 - 1e-5)
  logit = jnp.log(share / (1.0 - share))
  return jnp.exp(-0.5 * jnp.square(logit)) / (np.sqrt(2.0 * np.pi) * share * (1.0 - share))


WEIGHTS: Mapping[str, Callable] = {
  "one": one,
  "min_snr": min_snr,
  "edm": edm,
  "logit_normal": logit_normal,
}

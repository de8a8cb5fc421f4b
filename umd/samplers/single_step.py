"""Samplers whose steps know of x_t alone."""

import jax
import jax.numpy as jnp

from umd.paths import Path
from umd.samplers.core import Denoiser, Sampler, State, added_variance, posterior_std, step_noise


def ddim(denoise: Denoiser, path: Path, *, eta: float = 0.0, spacing: str = "uniform") -> Sampler:
  """DDIM (Song et al. 2021), eq. 12, for any path; eta = 0 is deterministic, 1 is ancestral.

  With eta = 0 it is Euler's method in sigma / alpha, and on the flow path also in time: there it is
  what is called the Euler sampler.

  Raises:
    ValueError: eta is outside [0, 1], where the noise would exceed what x_s holds.
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"eta={eta} must be in [0, 1]: 0 is deterministic, 1 ancestral.")

  def step(state, keys, t, s):
    x0, eps = denoise(state.x, t)
    if not eta:  # Draws no noise that would count for nothing.
      return State(path.combine("x_t", x0, eps, s)), x0
    alpha, sigma = path.coefs("x_t", s)
    std = eta * posterior_std(path, t, s)
    kept = jnp.sqrt(jnp.maximum(sigma**2 - std**2, 0.0))
    return State(alpha * x0 + kept * eps + std * step_noise(keys, t, x0)), x0

  return Sampler(path, step, spacing=spacing)


def ddpm(denoise: Denoiser, path: Path, *, spacing: str = "uniform") -> Sampler:
  """Ancestral sampling (Ho et al. 2020), eq. 6-7: draws x_s from q(x_s | x_t, x0)."""

  def step(state, keys, t, s):
    x0, _ = denoise(state.x, t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefs("x_t", t), path.coefs("x_t", s)
    added = added_variance(path, t, s)
    mean = alpha_s * added * x0 + alpha_t / alpha_s * sigma_s**2 * state.x
    noise = posterior_std(path, t, s) * step_noise(keys, t, x0)
    return State(mean / sigma_t**2 + noise), x0

  return Sampler(path, step, spacing=spacing)


def heun(denoise: Denoiser, path: Path, *, spacing: str = "uniform") -> Sampler:
  """Heun's second-order method on d x / d time = v (Karras et al. 2022, algorithm 1).

  Predicts with a DDIM step, corrects with the mean of the velocities at both ends. v stays finite
  at both ends of every path, where 1 / alpha and 1 / sigma do not. The last step is DDIM's alone:
  at t = 0 there is nothing left to denoise. Two evaluations a step, but for the last.

  On the flow path the error falls with the square of the number of steps. The cosine and linear
  schedules leave t = 0 like sqrt(t), so there the last step is long and the order lies between
  one and two.
  """
  time = jnp.asarray(path.time, jnp.float32)

  def step(state, keys, t, s):
    del keys
    x0, eps = denoise(state.x, t)
    velocity = path.combine("v", x0, eps, t)
    predicted = path.combine("x_t", x0, eps, s)

    def corrected(_):
      v = path.combine("v", *denoise(predicted, s), s)
      return state.x + (time[s] - time[t]) * (velocity + v) / 2

    return State(jax.lax.cond(s > 0, corrected, lambda _: predicted, None)), x0

  return Sampler(path, step, spacing=spacing)

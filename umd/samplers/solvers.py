"""Samplers whose steps know of x_t alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umd.paths import Path
from umd.samplers.sampler import (
  Denoiser,
  Images,
  Sampler,
  State,
  added_variance,
  posterior_std,
  step_noise,
)
from umd.samplers.timesteps import half_log_snr


class History(NamedTuple):
  """What was said at the step before.

  Attributes:
    said: x0, or a velocity.
    t: the timestep of it; 0, at which nothing is ever said, if there was no step before.
  """

  said: Images
  t: Int[Array, ""]


def _nothing(x: Images) -> History:
  return History(jnp.zeros_like(x), jnp.int32(0))


def _gain(
  clock: Float[Array, "t"], history: History, t: Int[Array, ""], s: Int[Array, ""]
) -> Float[Array, ""]:
  """By how much of the last change what is said at t is to change until the middle of the step.

  Changes are taken for linear in `clock`. 0 where nothing came before, and on the step to s = 0:
  the last one is of first order, as it lands on the x0 of its denoiser.
  """
  gain = (clock[s] - clock[t]) / (2 * (clock[t] - clock[history.t]))
  return jnp.where((history.t > t) & (s > 0), gain, 0.0)


def dpmpp_2m(denoise: Denoiser, path: Path, *, spacing: str = "uniform") -> Sampler:
  """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

  x0 is taken for linear in lambda = log(alpha / sigma), half the log-SNR, and the rest of the
  probability flow is solved exactly: a DDIM step with x0 extrapolated to the middle of the step.
  The first step is DDIM's. So is the last, where lambda is infinite: it lands on x0. One evaluation
  a step.
  """
  clock = jnp.asarray(half_log_snr(path), jnp.float32)

  def step(state, keys, t, s):
    del keys
    x0, _ = denoise(state.x, t)
    middle = x0 + _gain(clock, state.history, t, s) * (x0 - state.history.said)
    alpha, sigma = path.coefs("x_t", t)
    x = path.combine("x_t", middle, (state.x - alpha * middle) / sigma, s)
    return State(x, History(x0, t)), x0

  return Sampler(path, step, _nothing, spacing)


def ab2(denoise: Denoiser, path: Path, *, spacing: str = "uniform") -> Sampler:
  """The two-step Adams-Bashforth method on d x / d time = v, for steps of any lengths.

  v stays finite at both ends of every path, and on the flow path it is what the network learns and
  nearly constant, so that this is the multistep method for flow matching. The first step is DDIM's,
  which on the flow path is Euler's; so is the last, which lands on x0. One evaluation a step.
  """
  clock = jnp.asarray(path.time, jnp.float32)

  def step(state, keys, t, s):
    del keys
    x0, eps = denoise(state.x, t)
    v, gain = path.combine("v", x0, eps, t), _gain(clock, state.history, t, s)
    middle = v + gain * (v - state.history.said)
    euler = path.combine("x_t", x0, eps, s)
    x = jnp.where(gain > 0, state.x + (clock[s] - clock[t]) * middle, euler)
    return State(x, History(v, t)), x0

  return Sampler(path, step, _nothing, spacing)


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

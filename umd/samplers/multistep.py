"""Samplers of second order with one evaluation a step: they remember what the last one said."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umd.paths import Path
from umd.samplers.core import Denoiser, Images, Sampler, State
from umd.samplers.schedule import half_log_snr


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

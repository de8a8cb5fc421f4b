"""Solvers: each takes one step from x_t to x_s at an earlier time s < t.

With an exact denoiser, the probability flow carries noise at the end of the path to images at
t = 0: d x / d tau = v, where tau is the path's own coordinate of time. All solvers approximate
this one curve, or, for ddpm and ddim with eta > 0, a random walk with the same marginals.

Symbols are those of the papers: x_t = alpha_t x0 + sigma_t eps, and lambda = log(alpha / sigma) is
half the logarithm of the signal-to-noise ratio. x0 and eps stand for what the denoiser makes of
x_t. The step to s = 0 always lands on x0: at t = 0 there is nothing left to denoise.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from umd.paths import Path

Images = Float[Array, "b h w c"]
Time = Shaped[Array, ""]  # int32 where the path's times are whole numbers.
Denoiser = Callable[[Images, Time], tuple[Images, Images]]


class History(NamedTuple):
  """What a multistep solver remembers of the step before.

  Attributes:
    value: x0 or a velocity, as the denoiser had it.
    t: the time of it; 0, at which nothing is denoised, if there was no step before.
  """

  value: Images
  t: Time


class State(NamedTuple):
  """Where a sampler is.

  Attributes:
    x: x_t.
    history: what the next step uses of the step before; () for a solver that uses nothing.
  """

  x: Images
  history: Any = ()


# `(state at t, keys [B], t, s) -> (state at s, the x0 that the denoiser saw in x_t)`.
Step = Callable[[State, Array, Time, Time], tuple[State, Images]]


def step_noise(keys: Array, t: Time, x: Images) -> Images:
  """Draws standard normal noise for the step at t, each image's from its own key."""
  # Streams of noise are told apart by integers, which a real time becomes by its bits.
  label = t if jnp.issubdtype(t.dtype, jnp.integer) else jax.lax.bitcast_convert_type(t, jnp.int32)
  draw = lambda key: jax.random.normal(jax.random.fold_in(key, label), x.shape[1:])
  return jax.vmap(draw)(keys)


def added_variance(path: Path, t: Time, s: Time) -> Float[Array, ""]:
  """Returns the variance of q(x_t | x_s), s < t, for the path taken as a Markov chain."""
  (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefs("x_t", t), path.coefs("x_t", s)
  # The maximum, because float32 may round the difference below zero.
  return jnp.maximum(sigma_t**2 - (alpha_t * sigma_s / alpha_s) ** 2, 0.0)


def posterior_std(path: Path, t: Time, s: Time) -> Float[Array, ""]:
  """Returns the standard deviation of q(x_s | x_t, x0), s < t, for the same chain."""
  sigma_t, sigma_s = path.coefs("x_t", t)[1], path.coefs("x_t", s)[1]
  return sigma_s / sigma_t * jnp.sqrt(added_variance(path, t, s))


def ddim(denoise: Denoiser, path: Path, *, eta: float = 0.0) -> Step:
  """DDIM (Song et al. 2021, arXiv:2010.02502), eq. 12, for any path.

  It draws x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z, with std = eta times the
  deviation of the posterior. eta = 0 is deterministic: Euler's method in sigma / alpha, and on the
  flow path also in t. eta = 1 is ancestral sampling.
  """

  def step(state, keys, t, s):
    x0, eps = denoise(state.x, t)
    if not eta:  # Nothing is drawn that would be multiplied by zero.
      return State(path.combine("x_t", x0, eps, s)), x0
    alpha, sigma = path.coefs("x_t", s)
    std = eta * posterior_std(path, t, s)
    kept = jnp.sqrt(jnp.maximum(sigma**2 - std**2, 0.0))
    return State(alpha * x0 + kept * eps + std * step_noise(keys, t, x0)), x0

  return step


def ddpm(denoise: Denoiser, path: Path) -> Step:
  """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239), eq. 6-7: draws from q(x_s | x_t, x0)."""

  def step(state, keys, t, s):
    x0, _ = denoise(state.x, t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefs("x_t", t), path.coefs("x_t", s)
    added = added_variance(path, t, s)
    mean = alpha_s * added * x0 + alpha_t / alpha_s * sigma_s**2 * state.x
    noise = posterior_std(path, t, s) * step_noise(keys, t, x0)
    return State(mean / sigma_t**2 + noise), x0

  return step


def heun(denoise: Denoiser, path: Path) -> Step:
  """Heun's second-order method on d x / d tau = v (Karras et al. 2022, algorithm 1).

  It predicts with a DDIM step and corrects with the mean of the velocities at both ends. v stays
  finite at both ends of every path, where 1 / alpha and 1 / sigma do not. Two evaluations a step,
  but one for the last.

  On the flow path the error falls with the square of the number of steps. The cosine and linear
  schedules leave t = 0 like sqrt(t), so there the last step is long and the order lies between one
  and two.
  """

  def step(state, keys, t, s):
    del keys
    x0, eps = denoise(state.x, t)
    v_t = path.combine("v", x0, eps, t)
    predicted = path.combine("x_t", x0, eps, s)

    def corrected(_):
      v_s = path.combine("v", *denoise(predicted, s), s)
      return state.x + (path.progress(s) - path.progress(t)) * (v_t + v_s) / 2

    return State(jax.lax.cond(s > 0, corrected, lambda _: predicted, None)), x0

  return step


def _extrapolation(
  clock: Callable[[Time], Float[Array, ""]], history: History, t: Time, s: Time
) -> Float[Array, ""]:
  """Returns how much of the last change is to be added, to reach the middle of the step.

  A quantity that is linear in `clock` and was f(r) at the step before and is f(t) now is
  f(t) + (clock(s) - clock(t)) / (2 (clock(t) - clock(r))) (f(t) - f(r)) half-way to s. The factor
  is 0 where there was no step before, and on the step to s = 0, which lands on x0.
  """
  gain = (clock(s) - clock(t)) / (2 * (clock(t) - clock(history.t)))
  return jnp.where((history.t > t) & (s > 0), gain, 0.0)


def dpmpp_2m(denoise: Denoiser, path: Path) -> Step:
  """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

  x0 is taken for linear in lambda, and the rest of the probability flow is solved exactly: this is
  a DDIM step with x0 extrapolated to the middle of the step. The first step is DDIM's. So is the
  last, where lambda is infinite. One evaluation a step.
  """

  def step(state, keys, t, s):
    del keys
    x0, _ = denoise(state.x, t)
    gain = _extrapolation(path.half_log_snr, state.history, t, s)
    middle = x0 + gain * (x0 - state.history.value)
    alpha, sigma = path.coefs("x_t", t)
    x = path.combine("x_t", middle, (state.x - alpha * middle) / sigma, s)
    return State(x, History(x0, t)), x0

  return step


def ab2(denoise: Denoiser, path: Path) -> Step:
  """The two-step Adams-Bashforth method on d x / d tau = v, for steps of any lengths.

  v stays finite at both ends of every path. On the flow path it is what the network learns, and it
  is nearly constant, so that this is the multistep method for flow matching. The first step is
  DDIM's, which on the flow path is Euler's; so is the last. One evaluation a step.
  """

  def step(state, keys, t, s):
    del keys
    x0, eps = denoise(state.x, t)
    v = path.combine("v", x0, eps, t)
    gain = _extrapolation(path.progress, state.history, t, s)
    middle = v + gain * (v - state.history.value)
    euler = path.combine("x_t", x0, eps, s)
    x = jnp.where(gain > 0, state.x + (path.progress(s) - path.progress(t)) * middle, euler)
    return State(x, History(v, t)), x0

  return step


@dataclasses.dataclass(frozen=True)
class Solver:
  """A solver as data.

  Attributes:
    make: `(denoise, path, **options) -> Step`.
    options: the fields of `Sampling` that only some solvers take and that this one does.
    multistep: whether a step uses the one before.
    evaluations: how often so many steps ask the denoiser.
  """

  make: Callable[..., Step]
  options: tuple[str, ...] = ()
  multistep: bool = False
  evaluations: Callable[[int], int] = lambda steps: steps


SOLVERS: Mapping[str, Solver] = {
  "ddim": Solver(ddim, options=("eta",)),
  "ddpm": Solver(ddpm),
  "heun": Solver(heun, evaluations=lambda steps: 2 * steps - 1),
  "dpmpp_2m": Solver(dpmpp_2m, multistep=True),
  "ab2": Solver(ab2, multistep=True),
}

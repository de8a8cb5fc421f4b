"""Samplers: from noise to images along a path, given a denoiser.

A sampler never sees a model. It asks `denoise(x_t, t) -> (x0, eps)` for the two ends of the path
as they look from x_t (t is one int32 scalar for the whole batch), exactly `steps` times (Heun:
2 * steps - 1 times), and returns x0. The last step lands on t = 0, where x_t is x0 itself.

`keys` holds one key per image, so that an image depends on its own key and noise and on nothing
else in its batch. Deterministic samplers take it all the same, and ignore it.

A sampler is a step, from x_t to x_s at an earlier timestep s < t, and `walk` takes it from T to 0.
`trace` and `inpaint` take the same steps in other ways.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umd.paths import Path

Images = Float[Array, "b h w c"]
Denoiser = Callable[[Images, Int[Array, ""]], tuple[Images, Images]]
# `step(x_t, keys, t, s) -> (x_s, the x0 that x_t was taken for)`
Step = Callable[[Images, Array, Int[Array, ""], Int[Array, ""]], tuple[Images, Images]]


def step_schedule(steps: int, timesteps: int) -> np.ndarray:
  """S + 1 strictly decreasing timesteps from T to 0, evenly spaced up to rounding.

  Raises:
    ValueError: not 1 <= steps <= timesteps.
  """
  if not 1 <= steps <= timesteps:
    raise ValueError(f"steps={steps} must be in [1, timesteps={timesteps}].")
  return np.round(np.linspace(timesteps, 0, steps + 1)).astype(np.int32)


def clip_x0(denoise: Denoiser, path: Path, bound: float = 1.0) -> Denoiser:
  """Clips x0 to [-bound, bound] and moves eps along, so that both still explain x_t."""

  def clipped(x_t, t):
    x0 = jnp.clip(denoise(x_t, t)[0], -bound, bound)
    alpha, sigma = path.coefs("x_t", t)
    return x0, (x_t - alpha * x0) / sigma

  return clipped


def _pairs(path: Path, steps: int) -> tuple[Array, Array]:
  """Neighbouring timesteps (t, s), [S] each, from T to 0."""
  ts = step_schedule(steps, path.timesteps)
  return jnp.asarray(ts[:-1]), jnp.asarray(ts[1:])


def walk(step: Step, path: Path, x: Images, keys: Array, steps: int) -> Images:
  """Takes a step between all neighbouring timesteps, from noise x at T to t = 0."""
  body = lambda x, pair: (step(x, keys, *pair)[0], None)
  return jax.lax.scan(body, x, _pairs(path, steps))[0]


class Trajectory(NamedTuple):
  """What was on the way from noise to images.

  Attributes:
    x0: what the denoiser took x_t for, at each of S steps.
    x_t: from noise at T to the images at t = 0, which are the last.
  """

  x0: Float[Array, "s b h w c"]
  x_t: Float[Array, "s+1 b h w c"]


def trace(step: Step, path: Path, x: Images, keys: Array, steps: int) -> Trajectory:
  """Like `walk`, and keeps all that it passes."""

  def body(x, pair):
    x_s, x0 = step(x, keys, *pair)
    return x_s, (x0, x_s)

  x0, x_t = jax.lax.scan(body, x, _pairs(path, steps))[1]
  return Trajectory(x0, jnp.concatenate([x[None], x_t]))


def inpaint(
  step: Step,
  path: Path,
  x: Images,
  keys: Array,
  steps: int,
  known: Images,
  mask: Float[Array, "b h w 1"],
  resampling: int = 1,
) -> Images:
  """Fills in a part of images (RePaint: Lugmayr et al. 2022, algorithm 1).

  After every step the known part is put back, noised afresh to that timestep. What fills the rest
  was made without seeing this very noise; so each step is gone back, by adding noise, and taken
  again, `resampling` times in all, which lets the two parts agree. (The paper goes back j timesteps
  r times; here j is the length of a step, and r is `resampling`.)

  Args:
    step: of a sampler.
    path: of the denoiser.
    x: noise at T.
    keys: one per image.
    steps: S, 1 <= S <= T; resampling * S steps are taken.
    known: the images, clean; where they are to be filled in they do not matter.
    mask: 1 where they are, 0 where the image is known.
    resampling: how often each step is taken, at least 1.

  Returns images that are `known`, exactly, where the mask is 0.

  Raises:
    ValueError: resampling < 1, or see `step_schedule`.
  """
  if resampling < 1:
    raise ValueError(f"resampling={resampling} must be at least 1: each step is taken once.")
  fold = jax.vmap(jax.random.fold_in, (0, None))

  def put_back(x, keys, t):
    noised = path.combine("x_t", known, _noise(keys, t, x), t)
    return jnp.where(mask > 0, x, noised)

  def body(x, pair):
    t, s = pair

    def once(i, x):
      # The key of the step, of the known part's noise, of the way back: three streams.
      step_keys, known_keys, back_keys = (fold(keys, 3 * i + j) for j in range(3))
      x = put_back(step(x, step_keys, t, s)[0], known_keys, s)
      back = lambda x: _forward(x, path, back_keys, s, t)
      return jax.lax.cond(i < resampling - 1, back, lambda x: x, x)

    return jax.lax.fori_loop(0, resampling, once, x), None

  x = put_back(x, fold(keys, 3 * resampling), jnp.int32(path.timesteps))
  return jax.lax.scan(body, x, _pairs(path, steps))[0]


def _noise(keys: Array, t: Int[Array, ""], x: Images) -> Images:
  """Standard normal noise for step t, each image's from its own key."""
  draw = lambda key: jax.random.normal(jax.random.fold_in(key, t), x.shape[1:])
  return jax.vmap(draw)(keys)


def _added_variance(path: Path, t: Int[Array, ""], s: Int[Array, ""]) -> Float[Array, ""]:
  """Variance of q(x_t | x_s), s < t, for the path taken as a Markov chain."""
  (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefs("x_t", t), path.coefs("x_t", s)
  # max() because float32 may round the difference below zero.
  return jnp.maximum(sigma_t**2 - (alpha_t * sigma_s / alpha_s) ** 2, 0.0)


def _posterior_std(path: Path, t: Int[Array, ""], s: Int[Array, ""]) -> Float[Array, ""]:
  """Standard deviation of q(x_s | x_t, x0), s < t, for the path taken as a Markov chain."""
  sigma_t, sigma_s = path.coefs("x_t", t)[1], path.coefs("x_t", s)[1]
  return sigma_s / sigma_t * jnp.sqrt(_added_variance(path, t, s))


def _forward(x: Images, path: Path, keys: Array, s: Int[Array, ""], t: Int[Array, ""]) -> Images:
  """Draws x_t from q(x_t | x_s = x), s < t."""
  scale = path.coefs("x_t", t)[0] / path.coefs("x_t", s)[0]
  return scale * x + jnp.sqrt(_added_variance(path, t, s)) * _noise(keys, t, x)


def ddim_step(denoise: Denoiser, path: Path, eta: float = 0.0) -> Step:
  """The step of `ddim`.

  Raises:
    ValueError: eta is outside [0, 1], where the noise would exceed what x_s holds.
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"eta={eta} must be in [0, 1]: 0 is deterministic, 1 ancestral.")

  def step(x, keys, t, s):
    x0, eps = denoise(x, t)
    alpha, sigma = path.coefs("x_t", s)
    std = eta * _posterior_std(path, t, s)
    kept = jnp.sqrt(jnp.maximum(sigma**2 - std**2, 0.0))
    return alpha * x0 + kept * eps + std * _noise(keys, t, x), x0

  return step


def ddim(
  denoise: Denoiser, path: Path, x: Images, keys: Array, steps: int, eta: float = 0.0
) -> Images:
  """DDIM (Song et al. 2021), eq. 12, for any path; eta = 0 is deterministic, 1 is ancestral.

  Raises:
    ValueError: eta is outside [0, 1].
  """
  return walk(ddim_step(denoise, path, eta), path, x, keys, steps)


def ddpm_step(denoise: Denoiser, path: Path) -> Step:
  """The step of `ddpm`."""

  def step(x, keys, t, s):
    x0, _ = denoise(x, t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefs("x_t", t), path.coefs("x_t", s)
    added = _added_variance(path, t, s)
    mean = alpha_s * added * x0 + alpha_t / alpha_s * sigma_s**2 * x
    return mean / sigma_t**2 + _posterior_std(path, t, s) * _noise(keys, t, x), x0

  return step


def ddpm(denoise: Denoiser, path: Path, x: Images, keys: Array, steps: int) -> Images:
  """Ancestral sampling (Ho et al. 2020), eq. 6-7: draws x_s from q(x_s | x_t, x0)."""
  return walk(ddpm_step(denoise, path), path, x, keys, steps)


def heun_step(denoise: Denoiser, path: Path) -> Step:
  """The step of `heun`."""
  time = jnp.asarray(path.time, jnp.float32)

  def step(x, keys, t, s):
    del keys
    x0, eps = denoise(x, t)
    velocity = path.combine("v", x0, eps, t)
    predicted = path.combine("x_t", x0, eps, s)

    def corrected(_):
      v = path.combine("v", *denoise(predicted, s), s)
      return x + (time[s] - time[t]) * (velocity + v) / 2

    return jax.lax.cond(s > 0, corrected, lambda _: predicted, None), x0

  return step


def heun(denoise: Denoiser, path: Path, x: Images, keys: Array, steps: int) -> Images:
  """Heun's second-order method on d x / d time = v (Karras et al. 2022, algorithm 1).

  Predicts with a DDIM step, corrects with the mean of the velocities at both ends. v stays finite
  at both ends of every path, where 1 / alpha and 1 / sigma do not. The last step is DDIM's alone:
  at t = 0 there is nothing left to denoise. Two evaluations a step, but for the last.

  On the flow path the error falls with the square of the number of steps. The cosine and linear
  schedules leave t = 0 like sqrt(t), so there the last step is long and the order lies between
  one and two.
  """
  return walk(heun_step(denoise, path), path, x, keys, steps)


SAMPLERS: dict[str, Callable] = {"ddim": ddim, "ddpm": ddpm, "heun": heun}
# What makes their steps, from (denoise, path, **options).
STEPS: dict[str, Callable] = {"ddim": ddim_step, "ddpm": ddpm_step, "heun": heun_step}

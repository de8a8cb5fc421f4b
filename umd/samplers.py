"""Samplers: from noise to images along a path, given a denoiser.

A sampler never sees a model. It asks `denoise(x_t, t) -> (x0, eps)` for the two ends of the path
as they look from x_t (t is one int32 scalar for the whole batch), exactly `steps` times (Heun:
2 * steps - 1 times), and returns x0. The last step lands on t = 0, where x_t is x0 itself.

`keys` holds one key per image, so that an image depends on its own key and noise and on nothing
else in its batch. Deterministic samplers take it all the same, and ignore it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umd.paths import Path

Images = Float[Array, "b h w c"]
Denoiser = Callable[[Images, Int[Array, ""]], tuple[Images, Images]]


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


def _walk(step: Callable, path: Path, x: Images, steps: int) -> Images:
  """Folds `step(x, t, s)` over the pairs (t, s) of neighbouring timesteps."""
  ts = step_schedule(steps, path.timesteps)
  body = lambda x, pair: (step(x, *pair), None)
  return jax.lax.scan(body, x, (jnp.asarray(ts[:-1]), jnp.asarray(ts[1:])))[0]


def _noise(keys: Array, t: Int[Array, ""], x: Images) -> Images:
  """Standard normal noise for step t, each image's from its own key."""
  draw = lambda key: jax.random.normal(jax.random.fold_in(key, t), x.shape[1:])
  return jax.vmap(draw)(keys)


def _posterior_std(path: Path, t: Int[Array, ""], s: Int[Array, ""]) -> Float[Array, ""]:
  """Standard deviation of q(x_s | x_t, x0), s < t, for the path taken as a Markov chain."""
  (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefs("x_t", t), path.coefs("x_t", s)
  # Noise added from s to t; max() because float32 may round the difference below zero.
  forward = jnp.maximum(sigma_t**2 - (alpha_t * sigma_s / alpha_s) ** 2, 0.0)
  return sigma_s / sigma_t * jnp.sqrt(forward)


def ddim(
  denoise: Denoiser, path: Path, x: Images, keys: Array, steps: int, eta: float = 0.0
) -> Images:
  """DDIM (Song et al. 2021), eq. 12, for any path; eta = 0 is deterministic, 1 is ancestral.

  Raises:
    ValueError: eta is outside [0, 1], where the noise would exceed what x_s holds.
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"eta={eta} must be in [0, 1]: 0 is deterministic, 1 ancestral.")

  def step(x, t, s):
    x0, eps = denoise(x, t)
    alpha, sigma = path.coefs("x_t", s)
    std = eta * _posterior_std(path, t, s)
    kept = jnp.sqrt(jnp.maximum(sigma**2 - std**2, 0.0))
    return alpha * x0 + kept * eps + std * _noise(keys, t, x)

  return _walk(step, path, x, steps)


def ddpm(denoise: Denoiser, path: Path, x: Images, keys: Array, steps: int) -> Images:
  """Ancestral sampling (Ho et al. 2020), eq. 6-7: draws x_s from q(x_s | x_t, x0)."""

  def step(x, t, s):
    x0, _ = denoise(x, t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefs("x_t", t), path.coefs("x_t", s)
    forward = jnp.maximum(sigma_t**2 - (alpha_t * sigma_s / alpha_s) ** 2, 0.0)
    mean = alpha_s * forward * x0 + alpha_t / alpha_s * sigma_s**2 * x
    return mean / sigma_t**2 + _posterior_std(path, t, s) * _noise(keys, t, x)

  return _walk(step, path, x, steps)


def heun(denoise: Denoiser, path: Path, x: Images, keys: Array, steps: int) -> Images:
  """Heun's second-order method on d x / d time = v (Karras et al. 2022, algorithm 1).

  Predicts with a DDIM step, corrects with the mean of the velocities at both ends. v stays finite
  at both ends of every path, where 1 / alpha and 1 / sigma do not. The last step is DDIM's alone:
  at t = 0 there is nothing left to denoise. Two evaluations a step, but for the last.

  On the flow path the error falls with the square of the number of steps. The cosine and linear
  schedules leave t = 0 like sqrt(t), so there the last step is long and the order lies between
  one and two.
  """
  time = jnp.asarray(path.time, jnp.float32)

  def step(x, t, s):
    x0, eps = denoise(x, t)
    velocity = path.combine("v", x0, eps, t)
    predicted = path.combine("x_t", x0, eps, s)

    def corrected(_):
      v = path.combine("v", *denoise(predicted, s), s)
      return x + (time[s] - time[t]) * (velocity + v) / 2

    return jax.lax.cond(s > 0, corrected, lambda _: predicted, None)

  return _walk(step, path, x, steps)


SAMPLERS: dict[str, Callable] = {"ddim": ddim, "ddpm": ddpm, "heun": heun}

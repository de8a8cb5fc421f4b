"""What all samplers share: what a sampler is, and the ways in which its steps are taken."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umd.paths import Path
from umd.samplers.timesteps import check_spacing, step_schedule

Images = Float[Array, "b h w c"]
Denoiser = Callable[[Images, Int[Array, ""]], tuple[Images, Images]]


class State(NamedTuple):
  """Where a sampler is.

  Attributes:
    x: x_t.
    history: what the next step wants to know of the steps before; () if nothing.
  """

  x: Images
  history: Any = ()


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A way from noise to images.

  Attributes:
    path: of the denoiser.
    step: `(state at t, keys, t, s) -> (state at s, the x0 that x_t was taken for)`, s < t, where t
      and s are int32 scalars. The step to s = 0 lands on that x0.
    remember: the history `(x_t) -> history` of a state that nothing came before.
    spacing: of the timesteps, see `umd.samplers.timesteps`.
  """

  path: Path
  step: Callable[[State, Array, Int[Array, ""], Int[Array, ""]], tuple[State, Images]]
  remember: Callable[[Images], Any] = lambda x: ()
  spacing: str = "uniform"

  def __post_init__(self):
    check_spacing(self.spacing)

  def start(self, x: Images) -> State:
    """A state that nothing came before: at noise, or where x_t was changed by another hand."""
    return State(x, self.remember(x))

  def timesteps(self, steps: int) -> np.ndarray:
    """S + 1 timesteps from T to 0; see `step_schedule`."""
    return step_schedule(steps, self.path, self.spacing)

  def pairs(self, steps: int) -> tuple[Array, Array]:
    """Neighbouring timesteps (t, s), [S] each, from T to 0."""
    ts = self.timesteps(steps)
    return jnp.asarray(ts[:-1]), jnp.asarray(ts[1:])


def clip_x0(denoise: Denoiser, path: Path, bound: float = 1.0) -> Denoiser:
  """Clips x0 to [-bound, bound] and moves eps along, so that both still explain x_t."""

  def clipped(x_t, t):
    x0 = jnp.clip(denoise(x_t, t)[0], -bound, bound)
    alpha, sigma = path.coefs("x_t", t)
    return x0, (x_t - alpha * x0) / sigma

  return clipped


def walk(sampler: Sampler, x: Images, keys: Array, steps: int) -> Images:
  """Takes a step between all neighbouring timesteps, from noise x at T to t = 0."""
  body = lambda state, pair: (sampler.step(state, keys, *pair)[0], None)
  return jax.lax.scan(body, sampler.start(x), sampler.pairs(steps))[0].x


class Trajectory(NamedTuple):
  """What was on the way from noise to images.

  Attributes:
    x0: what the denoiser took x_t for, at each of S steps.
    x_t: from noise at T to the images at t = 0, which are the last.
  """

  x0: Float[Array, "s b h w c"]
  x_t: Float[Array, "s+1 b h w c"]


def trace(sampler: Sampler, x: Images, keys: Array, steps: int) -> Trajectory:
  """Like `walk`, and keeps all that it passes."""

  def body(state, pair):
    state, x0 = sampler.step(state, keys, *pair)
    return state, (x0, state.x)

  x0, x_t = jax.lax.scan(body, sampler.start(x), sampler.pairs(steps))[1]
  return Trajectory(x0, jnp.concatenate([x[None], x_t]))


def inpaint(
  sampler: Sampler,
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

  Fresh noise takes x_t off the way that it came, and a history would extrapolate that jump: so
  every step starts without one, and a multistep sampler takes its first step again and again,
  which is DDIM's.

  Args:
    sampler: of the denoiser.
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
  fold, path = jax.vmap(jax.random.fold_in, (0, None)), sampler.path

  def put_back(x, keys, t):
    noised = path.combine("x_t", known, step_noise(keys, t, x), t)
    return jnp.where(mask > 0, x, noised)

  def body(x, pair):
    t, s = pair

    def once(i, x):
      # The key of the step, of the known part's noise, of the way back: three streams.
      step_keys, known_keys, back_keys = (fold(keys, 3 * i + j) for j in range(3))
      x = put_back(sampler.step(sampler.start(x), step_keys, t, s)[0].x, known_keys, s)
      back = lambda x: _forward(x, path, back_keys, s, t)
      return jax.lax.cond(i < resampling - 1, back, lambda x: x, x)

    return jax.lax.fori_loop(0, resampling, once, x), None

  x = put_back(x, fold(keys, 3 * resampling), jnp.int32(path.timesteps))
  return jax.lax.scan(body, x, sampler.pairs(steps))[0]


def step_noise(keys: Array, t: Int[Array, ""], x: Images) -> Images:
  """Standard normal noise for step t, each image's from its own key."""
  draw = lambda key: jax.random.normal(jax.random.fold_in(key, t), x.shape[1:])
  return jax.vmap(draw)(keys)


def added_variance(path: Path, t: Int[Array, ""], s: Int[Array, ""]) -> Float[Array, ""]:
  """Variance of q(x_t | x_s), s < t, for the path taken as a Markov chain."""
  (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefs("x_t", t), path.coefs("x_t", s)
  # max() because float32 may round the difference below zero.
  return jnp.maximum(sigma_t**2 - (alpha_t * sigma_s / alpha_s) ** 2, 0.0)


def posterior_std(path: Path, t: Int[Array, ""], s: Int[Array, ""]) -> Float[Array, ""]:
  """Standard deviation of q(x_s | x_t, x0), s < t, for the path taken as a Markov chain."""
  sigma_t, sigma_s = path.coefs("x_t", t)[1], path.coefs("x_t", s)[1]
  return sigma_s / sigma_t * jnp.sqrt(added_variance(path, t, s))


def _forward(x: Images, path: Path, keys: Array, s: Int[Array, ""], t: Int[Array, ""]) -> Images:
  """Draws x_t from q(x_t | x_s = x), s < t."""
  scale = path.coefs("x_t", t)[0] / path.coefs("x_t", s)[0]
  return scale * x + jnp.sqrt(added_variance(path, t, s)) * step_noise(keys, t, x)

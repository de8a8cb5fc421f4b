"""Ways from noise to images, whatever the solver: plain, with all that is passed, around a mask."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from umd.paths import Path
from umd.samplers.sampling import Sampling
from umd.samplers.solvers import (
  SOLVERS,
  Denoiser,
  History,
  Images,
  State,
  Step,
  Time,
  added_variance,
  step_noise,
)
from umd.samplers.timesteps import step_schedule


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Steps from noise to images.

  Attributes:
    path: the path of the denoiser.
    step: one step of a solver.
    times: [S + 1], from the end of the path to 0.
    multistep: whether a step uses the one before.
  """

  path: Path
  step: Step
  times: np.ndarray
  multistep: bool = False

  def start(self, x: Images) -> State:
    """Returns a state with no step before it: at noise, or where x_t was changed from outside."""
    return State(
      x, History(jnp.zeros_like(x), jnp.zeros((), self.times.dtype)) if self.multistep else ()
    )

  @property
  def intervals(self) -> tuple[Array, Array]:
    """The times (t, s), [S] each, between which the steps are taken."""
    return jnp.asarray(self.times[:-1]), jnp.asarray(self.times[1:])


def make_sampler(sampling: Sampling, denoise: Denoiser, path: Path) -> Sampler:
  """Makes the sampler that the settings stand for.

  Raises:
    ValueError: the path has fewer timesteps than `sampling.steps`.
  """
  times = step_schedule(sampling.steps, path, sampling.spacing)
  if sampling.clip_x0:
    denoise = clip_x0(denoise, path)
  solver = SOLVERS[sampling.sampler]
  options = {name: getattr(sampling, name) for name in solver.options}
  return Sampler(path, solver.make(denoise, path, **options), times, solver.multistep)


def clip_x0(denoise: Denoiser, path: Path, bound: float = 1.0) -> Denoiser:
  """Clips x0 to [-bound, bound] and moves eps along, so that both still explain x_t."""

  def clipped(x_t, t):
    x0 = jnp.clip(denoise(x_t, t)[0], -bound, bound)
    alpha, sigma = path.coefs("x_t", t)
    return x0, (x_t - alpha * x0) / sigma

  return clipped


def walk(sampler: Sampler, x: Images, keys: Array) -> Images:
  """Takes all steps, from noise x at the end of the path to images at t = 0; a key per image."""
  body = lambda state, interval: (sampler.step(state, keys, *interval)[0], None)
  return jax.lax.scan(body, sampler.start(x), sampler.intervals)[0].x


class Trajectory(NamedTuple):
  """What a sampler passes on its way from noise to images.

  Attributes:
    x0: what the denoiser saw in x_t, at each of S steps.
    x_t: from noise to the images at t = 0, which are the last.
  """

  x0: Float[Array, "s b h w c"]
  x_t: Float[Array, "s+1 b h w c"]


def trace(sampler: Sampler, x: Images, keys: Array) -> Trajectory:
  """Does as `walk` does, and keeps all that it passes."""

  def body(state, interval):
    state, x0 = sampler.step(state, keys, *interval)
    return state, (x0, state.x)

  x0, x_t = jax.lax.scan(body, sampler.start(x), sampler.intervals)[1]
  return Trajectory(x0, jnp.concatenate([x[None], x_t]))


def inpaint(
  sampler: Sampler,
  x: Images,
  keys: Array,
  known: Images,
  mask: Float[Array, "b h w 1"],
  resampling: int = 1,
) -> Images:
  """Fills in a part of images (RePaint: Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1).

  After every step the known part is put back, with fresh noise of that time. What fills the rest
  was made without seeing this very noise; so each step is undone by adding noise, and taken again,
  `resampling` times in all, which lets the two parts agree. (The paper goes back j timesteps r
  times; here j is the length of a step, and r is `resampling`.)

  Fresh noise takes x_t off the curve that it came along, and a multistep solver would extrapolate
  that jump. So every step starts without a history, and multistep solvers take DDIM's first step.

  Args:
    sampler: its steps, each of which is taken `resampling` times.
    x: noise at the end of the path.
    keys: one per image.
    known: the images, clean; where they are to be filled in their values do not matter.
    mask: 1 where they are to be filled in, 0 where the image is known.
    resampling: how often each step is taken, at least 1.

  Returns images that are `known`, exactly, where the mask is 0.

  Raises:
    ValueError: resampling < 1.
  """
  if resampling < 1:
    raise ValueError(f"resampling={resampling} must be at least 1: each step is taken once.")
  fold, path = jax.vmap(jax.random.fold_in, (0, None)), sampler.path

  def put_back(x, keys, t):
    noised = path.combine("x_t", known, step_noise(keys, t, x), t)
    return jnp.where(mask > 0, x, noised)

  def body(x, interval):
    t, s = interval

    def once(i, x):
      # Three streams of noise: of the step, of the known part, of the way back.
      step_keys, known_keys, back_keys = (fold(keys, 3 * i + j) for j in range(3))
      x = put_back(sampler.step(sampler.start(x), step_keys, t, s)[0].x, known_keys, s)
      back = lambda x: _add_noise(x, path, back_keys, s, t)
      return jax.lax.cond(i < resampling - 1, back, lambda x: x, x)

    return jax.lax.fori_loop(0, resampling, once, x), None

  x = put_back(x, fold(keys, 3 * resampling), sampler.intervals[0][0])
  return jax.lax.scan(body, x, sampler.intervals)[0]


def _add_noise(x: Images, path: Path, keys: Array, s: Time, t: Time) -> Images:
  """Draws x_t from q(x_t | x_s = x), s < t."""
  scale = path.coefs("x_t", t)[0] / path.coefs("x_t", s)[0]
  return scale * x + jnp.sqrt(added_variance(path, t, s)) * step_noise(keys, t, x)

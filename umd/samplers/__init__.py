"""Samplers: from noise to images along a path, given a denoiser.

A sampler never sees a model. It asks `denoise(x_t, t) -> (x0, eps)` for the two ends of the path
as they look from x_t (t is one int32 scalar for the whole batch), exactly `steps` times (Heun:
2 * steps - 1 times), and ends in x0. The last step lands on t = 0, where x_t is x0 itself.

`keys` holds one key per image, so that an image depends on its own key and noise and on nothing
else in its batch. Deterministic samplers take it all the same, and ignore it.

A sampler is a step, from x_t to x_s at an earlier timestep s < t, that may remember the steps
before, and `walk` takes it from T to 0. `trace` and `inpaint` take the same steps in other ways.

images = walk(ddim(denoise, path), x, keys, steps)
"""

from collections.abc import Callable, Mapping

from umd.samplers.sampler import (
  Denoiser,
  Images,
  Sampler,
  State,
  Trajectory,
  clip_x0,
  inpaint,
  trace,
  walk,
)
from umd.samplers.solvers import ab2, ddim, ddpm, dpmpp_2m, heun
from umd.samplers.timesteps import SPACINGS, step_schedule

# `(denoise, path, **options) -> Sampler`.
SAMPLERS: Mapping[str, Callable[..., Sampler]] = {
  "ddim": ddim,
  "ddpm": ddpm,
  "heun": heun,
  "dpmpp_2m": dpmpp_2m,
  "ab2": ab2,
}


def evaluations(sampler: str, steps: int) -> int:
  """How often the sampler of that name asks its denoiser in so many steps."""
  return 2 * steps - 1 if sampler == "heun" else steps


__all__ = [
  "SAMPLERS",
  "SPACINGS",
  "Denoiser",
  "Images",
  "Sampler",
  "State",
  "Trajectory",
  "ab2",
  "clip_x0",
  "ddim",
  "ddpm",
  "dpmpp_2m",
  "evaluations",
  "heun",
  "inpaint",
  "step_schedule",
  "trace",
  "walk",
]

"""Samplers: from noise to images along a path, given a denoiser.

A sampler never sees a model. It asks `denoise(x_t, t) -> (x0, eps)` for the two ends of the path
as they look from x_t (t is one scalar for the whole batch).

`keys` holds one key per image, so that an image depends on its own key and noise and on nothing
else in its batch. Deterministic solvers take it all the same, and ignore it.

sampler = make_sampler(Sampling(sampler="heun", steps=50), denoise, path)
images = walk(sampler, noise, keys)
"""

from umd.samplers.sampling import Sampling
from umd.samplers.solvers import SOLVERS, Denoiser, State
from umd.samplers.timesteps import SPACINGS, step_schedule
from umd.samplers.walk import Sampler, Trajectory, clip_x0, inpaint, make_sampler, trace, walk

__all__ = [
  "SOLVERS",
  "SPACINGS",
  "Denoiser",
  "Sampler",
  "Sampling",
  "State",
  "Trajectory",
  "clip_x0",
  "inpaint",
  "make_sampler",
  "step_schedule",
  "trace",
  "walk",
]

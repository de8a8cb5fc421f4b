"""Runs that look trained, made in a moment: random weights, and all files that a run leaves."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart
from umd import models
from umd.codecs.codec import Pixels
from umd.devices.mesh import make_mesh, replicated
from umd.models.network import param_shapes
from umd.runs import workdir
from umd.runs.checkpoint import Checkpoints
from umd.state import TrainState
from umd.trained import saved

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STEPS, SIZE, T = 4, (8, 8, 1), 20  # Of samplers; of images; timesteps.
ARGUMENTS = f"variant=nano/2,timesteps={T},sampling_steps={STEPS},adaln=true"


def config(stage="finetune", arguments="", **overrides):
  """A stage of the quick start."""
  found = quickstart.get_config(ARGUMENTS + arguments)[stage]
  found.checkpoint.best = "max:score"
  with found.unlocked():
    found.update_from_flattened_dict(overrides)
  return found


@functools.cache
def _shapes(model):
  return param_shapes(model)


def params_of(model, seed):
  """Random parameters, not so large that samples are all black and white."""
  rng = np.random.default_rng(seed)
  draw = lambda path, leaf: jnp.asarray(
    0.1 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale"), leaf.dtype
  )
  return jax.tree_util.tree_map_with_path(draw, _shapes(model))


def make(path, settings, classes=10, names=NAMES, codec=None, steps=(3, 7), size=SIZE):
  """Writes a run of that config; step s has the EMA of seed s and the raw weights of seed 100 + s.

  Step s scores -s. Returns the folder.
  """
  path, codec = str(path), codec or Pixels()
  size = codec.model_size(size)
  model = models.make(image_size=size, num_classes=classes, **settings.model.to_dict())
  workdir.start(path, settings.to_dict())
  workdir.write_json(os.path.join(path, saved.ABOUT), saved.describe_model(model, codec, names))
  with Checkpoints(path, keep=max(1, len(steps)), best="max:score") as checkpoints:
    for step in steps:
      params = params_of(model, 100 + step), params_of(model, step)
      state = TrainState(jnp.int32(step), *params, ())
      state = jax.device_put(state, replicated(make_mesh()))
      checkpoints.save(state, step, {"position": 0}, {"score": -float(step)})
  return path

"""How layers run where a config leaves it open: in a loop or not, and what is computed again."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umd import chips, memory
from umd.models.autoencoder import AutoEncoder
from umd.models.blocks import REMAT
from umd.objectives import Objective
from umd.placement import on
from umd.sharding import placed, state_shardings

AUTO = "auto"
# Share of a device's memory that an estimate may fill: JAX takes three quarters of a GPU's.
USED = 0.7
UNROLLED = 12  # Layers of a stack that are not too long to compile one by one.


def shapes_of(model: AutoEncoder):
  """Shapes of its parameters."""
  image = jax.ShapeDtypeStruct((1, *model.image_size), "float32")
  blank = image, jax.ShapeDtypeStruct((1,), "int32")
  return jax.eval_shape(model.init, jax.random.key(0), *blank)["params"]


def needed(objective: Objective, mesh: Mesh, accumulate: int = 1) -> int:
  """Bytes that a step of training takes on a device, by `umd.memory`; AdamW's state is counted."""
  shapes = shapes_of(objective.model)
  params = placed(shapes, state_shardings(shapes, mesh))
  rows = objective.batch_size // accumulate
  batch = {
    "image": jax.ShapeDtypeStruct((rows, *objective.model.image_size), "float32"),
    "label": jax.ShapeDtypeStruct((rows,), "int32"),
  }
  with on(mesh):
    found = memory.residuals(objective, params, batch)
  told = memory.estimate(params, found, memory.nbytes(batch), mesh.size)
  return 4 * memory.on_device(params) + told.total  # Parameters, average and two moments.


def settle(config: ConfigDict, build: Callable[[dict], Objective], mesh: Mesh) -> Objective:
  """The objective with what the config's model leaves to "auto" decided.

  Of what to keep for the backward pass the most that fits the device's memory, by estimate. Layers
  are unrolled unless they are many and all is computed again: only then a loop takes no more
  memory, and it compiles much faster.

  Where the memory is not known (a CPU), a loop that keeps products: it is as fast as unrolled
  layers that keep everything, takes less than half the memory and compiles faster
  (`benchmarks.train_step`). A loop that keeps everything is slower than either.

  Args:
    config: of the stage.
    build: makes the objective of a model with these attributes {scan, remat}.
    mesh: that it is to run on.
  """
  settings = {"scan": AUTO, "remat": AUTO, **config.model}
  scan, remat = settings["scan"], settings["remat"]
  capacity = chips.memory(mesh.devices.flat[0].device_kind)
  policies = [remat] if remat != AUTO else list(REMAT) if capacity else ["dots"]
  for policy in policies:
    found = build(dict(scan=scan == "true", remat=policy))
    if policy == policies[-1] or needed(found, mesh, config.accumulate) <= USED * capacity:
      break
  many = max(found.model.shape.depth, found.model.shape.decoder_depth) > UNROLLED
  loop = many and policy == "full" if capacity else policy != "none"
  return build(dict(scan=True, remat=policy)) if scan == AUTO and loop else found

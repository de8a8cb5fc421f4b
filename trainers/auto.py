"""What a config's model leaves to "auto": layers in a loop or not, and what is computed again."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from umd.devices import chips, memory
from umd.devices.mesh import LAYERS, on, placed, state_shardings
from umd.models.layers.blocks import REMAT
from umd.models.network import Network, param_shapes
from umd.objectives import Objective

AUTO = "auto"
# The share of a device's memory that an estimate may fill: JAX takes three quarters of a GPU's.
USED = 0.7
UNROLLED = 12  # The largest number of layers that are not too long to compile one by one.


def batch_shapes(model: Network, rows: int) -> dict:
  """Returns the shapes of a batch as the network sees it."""
  return {
    "image": jax.ShapeDtypeStruct((rows, *model.image_size), "float32"),
    "label": jax.ShapeDtypeStruct((rows,), "int32"),
  }


def needed(objective: Objective, mesh: Mesh, accumulate: int = 1) -> int:
  """Estimates the bytes that a step with AdamW takes on a device (`umd.devices.memory`)."""
  shapes = param_shapes(objective.model)
  params = placed(shapes, state_shardings(shapes, mesh))
  batch = batch_shapes(objective.model, objective.batch_size // accumulate)
  with on(mesh):
    residuals = memory.residuals(objective, params, batch)
  step = memory.estimate(params, residuals, memory.nbytes(batch), mesh.size)
  return 4 * memory.on_device(params) + step.total  # Parameters, average and two moments.


def num_layers(model: Network) -> int:
  """Returns the depth of the deepest stack of layers; 0 for a network without one."""
  leaves = jax.tree_util.tree_leaves_with_path(param_shapes(model))
  in_layers = lambda path: any(getattr(key, "key", None) == LAYERS for key in path)
  return max((len(leaf) for path, leaf in leaves if in_layers(path)), default=0)


def settle(
  build: Callable[..., Objective],
  mesh: Mesh,
  *,
  scan: str = AUTO,
  remat: str = AUTO,
  accumulate: int = 1,
) -> Objective:
  """Returns `build(scan=..., remat=...)` with what is "auto" decided for the mesh's devices.

  Of the policies of what to keep for the backward pass it takes the one that keeps most and still
  fits the device's memory, by estimate. Layers are unrolled, unless they are many and all is
  computed again: only then a loop takes no more memory, and it compiles much faster.

  Where the memory is not known (a CPU), layers run in a loop that keeps products: this is as fast
  as unrolled layers that keep everything, takes less than half the memory and compiles faster
  (`benchmarks.train_step`). A loop that keeps everything is slower than either.

  Args:
    build: makes the objective of a network with these attributes {scan, remat}.
    mesh: the devices that it is to run on.
    scan: "true", "false" or "auto".
    remat: a key of `REMAT`, or "auto".
    accumulate: the number of micro-batches of a step.
  """
  capacity = chips.memory(mesh.devices.flat[0].device_kind)
  policies = [remat]
  if remat == AUTO:
    policies = list(REMAT) if capacity else ["dots"]
  for policy in policies:
    objective = build(scan=scan == "true", remat=policy)
    if policy == policies[-1] or needed(objective, mesh, accumulate) <= USED * capacity:
      break
  if capacity:
    loop = policy == "full" and num_layers(objective.model) > UNROLLED
  else:
    loop = policy != "none"
  return build(scan=True, remat=policy) if scan == AUTO and loop else objective

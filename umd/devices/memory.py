"""How much memory a training step takes on a device, by arithmetic: nothing is compiled.

What is kept whole follows from shapes and shardings. What the forward pass keeps for the backward
pass follows from tracing the loss; what XLA then makes of it is a rule of thumb, see `residuals`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from umd.devices import chips
from umd.devices.flops import equations

CHECKPOINT = ("checkpoint", "remat", "remat2")  # What jax.checkpoint is called in a jaxpr.


@dataclasses.dataclass(frozen=True)
class StandIn:
  """A device that is not here: enough of one for a mesh whose shardings are only asked for shapes.

  Attributes:
    id: place among the others.
    device_kind: as JAX names it.
  """

  id: int
  device_kind: str
  platform: str = "gpu"
  process_index: int = 0


def gpus(name: str) -> list[StandIn]:
  """The devices of "H100x8": words of the name of a kind in `chips.GPUS`, and their number.

  Of several kinds the first counts: "A100" is that of 40 GB, "A100-80GB" the other.

  Raises:
    ValueError: there is no such kind or number.
  """
  kind, _, number = name.rpartition("x")
  words = lambda text: set(text.lower().replace("-", " ").split())
  kinds = [known for known in chips.GPUS if words(kind) and words(kind) <= words(known)]
  if not kinds or not number.isdigit() or not int(number):
    raise ValueError(
      f"topology 'gpu:{name}' must be gpu:KINDxNUMBER, as in gpu:H100x8, with KIND words of one of "
      f"{', '.join(chips.GPUS)}."
    )
  return [StandIn(i, kinds[0]) for i in range(int(number))]


def nbytes(tree) -> int:
  """Bytes of the arrays that a tree of shapes stands for."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def on_device(tree) -> int:
  """Bytes of them that one device keeps; their shardings say which part of each."""
  shard = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(shard, jax.tree.leaves(tree)))


def _products(jaxpr) -> list[int]:
  """Bytes of the results of all matrix multiplications, those of a loop once."""
  return [
    sum(nbytes(v.aval) for v in e.outvars)
    for e in equations(jaxpr)
    if e.primitive.name == "dot_general"
  ]


@dataclasses.dataclass(frozen=True)
class Residuals:
  """What a step needs beside its state, in bytes.

  Attributes:
    fixed: of what does not grow with the batch: parameters, as they are and cast.
    kept: of what the forward pass keeps for the backward pass.
    working: of what the backward pass needs at a time.
  """

  fixed: int
  kept: int
  working: int


def residuals(objective: Callable, params, batch) -> Residuals:
  """What a loss keeps between its forward and its backward pass, over all devices.

  Traced, so it holds for any model, remat policy and attention that this backend would choose. In a
  loop over layers XLA keeps all that JAX hands from one pass to the other. Of layers that are
  unrolled and not rematerialised it keeps the results of matrix multiplications and computes again,
  within its fusions, what lies between them (the policy `dots_saveable`). At a time the backward
  pass holds one rematerialised layer, or the largest product, with its gradient.

  Args:
    objective: `objective(params, objective.draw(batch, key)) -> (loss, ...)`.
    params, batch: shapes of its arguments; every leaf of the batch has the rows first.
  """

  key = jax.eval_shape(lambda: jax.random.key(0))
  loss = lambda params, batch, key: objective(params, objective.draw(batch, key))
  jaxpr = jax.make_jaxpr(loss)(params, batch, key).jaxpr
  all_equations = list(equations(jaxpr))
  again = [e for e in all_equations if e.primitive.name in CHECKPOINT]
  loops = [e for e in all_equations if e.primitive.name == "scan"]
  loops = [e for e in loops if e.params["length"] > e.params["unroll"]]
  scalar = lambda params, batch, key: loss(params, batch, key)[0]
  if not (again or loops):
    scalar = jax.checkpoint(scalar, policy=jax.checkpoint_policies.dots_saveable)
  backward = lambda p, b, k: jax.vjp(lambda p: scalar(p, b, k), p)[1]
  kept = lambda batch: nbytes(jax.eval_shape(backward, params, batch, key))
  twice = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype), batch
  )
  once, doubled = kept(batch), kept(twice)
  blocks = [sum(_products(e.params["jaxpr"])) for e in again]
  working = 2 * max(blocks, default=max(_products(jaxpr), default=0))
  return Residuals(2 * once - doubled, doubled - once, working)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on one device.

  Attributes:
    gathered: parameters that are kept in parts, whole; 0 where they are kept whole.
    gradients: of all parameters.
    activations: what the forward pass keeps, and what the backward pass works with.
    batch: images and labels.
  """

  gathered: int
  gradients: int
  activations: int
  batch: int

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


def estimate(params, found: Residuals, batch_bytes: int, devices: int) -> Estimate:
  """What a step takes on each device on top of its state.

  Args:
    params: shapes with shardings.
    found: the residuals of the whole batch (of one micro-batch, where it is taken in several).
    batch_bytes: of the whole batch.
    devices: that share it.
  """
  whole, here = nbytes(params), on_device(params)
  casts = max(0, found.fixed - whole)
  activations = casts + (found.kept + found.working) // devices
  return Estimate(whole if here < whole else 0, whole, activations, batch_bytes // devices)

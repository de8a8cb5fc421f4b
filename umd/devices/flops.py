"""How many floating-point operations a computation asks for, counted in its jaxpr.

A product of [m, k] and [k, n] counts 2 m k n, a convolution 2 for each weight and output; nothing
else counts (norms, softmax, GELU, masks, losses, the optimiser and the average). It holds for any
network, because it walks what JAX traces: patches that are masked are neither embedded nor
encoded, and a loop's body counts as often as it runs.

A training step counts three forward passes: the backward pass takes two products, with respect to
inputs and to weights, for each one of the forward pass (Chowdhery et al. 2022, appendix B). Work
that is done again to save memory does not count, so `train_step` / seconds / peak is the model's
FLOP utilisation (MFU), and two ways to compute one step compare by it.
"""

import math
from collections.abc import Callable, Iterator

import jax
from jax.extend import core

FORWARD_AND_BACKWARD = 3
# The fused attention of cuDNN, by the start of its primitive's name: two products, as in any other.
CUDNN_ATTENTION = "dot_product_attention_fwd"


def inner_jaxprs(equation) -> Iterator:
  """The jaxprs among an equation's parameters: bodies of loops, branches, functions called."""
  for value in equation.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
        yield getattr(item, "jaxpr", item)


def equations(jaxpr) -> Iterator:
  """All equations of a jaxpr and of those within it, each once."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in inner_jaxprs(equation):
      yield from equations(inner)


def _dot(equation) -> float:
  (contracted, _), _ = equation.params["dimension_numbers"]
  lhs = equation.invars[0].aval.shape
  return 2.0 * equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)


def _convolution(equation) -> float:
  kernel = equation.invars[1].aval.shape
  layout = equation.params["dimension_numbers"].rhs_spec
  return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[layout[0]]


def _cudnn_attention(equation) -> float:
  batch, queries, heads, width = equation.invars[0].aval.shape
  keys = equation.invars[1].aval.shape[1]
  return 2 * 2.0 * batch * heads * queries * keys * width


def in_jaxpr(jaxpr) -> float:
  """FLOPs of all equations: of a scan's body as often as it runs, of a cond's costlier branch.

  A loop whose length is not known (`while`) counts once, and a Pallas kernel once for each point of
  its grid.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "dot_general":
      total += _dot(equation)
    elif name == "conv_general_dilated":
      total += _convolution(equation)
    elif name.startswith(CUDNN_ATTENTION):
      total += _cudnn_attention(equation)
    elif name == "cond":
      total += max(map(in_jaxpr, inner_jaxprs(equation)))
    else:
      times = 1
      if name == "scan":
        times = equation.params["length"]
      elif name == "pallas_call":
        times = math.prod(equation.params["grid_mapping"].grid)
      total += times * sum(map(in_jaxpr, inner_jaxprs(equation)))
  return total


def count(function: Callable, *arguments) -> float:
  """FLOPs of `function(*arguments)` as it is traced; shapes will do for arguments."""
  return in_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def train_step(objective: Callable, params, batch) -> float:
  """FLOPs of one training step over all devices.

  Args:
    objective: `objective(params, objective.draw(batch, key)) -> (loss, ...)`.
    params, batch: shapes of its arguments, the whole batch.
  """
  loss = lambda params, batch, key: objective(params, objective.draw(batch, key))[0]
  key = jax.eval_shape(lambda: jax.random.key(0))
  return FORWARD_AND_BACKWARD * count(loss, params, batch, key)

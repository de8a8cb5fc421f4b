"""Counts the FLOPs of matrix multiplications and convolutions in a jaxpr: an oracle for tests."""

import math

import jax


def _inner(params):
  """The jaxprs among an equation's parameters."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def _dot(equation) -> float:
  (contracted, _), _ = equation.params["dimension_numbers"]
  lhs = equation.invars[0].aval.shape
  return 2.0 * equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)


def _conv(equation) -> float:
  kernel, layout = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
  return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[layout[0]]


COUNTED = {"dot_general": _dot, "conv_general_dilated": _conv}


def in_jaxpr(jaxpr) -> float:
  """FLOPs of all equations; the body of a scan counts as often as it runs."""
  total = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in COUNTED:
      total += COUNTED[name](equation)
    elif name in ("while", "cond"):
      assert not any(in_jaxpr(j) for j in _inner(equation.params)), f"{name}: how often?"
    else:
      times = equation.params["length"] if name == "scan" else 1
      total += times * sum(in_jaxpr(j) for j in _inner(equation.params))
  return total


def count(fn, *args) -> float:
  """FLOPs of `fn(*args)` as it is traced, before any compiler sees it."""
  return in_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)

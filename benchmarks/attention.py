"""Measures milliseconds of attention, forward and backward, by implementation and length.

python -m benchmarks.attention --tokens 68 260 --heads 6 --batch 16 --out attention.jsonl

Implementations that the device does not have, or that cannot take such shapes, are left out.
"ratio" says how many times as fast as the textbook's an implementation is.
"""

import argparse
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.harness import Column
from tools.command_line import positive
from umd.models.layers.attention import IMPLEMENTATIONS, attend, choose
from umd.models.layers.attention import plain_attention as textbook

COLUMNS = (
  Column("tokens", "tokens"),
  Column("", "implementation"),
  Column("ms", "ms", "{:.2f}"),
  Column("best", "ms_best", "{:.2f}"),
  Column("ratio", "ratio", "{:.2f}"),
  Column("differs", "difference", "{:.1e}"),
)


def candidates(shape: tuple[int, ...], dtype: str) -> dict[str, Callable]:
  """Lists what can be measured here, by name, `textbook` first."""
  functions: dict[str, Callable] = {"textbook": textbook}
  for name in IMPLEMENTATIONS[1:]:
    try:
      chosen = choose(shape, dtype, name)
    except ValueError:  # The platform does not have it.
      continue
    if chosen == name:
      functions[name] = lambda q, k, v, name=name: attend(q, k, v, name)
  return functions


def program(function: Callable) -> Callable:
  """Compiles the output and the gradients of q, k and v."""

  def step(q, k, v, d_out):
    out, pullback = jax.vjp(function, q, k, v)
    return out, *pullback(d_out)

  return jax.jit(step)


def measure(args: argparse.Namespace) -> Iterator[dict]:
  """Measures every implementation at every length; yields a row of results for each."""
  for tokens in args.tokens:
    shape = args.batch, tokens, args.heads, args.head_dim
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), args.dtype) for _ in range(4)]
    steps = {name: program(f) for name, f in candidates(shape, args.dtype).items()}
    outputs = {name: step(*arrays) for name, step in steps.items()}
    calls = {name: functools.partial(step, *arrays) for name, step in steps.items()}
    times = harness.in_turns(calls, args.repeats)
    far = lambda x, y: float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max())
    for name, own in times.items():
      yield {
        "tokens": tokens,
        "implementation": name,
        "ms": 1e3 * own.median,
        "ms_best": 1e3 * own.best,
        "ratio": own.faster_than(times["textbook"])[0],
        "difference": max(map(far, outputs[name], outputs["textbook"])),
      }


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("attention", __doc__)
  parser.add_argument(
    "--tokens", type=positive, nargs="+", default=[20, 68, 164, 257, 260], help="lengths"
  )
  parser.add_argument("--batch", type=positive, default=16, help="(16)")
  parser.add_argument("--heads", type=positive, default=6, help="(6)")
  parser.add_argument("--head_dim", type=positive, default=64, help="(64)")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  harness.main(parser, COLUMNS, measure, argv)


if __name__ == "__main__":
  main()

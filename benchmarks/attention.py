"""Milliseconds of attention, forward and backward, by implementation and length.

python -m benchmarks.attention --tokens 68 260 --heads 6 --batch 16 --out attention.jsonl

On the local device, the implementations in turns in one process; what the device has not got, or
what does not take such shapes, is left out. "ratio" is the first implementation's median over each
one's, turn by turn.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.records import append
from tools.command_line import positive, run
from umd.models.layers.attention import IMPLEMENTATIONS, attend, choose
from umd.models.layers.attention import plain_attention as textbook

DTYPES = ("float32", "bfloat16")


def candidates(shape: tuple[int, ...], dtype: str) -> dict[str, Callable]:
  """What can be measured here, by name, `textbook` first."""
  found: dict[str, Callable] = {"textbook": textbook}
  for name in IMPLEMENTATIONS[1:]:
    try:
      chosen = choose(shape, dtype, name)
    except ValueError:  # The platform has not got it.
      continue
    if chosen == name:
      found[name] = lambda q, k, v, name=name: attend(q, k, v, name)
  return found


def program(function: Callable) -> Callable:
  """Output and gradients of q, k and v, compiled."""

  def step(q, k, v, d_out):
    out, pullback = jax.vjp(function, q, k, v)
    return out, *pullback(d_out)

  return jax.jit(step)


def measure(shape: tuple[int, ...], dtype: str, repeats: int) -> list[dict]:
  """A row for every implementation."""
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]
  programs = {name: program(f) for name, f in candidates(shape, dtype).items()}
  outputs = {name: jax.block_until_ready(step(*arrays)) for name, step in programs.items()}
  times = {name: [] for name in programs}
  for _ in range(repeats):  # In turns: what slows the machine down slows all.
    for name, step in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(step(*arrays))
      times[name].append(1e3 * (time.perf_counter() - start))
  far = lambda x, y: float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max())
  expected = outputs["textbook"]
  return [
    {
      "tokens": shape[1],
      "implementation": name,
      "ms": statistics.median(took),
      "ms_best": min(took),
      "ratio": statistics.median(t / o for t, o in zip(times["textbook"], took, strict=True)),
      "difference": max(map(far, outputs[name], expected)),
    }
    for name, took in times.items()
  ]


def benchmark(args: argparse.Namespace) -> None:
  print(("{:>8}{:>16}" + "{:>10}" * 4).format("tokens", "", "ms", "best", "ratio", "differs"))
  for tokens in args.tokens:
    for row in measure((args.batch, tokens, args.heads, args.head_dim), args.dtype, args.repeats):
      cells = "{tokens:8}{implementation:>16}{ms:10.2f}{ms_best:10.2f}{ratio:10.2f}"
      print((cells + "{difference:10.1e}").format(**row), flush=True)
      append(args, "attention", row)


def main(argv: list[str]) -> None:
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("benchmarks.attention", None, __doc__, formatter_class=text)
  add = parser.add_argument
  add("--tokens", type=positive, nargs="+", default=[20, 68, 164, 257, 260], help="lengths")
  add("--batch", type=positive, default=16, help="(16)")
  add("--heads", type=positive, default=6, help="(6)")
  add("--head_dim", type=positive, default=64, help="(64)")
  add("--dtype", choices=DTYPES, default="float32", help="(float32)")
  add("--repeats", type=positive, default=10, help="medians are over so many (10)")
  add("--out", help="append JSON lines to this file")
  args = parser.parse_args(argv)
  run(lambda: benchmark(args))


if __name__ == "__main__":
  main(sys.argv[1:])

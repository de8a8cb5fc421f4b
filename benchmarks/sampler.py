"""Sampling: seconds an image, and with a trained model how good it is for how many evaluations.

python -m benchmarks.sampler --variant Ti/4 --size 32 --batch_size 16 --steps 125 --out speed.jsonl
python -m benchmarks.sampler --workdir runs/quickstart --num 500 --seeds 3 --out quality.jsonl

Speed is measured on random weights, in turns in one process: `umd` is `Inference.sample`, one
program; `plain` is the same network the plain way: layers in a loop, guidance by two passes, and a
Python loop over a compiled step. Quality is in `benchmarks.sampler_quality`.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.records import append
from tools.command_line import positive, run
from umd import samplers
from umd.models import network
from umd.models.autoencoder import AutoEncoder
from umd.paths import make_path
from umd.samplers import SOLVERS, Sampling
from umd.samplers.keys import example_keys
from umd.trained.inference import Inference

CLASSES, TIMESTEPS = 1000, 1000


def plain(inference: Inference, sampling: Sampling) -> Callable:
  """Makes `sample(params, keys, labels)` the plain way: nothing is compiled but a step."""
  model, path, scale = inference.model, inference.path, sampling.cfg_scale

  def predict(params, x, t, labels):
    return network.predict(model, params, x, jnp.full(len(x), t, jnp.int32), labels)["eps"]

  @jax.jit
  def step(params, state, keys, labels, t, s):
    def denoise(x, t):
      eps = predict(params, x, t, labels)
      if scale != 1:
        null = predict(params, x, t, jnp.full_like(labels, model.num_classes))
        eps = null + scale * (eps - null)
      return path.invert("eps", eps, x, t)

    return samplers.make_sampler(sampling, denoise, path).step(state, keys, t, s)[0]

  def sample(params, keys, labels):
    x, keys = inference.noise(keys)
    # The denoiser of this one is never asked.
    sampler = samplers.make_sampler(sampling, lambda x, t: (x, x), path)
    state = sampler.start(x)
    for t, s in itertools.pairwise(sampler.times):
      state = step(params, state, keys, labels, t, s)
    return state.x

  return sample


def speed(args: argparse.Namespace) -> list[dict]:
  """A row for each way of sampling and each guidance."""
  size = (args.size, args.size, 3)
  model = AutoEncoder(args.variant, size, CLASSES, scan=True)
  inference = Inference(model, make_path("cosine", TIMESTEPS))
  params = jax.jit(functools.partial(network.init_params, model))(jax.random.key(0))
  given = params, example_keys(0, jnp.arange(args.batch_size)), jnp.arange(args.batch_size)
  rows, ways, seconds = {}, {}, {}
  for scale in args.cfg_scale:
    settings = dict(sampler=args.sampler, steps=args.steps, cfg_scale=scale)
    sampling = Sampling(**settings)
    whole = jax.jit(functools.partial(inference.sample, sampling=sampling))
    for kind, way in (("umd", whole), ("plain", plain(inference, sampling))):
      start = time.perf_counter()
      jax.block_until_ready(way(*given))
      ways[kind, scale], seconds[kind, scale] = way, []
      rows[kind, scale] = {
        "way": kind,
        **settings,
        "evaluations": SOLVERS[args.sampler].evaluations(args.steps),
        "first_seconds": time.perf_counter() - start,
      }
  for _ in range(args.repeats):  # In turns: what slows the machine down slows all.
    for key, way in ways.items():
      start = time.perf_counter()
      jax.block_until_ready(way(*given))
      seconds[key].append(time.perf_counter() - start)
  for (kind, scale), row in rows.items():
    taken = seconds[kind, scale]
    row["seconds_per_image"] = statistics.median(taken) / args.batch_size
    row["compile_seconds"] = row.pop("first_seconds") - min(taken)
    ratios = [b / a for a, b in zip(taken, seconds["plain", scale], strict=True)]
    row["times_as_fast"] = statistics.median(ratios)
    row["times_as_fast_range"] = [min(ratios), max(ratios)]
  return list(rows.values())


def print_speed(rows: list[dict]) -> None:
  """A table of `speed`."""
  names = ("", "cfg", "evaluations", "s/image", "images/s", "times", "compile, s")
  print(("{:>8}" * 2 + "{:>13}" * 5).format(*names))
  for row in rows:
    per_image = row["seconds_per_image"]
    cells = (per_image, 1 / per_image, row["times_as_fast"], row["compile_seconds"])
    shown = "".join(f"{cell:13.3f}" for cell in cells)
    print(f"{row['way']:>8}{row['cfg_scale']:8.2f}{row['evaluations']:13}{shown}")


def work(args: argparse.Namespace) -> None:
  """Measures what was asked for."""
  if args.workdir:
    from benchmarks import sampler_quality  # Reads data.

    rows = sampler_quality.measure(args)
  else:
    print_speed(rows := speed(args))
  for row in rows:
    append(args, "sampler", row)


def main(argv: list[str]) -> None:
  first = __doc__.split("\n", maxsplit=1)[0]
  parser = argparse.ArgumentParser(prog="benchmarks.sampler", description=first)
  add = parser.add_argument
  add("--variant", default="Ti/4", help="of the model with random weights (Ti/4)")
  add("--size", type=positive, default=32, help="side of its images in pixels (32)")
  add("--batch_size", type=positive, default=16, help="images at a time, for speed (16)")
  add("--sampler", choices=SOLVERS, default="ddim", help="for speed (ddim)")
  add("--steps", type=positive, default=125, help="for speed; of the standard DDIM (125)")
  add("--cfg_scale", type=float, nargs="+", default=[1.0, 1.5], help="guidance (1 1.5)")
  add("--repeats", type=positive, default=3, help="medians are over so many (3)")
  add("--workdir", metavar="DIR", help="of a trained model: measure quality instead")
  add("--num", type=positive, default=500, help="samples of each seed, for quality (500)")
  add("--seeds", type=positive, default=3, help="so many, for the spread (3)")
  add("--evaluations", type=positive, nargs="+", default=[5, 10, 15, 20, 25, 50, 125])
  add("--samplers", nargs="+", help="SAMPLER or SAMPLER:SPACING, for quality (some of each)")
  add("--reference", type=positive, default=500, help="steps of Heun's that count as exact (500)")
  add("--out", help="append JSON lines to this file")
  args = parser.parse_args(argv)
  run(lambda: work(args))


if __name__ == "__main__":
  main(sys.argv[1:])

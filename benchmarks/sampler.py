"""Sampling: seconds an image, beside a plain loop over a compiled step.

python -m benchmarks.sampler --variant Ti/4 --size 32 --batch_size 16 --steps 125 --out speed.jsonl

On random weights: `umd` is `Inference.sample`, one program; `plain` is the same network the plain
way: guidance by two passes, and a Python loop over a compiled step. How good samples are for how
many evaluations of the network is measured by `benchmarks.sampler_quality`.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks import harness
from benchmarks.harness import Column
from tools.command_line import positive
from umd import samplers
from umd.models import network
from umd.models.autoencoder import AutoEncoder
from umd.paths import make_path
from umd.samplers import SOLVERS, Sampling
from umd.samplers.keys import example_keys
from umd.trained.inference import Inference

CLASSES, TIMESTEPS = 1000, 1000
COLUMNS = (
  Column("", "way"),
  Column("cfg", "cfg_scale"),
  Column("evaluations", "evaluations"),
  Column("s/image", "seconds_per_image", "{:.3f}"),
  Column("images/s", "images_per_second", "{:.3f}"),
  Column("times", "times_as_fast", "{:.2f}"),
)


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


def speed(args: argparse.Namespace) -> Iterator[dict]:
  """A row for each way of sampling and each guidance."""
  size = (args.size, args.size, 3)
  model = AutoEncoder(args.variant, size, CLASSES, scan=True)
  inference = Inference(model, make_path("cosine", TIMESTEPS))
  params = jax.jit(functools.partial(network.init_params, model))(jax.random.key(0))
  arguments = params, example_keys(0, jnp.arange(args.batch_size)), jnp.arange(args.batch_size)
  for scale in args.cfg_scale:
    sampling = Sampling(sampler=args.sampler, steps=args.steps, cfg_scale=scale)
    whole = jax.jit(functools.partial(inference.sample, sampling=sampling))
    ways = {"umd": whole, "plain": plain(inference, sampling)}
    calls = {name: functools.partial(way, *arguments) for name, way in ways.items()}
    times = harness.in_turns(calls, args.repeats)
    for name, own in times.items():
      ratio, least, most = own.faster_than(times["plain"])
      yield {
        "way": name,
        "cfg_scale": scale,
        "evaluations": SOLVERS[args.sampler].evaluations(args.steps),
        "seconds_per_image": own.median / args.batch_size,
        "images_per_second": args.batch_size / own.median,
        "times_as_fast": ratio,
        "times_as_fast_range": [least, most],
      }


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("sampler", __doc__)
  add = parser.add_argument
  add("--variant", default="Ti/4", help="of the model with random weights (Ti/4)")
  add("--size", type=positive, default=32, help="side of its images in pixels (32)")
  add("--batch_size", type=positive, default=16, help="images at a time (16)")
  add("--sampler", choices=SOLVERS, default="ddim", help="(ddim)")
  add("--steps", type=positive, default=125, help="(125)")
  add("--cfg_scale", type=float, nargs="+", default=[1.0, 1.5], help="guidance (1 1.5)")
  harness.main(parser, COLUMNS, speed, argv)


if __name__ == "__main__":
  main()

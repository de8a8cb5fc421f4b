"""How good samples of a trained model are for how many evaluations of its network.

python -m benchmarks.sampler_quality --workdir runs/quickstart --num 500 --seeds 3 --out q.jsonl

`error` is the root mean square distance of images from those that Heun's method with very many
steps makes of the same noise, in [-1, 1]: what a sampler loses by its steps, of however good a
model. `frechet` is the Frechet distance to the training data in features of a small classifier (see
`evaluators.generation`), mean and standard deviation over seeds. The standard is DDIM; its last row
is what the others are to reach.
"""

import argparse
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from benchmarks import harness
from benchmarks.harness import Column
from evaluators import generation
from evaluators.context import Context
from tools.command_line import positive
from umd import load
from umd.devices.mesh import make_mesh
from umd.runs import workdir
from umd.samplers import SOLVERS, SPACINGS
from umd.trained.model import Pretrained

WAYS = (
  *("ddim", "dpmpp_2m", "dpmpp_2m:logsnr", "dpmpp_2m:quadratic", "dpmpp_2m:karras"),
  *("ab2", "ab2:quadratic", "heun", "heun:quadratic"),
)
COLUMNS = (
  Column("cfg", "cfg_scale"),
  Column("sampler", "sampler"),
  Column("spacing", "spacing"),
  Column("evaluations", "evaluations"),
  Column("error", "error", "{:.4f}"),
  Column("frechet", "frechet_mean", "{:.2f}"),
  Column("deviation", "frechet_deviation", "{:.2f}"),
)
COMPARED = 64  # Images whose distance from the exact ones is taken.
EVERY = 10**6  # No picture is wanted but the last.


def parse(ways: list[str] | None) -> Iterator[tuple[str, str]]:
  """(sampler, spacing) of each of `ways`, or of WAYS.

  Raises:
    ValueError: there is no such sampler or spacing.
  """
  for way in ways or WAYS:
    sampler, _, spacing = way.partition(":")
    if sampler not in SOLVERS or (spacing and spacing not in SPACINGS):
      raise ValueError(
        f"--samplers={way!r} must be SAMPLER or SAMPLER:SPACING, of {list(SOLVERS)} and "
        f"{list(SPACINGS)}."
      )
    yield sampler, spacing or "uniform"


def steps_for(sampler: str, wanted: int) -> int:
  """The most steps that take no more than `wanted` evaluations, at least one."""
  return (wanted + 1) // 2 if sampler == "heun" else wanted


def draw(model: Pretrained, num: int, seed: int, **settings) -> np.ndarray:
  """Samples, float32 in [-1, 1], by one program for all numbers and places of steps."""
  labels = "all" if model.num_classes else None
  steps = model.steps(labels, num, seed=seed, quantize="none", every=EVERY, **settings)
  *_, last = steps
  return last.x0


def open_judge(model: Pretrained, num: int, cache: str) -> Callable[[np.ndarray], float]:
  """`frechet(images)` to the data that the run's own samples were judged by.

  Raises:
    ValueError: the run has no evaluator of samples by a classifier.
  """
  config = workdir.read_json(workdir.join(model.folder, "config.json")) or {}
  specs = [s for s in config.get("evals", {}).values() if isinstance(s, Mapping)]
  specs = [s for s in specs if s.get("type") == "generation" and s.get("train") and s.get("test")]
  if not specs:
    raise ValueError(
      f"--workdir={model.folder!r}: the run did not judge samples by a classifier, so there is no "
      "data to measure against. Give a run with evals of the type generation with train= and test=."
    )
  inference, mesh = model.description.inference(), make_mesh()
  context = Context(inference, (), mesh, 256, 0, cache, lambda text: None)
  data = {key: specs[0][key] for key in ("train", "test")}
  judge = generation.ClassifierJudge(context, generation.Settings(num=num, sampling={}, **data))
  judge.prepare()
  look = jax.jit(functools.partial(judge.look, {}))

  def frechet(images: np.ndarray) -> float:
    found = {name: np.asarray(x) for name, x in look(images).items()}
    return dict(judge.measure(found, None))["frechet_classifier"]

  return frechet


def measure(args: argparse.Namespace) -> Iterator[dict]:
  """A row for each guidance, sampler and number of evaluations."""
  ways, model = list(parse(args.samplers)), load(args.workdir)
  if args.num < 2:
    raise ValueError(f"--num={args.num} must be at least 2: one sample has no distribution.")
  most = model.description.inference().path.timesteps
  with tempfile.TemporaryDirectory() as empty:
    beside = os.path.join(os.path.dirname(model.folder.rstrip("/")), "cache")
    frechet = open_judge(model, args.num, beside if os.path.isdir(beside) else empty)
    for scale in sorted({1.0, model.sampling.cfg_scale}):
      sample = functools.partial(draw, model, cfg_scale=scale)
      reference = min(args.reference, most)
      exact = sample(COMPARED, 0, sampler="heun", steps=reference, spacing="uniform")
      for sampler, spacing in ways:
        for steps in sorted({min(most, steps_for(sampler, n)) for n in args.evaluations}):
          settings = dict(sampler=sampler, steps=steps, spacing=spacing)
          error = np.sqrt(np.square(sample(COMPARED, 0, **settings) - exact).mean())
          values = [frechet(sample(args.num, seed, **settings)) for seed in range(args.seeds)]
          yield {
            "cfg_scale": scale,
            **settings,
            "evaluations": SOLVERS[sampler].evaluations(steps),
            "error": float(error),
            "frechet": values,
            "frechet_mean": float(np.mean(values)),
            "frechet_deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
          }


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("sampler_quality", __doc__)
  add = parser.add_argument
  add("--workdir", metavar="DIR", required=True, help="of a trained model")
  add("--num", type=positive, default=500, help="samples of each seed (500)")
  add("--seeds", type=positive, default=3, help="so many, for the spread (3)")
  add("--evaluations", type=positive, nargs="+", default=[5, 10, 15, 20, 25, 50, 125])
  add("--samplers", nargs="+", help="SAMPLER or SAMPLER:SPACING (some of each)")
  add("--reference", type=positive, default=500, help="steps of Heun's that count as exact (500)")
  harness.main(parser, COLUMNS, measure, argv)


if __name__ == "__main__":
  main()

"""Images/s of the training step beside the same step as the public code computes it.

python -m benchmarks.train_step --cases ti4_32 s4_64 --methods umd mae dit maskdit --repeats 5

Every variant is the trainer's step (loss, gradient, clipping, AdamW, average, guard) with the same
weights, batch and random numbers, on synthetic images. `ours` runs as the trainer decides for this
device, `plain` as `benchmarks/plain.py` says, others with the options that their names say. GFLOP/s
are of the model's own matrix products (`umd.devices.flops`): work done again does not count.
`x plain` compares images/s, `by cores` the seconds of all cores, which other work hardly changes.
Memory is the compiler's account of one device: arguments (state and batch) and temporaries.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import harness
from benchmarks.harness import Column, Times
from benchmarks.plain import Plain
from configs import common, methods
from tools.command_line import positive
from trainers import auto, diffusion, optim
from umd import objectives
from umd.devices import chips
from umd.devices.mesh import make_mesh, put_batch, replicate
from umd.models.autoencoder import AutoEncoder
from umd.models.network import param_shapes
from umd.objectives import Objective
from umd.paths import make_path
from umd.state import Step, TrainState, make_train_step, state_shapes

# name: variant, side of the images in pixels, batch.
CASES = {
  "nano_16": ("nano/4", 16, 8),  # for tests
  "micro2_8": ("micro/2", 8, 128),
  "ti4_32": ("Ti/4", 32, 64),
  "s4_64": ("S/4", 64, 16),
  "b4_64": ("B/4", 64, 256),
}
METHODS = ("umd", "mae", "dit", "maskdit")
# name: class of the model, and options of a config's model that are not the defaults.
VARIANTS = {
  "ours": (AutoEncoder, {}),
  "plain": (Plain, {}),
  "unrolled": (AutoEncoder, dict(scan="false", remat="none")),
  "unrolled_dots": (AutoEncoder, dict(scan="false", remat="dots")),
  "unrolled_full": (AutoEncoder, dict(scan="false", remat="full")),
  "scan": (AutoEncoder, dict(scan="true", remat="none")),
  "scan_dots": (AutoEncoder, dict(scan="true", remat="dots")),
  "scan_full": (AutoEncoder, dict(scan="true", remat="full")),
  "shared": (AutoEncoder, dict(condition="adaln_shared")),
}
STEPS = 1000  # of the learning rate's schedule


class Candidate(NamedTuple):
  """A compiled step that takes part.

  Attributes:
    compiled: (state, batch, ()) -> (state, metrics).
    state: to begin from; donated.
    batch: on the devices.
    row: what is known of it before it has run.
  """

  compiled: Any
  state: TrainState
  batch: dict
  row: dict


def random_state(model: AutoEncoder, tx) -> TrainState:
  """Draws weights with NumPy, the same for every variant; compiling `init` would take longer."""
  shapes = param_shapes(model)
  rng = np.random.default_rng(0)
  draw = lambda path, x: 0.02 * rng.standard_normal(x.shape) + (path[-1].key == "scale")
  draw32 = lambda path, x: draw(path, x).astype(np.float32)
  params = jax.tree_util.tree_map_with_path(draw32, shapes)
  state = state_shapes(lambda key: params, tx)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  return zeros.replace(params=params, ema_params=params)


def parts(case: str, method: str, dtype: str, variant: str) -> tuple[Step, TrainState, dict, float]:
  """(the trainer's step, a state, a batch, FLOPs of a step) of one variant.

  The guard and the average are on, as they are by default; MAE has no AdaLN, as in the paper.
  """
  size_name, side, batch_size = CASES[case]
  kind, options = VARIANTS[variant]
  size = (side, side, 3)
  options = {"condition": "token" if method == "mae" else "adaln", **options}
  layout = {key: options.pop(key) for key in ("scan", "remat") if key in options}
  streams = objectives.make_streams(methods.streams_of(method))
  mesh, path = make_mesh(), make_path("cosine", 1000)

  def build(**attributes) -> Objective:
    model = kind(size_name, size, dtype=dtype, **options, **attributes)
    return Objective(model, path, streams, batch_size)

  objective = auto.settle(build, mesh, **layout)
  settings = common.optim(common.scaled(1.5e-4, batch_size), 0.05, 0.95)
  schedule = optim.make_schedule(settings.pop("lr"), STEPS, settings.pop("warmup"))
  tx = optim.make_optimizer(schedule, **settings)
  state = replicate(random_state(objective.model, tx), mesh)
  step = make_train_step(objective, tx, schedule, ema_decay=0.9999, seed=0, state=state)
  images = np.random.default_rng(0).uniform(-1, 1, (batch_size, *size)).astype(np.float32)
  batch = put_batch({"image": images, "label": np.zeros(batch_size, np.int32)}, mesh)
  # What the plain way does beside the model's own products is no work that counts.
  counted = Objective(
    AutoEncoder(size_name, size, dtype=dtype, **options), path, streams, batch_size
  )
  return step, state, batch, diffusion.count_work(counted, mesh).flops * mesh.size


def compile_step(case: str, method: str, dtype: str, variant: str) -> Candidate:
  """Compiles one variant, and takes its first step."""
  step, state, batch, work = parts(case, method, dtype, variant)
  start = time.perf_counter()
  compiled = step.lower(state, batch).compile()
  seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
  state, metrics = compiled(state, batch, ())
  row = dict(
    case=case,
    method=method,
    dtype=dtype,
    variant=variant,
    gflop_per_step=work / 1e9,
    compile_seconds=seconds,
    arguments_mib=memory.argument_size_in_bytes / 2**20,
    temporaries_mib=memory.temp_size_in_bytes / 2**20,
    first_loss=float(metrics["loss"]),
  )
  return Candidate(compiled, state, batch, row)


def summarise(candidates: list[Candidate], times: list[Times]) -> Iterator[dict]:
  """A row per candidate: rates from medians, and how it compares to the plain variant."""
  names = [candidate.row["variant"] for candidate in candidates]
  plain = times[names.index("plain")] if "plain" in names else None
  device = jax.devices()[0]
  for candidate, own in zip(candidates, times, strict=True):
    row = candidate.row
    rate = 1e9 * row["gflop_per_step"] / own.median / jax.device_count()
    peak = chips.peak_flops(device.device_kind, row["dtype"])
    batch_size = len(candidate.batch["label"])
    measured = dict(
      images_per_second=batch_size / own.median,
      images_per_second_best=batch_size / own.best,
      core_seconds=statistics.median(own.cores),
      gflops_per_second=rate / 1e9,
      mfu=rate / peak if peak else None,
      device_peak_mib=((device.memory_stats() or {}).get("peak_bytes_in_use", 0)) / 2**20 or None,
      seconds=own.wall,
    )
    if plain:
      ratio, least, most = own.faster_than(plain)
      by_cores, *_ = Times(own.cores, []).faster_than(Times(plain.cores, []))
      measured |= dict(
        times_plain=ratio, times_plain_range=[least, most], times_plain_cores=by_cores
      )
    yield {**row, **measured}


COLUMNS = (
  Column("case", "case"),
  Column("method", "method"),
  Column("dtype", "dtype"),
  Column("variant", "variant"),
  Column("images/s", "images_per_second", "{:.2f}"),
  Column("best", "images_per_second_best", "{:.2f}"),
  Column("x plain", "times_plain", "{:.2f}"),
  Column("(range)", "times_plain_range", "{0[0]:.2f}-{0[1]:.2f}"),
  Column("by cores", "times_plain_cores", "{:.2f}"),
  Column("core s", "core_seconds", "{:.3f}"),
  Column("GFLOP", "gflop_per_step", "{:.0f}"),
  Column("GFLOP/s", "gflops_per_second", "{:.0f}"),
  Column("MFU", "mfu", "{:.1%}"),
  Column("compile s", "compile_seconds", "{:.1f}"),
  Column("args MiB", "arguments_mib", "{:.0f}"),
  Column("temp MiB", "temporaries_mib", "{:.0f}"),
  Column("loss", "first_loss", "{:.5f}"),
)


def call(candidate: Candidate) -> Callable:
  """A function that takes the candidate's next step; the state is donated, so it is kept here."""
  states = [candidate.state]

  def step():
    state, metrics = candidate.compiled(states.pop(), candidate.batch, ())
    states.append(state)
    return state, metrics

  return step


def measure(args: argparse.Namespace) -> Iterator[dict]:
  """Rows of all that is asked for, each case, method and dtype on its own."""
  for case, method, dtype in itertools.product(args.cases, args.methods, args.dtypes):
    candidates = [compile_step(case, method, dtype, variant) for variant in args.variants]
    calls = {c.row["variant"]: call(c) for c in candidates}
    times = harness.in_turns(calls, args.repeats, args.inner, warm_up=0)
    yield from summarise(candidates, list(times.values()))


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("train_step", __doc__)
  several = lambda known, default: dict(nargs="+", choices=known, default=default)
  parser.add_argument("--cases", **several(tuple(CASES), ["ti4_32"]), help="sizes, see CASES")
  parser.add_argument("--methods", **several(METHODS, list(METHODS)))
  parser.add_argument("--dtypes", **several(("float32", "bfloat16"), ["float32"]))
  parser.add_argument("--variants", **several(tuple(VARIANTS), ["ours", "plain"]))
  parser.add_argument("--inner", type=positive, default=1, help="steps of a variant in each round")
  harness.main(parser, COLUMNS, measure, argv)


if __name__ == "__main__":
  main()

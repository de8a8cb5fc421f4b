"""Evaluates a trained run without training it."""

import contextlib
import datetime
import json
import os
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

import evaluators
from trainers import logs
from trainers.config.records import Evaluate, given, to_dict
from umd import report
from umd.devices import mesh as sharding
from umd.runs import progress, writers
from umd.runs import workdir as folder
from umd.state import TrainState
from umd.trained import saved


class Parts(NamedTuple):
  """The trained run, and the evaluators that look at it."""

  run: saved.TrainedRun
  evaluators: list[evaluators.Scheduled]


def prepare(config: Evaluate, workdir: str, cache: str, init_from: str = "") -> Parts | None:
  """Opens the run in `init_from` and builds the evaluators; computes and writes nothing.

  The model is the one that the run's own config describes. Without `init_from`, where the run is
  yet to be trained, there is nothing to build, and the result is None.

  Raises:
    ValueError: the run is not what `config.expected` says, or an evaluator cannot be built.
    FileNotFoundError: there is no trained run.
  """
  sharding.check_divides("batch_size", config.eval_batch_size, sharding.make_mesh())
  return _build(config, cache, init_from) if init_from else None


def _build(config: Evaluate, cache: str, init_from: str) -> Parts:
  run = saved.open_run(init_from, scan=config.model.scan)
  saved.check_expected(run, given(config.expected))
  mesh = sharding.make_mesh()
  context = evaluators.Context(
    inference=run.inference,
    streams=run.streams,
    mesh=mesh,
    batch_size=config.eval_batch_size,
    seed=config.seed,
    cache=cache,
    codec=run.open_codec(mesh),
  )
  return Parts(run, evaluators.from_config(settings(config, run), context))


def settings(config: Evaluate, run: saved.TrainedRun) -> dict:
  """Returns the evaluators' settings; guidance is left out where the run has no labels for it."""
  evals = to_dict(config.evals)
  for of_evaluator in evals.values():
    if "sampling" in of_evaluator and config.guide_if_labelled and not run.model.num_classes:
      of_evaluator["sampling"]["cfg_scale"] = 1.0
  return evals


def _load(run: saved.TrainedRun, weights: str) -> TrainState:
  """Places the run's weights on all devices: the chosen ones as the average, which evaluators read,
  and the raw ones as parameters.
  """
  mesh = sharding.make_mesh()
  chosen, _, step = run.params(weights)
  raw, _, _ = run.params("raw")
  place = lambda tree: sharding.replicate(tree, mesh)
  return TrainState(jnp.int32(step), place(raw), place(chosen), ())


def run(
  parts: Parts | None,
  config: Evaluate,
  workdir: str,
  name: str,
  *,
  cache: str,
  init_from: str = "",
  wandb_key: str | None = None,
) -> dict:
  """Runs every evaluator once on the newest checkpoint of the run in `init_from`.

  It writes metrics and pictures to `workdir`, and adds a line with the settings and all numbers to
  its evaluations.jsonl. Arguments are as in `trainers.diffusion.run`; `parts` is None if the run
  was yet to be trained when this one was prepared.
  """
  say = logs.printer(name)
  started = time.time()
  trained, scheduled = parts or _build(config, cache, init_from)
  state = _load(trained, config.init_weights)
  step = int(state.step)
  say(f"evaluates {trained.folder}, step {step}, {config.init_weights} weights")
  is_main = jax.process_index() == 0
  if is_main:
    folder.start(workdir, to_dict(config))
  # Results of earlier evaluations, of whatever step, stay in the logs.
  writer = logs.make_writer(config, workdir, sys.maxsize, wandb_key)
  writer.latest.clear()
  with contextlib.closing(writer):
    for s in scheduled:
      began = time.perf_counter()
      with progress.during(s.name, say, ends=False):
        values = {f"{s.name}/{k}": v for k, v in s.evaluator(state)}
      writer.write(step, values)
      say(f"{s.name} ({time.perf_counter() - began:.0f} s)")
      for k, v in values.items():
        if not isinstance(v, writers.Images):
          say(f"  {k} {v}" if isinstance(v, str) else f"  {k} {v:.4g}")
  summary = logs.summarise(name, step, started, sorted(writer.latest), writer)
  if is_main:
    record = {
      "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "run": trained.folder,
      "weights": config.init_weights,
      **summary,
      "evals": settings(config, trained),
    }
    path = os.path.join(workdir, "evaluations.jsonl")
    earlier = folder.read_bytes(path) or b""
    folder.write_bytes(path, earlier + json.dumps(record).encode() + b"\n")
  report.Reporter(workdir).finish(report.FINISHED)
  return summary

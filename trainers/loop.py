"""The loop of every trainer: restore; for each batch step, log, evaluate, save, stop; finish."""

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from evaluators import Scheduled
from trainers import logs
from trainers.config.records import to_dict
from umd import data, report
from umd.devices.mesh import each_process, prefetch
from umd.runs import preemption, progress, writers
from umd.runs import workdir as folder
from umd.runs.checkpoint import Checkpoints
from umd.runs.goodput import Goodput

REPORT_SECONDS = 60.0  # At most so often the report is written when no evaluation asks for it.


@dataclasses.dataclass(frozen=True)
class Training:
  """What a trainer gives the loop.

  Attributes:
    like: shapes, types and places of a state: what a checkpoint is restored into.
    fresh: makes the state that a first start begins from.
    step: (state, batch) -> (state, metrics, scalars on the devices).
    source: the data to train on.
    steps: the number of the last step.
    evaluators: `evaluator(state)` yields (name, value); each has a schedule.
    mesh: all devices.
    max_skipped: the number of refused steps in a row that ends the run, see `logs.StepMetrics`.
    inspect: `inspect(state, step)` finds what is not finite in a step and says so.
    work: what a step asks of each device, for the logged speed.
  """

  like: Any
  fresh: Callable[[], Any]
  step: Callable
  source: data.Source
  steps: int
  evaluators: Sequence[Scheduled]
  mesh: Mesh
  max_skipped: int = 1
  inspect: Callable[[Any, int], str] = lambda state, step: ""
  work: writers.Work = writers.Work()  # noqa: RUF009 (frozen)


def train(
  training: Training, config, workdir: str, name: str, wandb_key: str | None = None
) -> dict:
  """Trains to the last step and returns the summary; goes on from the workdir's last checkpoint.

  Args:
    training: what is trained, on what.
    config: the trainer's: batch_size, seed, log_every, checkpoint, summary and wandb count here.
    workdir: the folder of the run.
    name: is printed in front of every line.
    wandb_key: API key of Weights & Biases.

  Raises:
    Preempted: a signal ended the run; the same command goes on.
    FloatingPointError: numbers are not finite, see `logs.StepMetrics`.
    OSError: the last checkpoint could not be written.
  """
  say = logs.printer(name)
  steps = training.steps
  save_every = config.checkpoint.every
  started = time.time()
  goodput = Goodput(workdir)
  pending = logs.StepMetrics(training.max_skipped)

  # Restore. A checkpoint promises: the state to the bit, everything logged up to it is written, and
  # the data go on with the next batch. Batches, noise, masks and times are functions of
  # (seed, step), so the number of the step is all that has to be known of them.
  kept = config.checkpoint
  checkpoints = Checkpoints(workdir, kept.keep, kept.keep_every, kept.best, say=say)
  restored = checkpoints.restore_newest(training.like)
  if restored is None:
    step, interrupted = 0, {}
    state = training.fresh()
  else:
    for line in restored.reports:
      say(f"WARNING: {line}")
    state, step = restored.state, restored.step
    interrupted = restored.data.get("interrupted", {})
    say(f"resumed at step {step}")
  pending.from_json(interrupted.get("unlogged", []))
  if jax.process_index() == 0:
    folder.start(workdir, to_dict(config))
  goodput.resume(step)
  writer = logs.make_writer(config, workdir, step, wandb_key)
  pace = writers.Progress(steps, step, config.batch_size, training.work)
  reporter = report.Reporter(workdir, steps)
  evaluate = functools.partial(
    _evaluate,
    evaluators={e.name: e.evaluator for e in training.evaluators},
    writer=writer,
    goodput=goodput,
    summary=config.summary,
    say=say,
  )

  with reporter, preemption.protect(), checkpoints, contextlib.closing(writer):
    # What a signal kept the last start from evaluating is made up for, on the very same state.
    left = unevaluated(interrupted.get("unevaluated", []), workdir, step)
    left, _ = evaluate(left, state=state, step=step)
    if left:
      raise _stopped(step, steps, save_every, say)

    batches = train_batches(training.source, config.batch_size, config.seed, step)
    batches = itertools.islice(batches, steps - step)
    batches = progress.first_during("reading the first batch", batches, say)
    batches = goodput.waiting(prefetch(batches, training.mesh))
    compiling = progress.during("compiling the training step", say)
    for step, batch in enumerate(batches, step + 1):  # noqa: B020 (goes on counting)
      # Step. The call returns before the devices are done, so that the host can fetch the next
      # batch meanwhile. The old state is donated: its memory becomes the new one's.
      with goodput.step(), compiling:
        state, metrics = training.step(state, batch)
      compiling = contextlib.nullcontext()
      pending.add(step, metrics)
      last = step == steps
      due = [e.name for e in training.evaluators if e.due(step, steps)]
      saving = save_every > 0 and (last or step % save_every == 0)

      # Log. Only here metrics are fetched, which waits for all steps so far.
      if last or due or saving or step % config.log_every == 0:
        values = pending.drain(say, functools.partial(training.inspect, state))
        shares = {**goodput.shares(), logs.INPUT_WAIT: goodput.input_wait()}
        logs.log(step, steps, values, pace.tick(step), shares, writer, say)
        logs.list_bad_data(training.source, workdir)

      # Evaluate.
      left, numbers = evaluate(due, state=state, step=step)

      # Save, after the metrics are safe, for a checkpoint promises that they are.
      stopping = preemption.requested()
      if saving or (stopping and save_every > 0):
        writer.flush()
        position = {"position": step * config.batch_size}
        if stopping:
          position["interrupted"] = {"unlogged": pending.to_json(), "unevaluated": left}
        with goodput.save(step):
          checkpoints.save(state, step, position, numbers)
      if (due or saving) and not last:
        reporter.update(0.0 if due else REPORT_SECONDS)
      if due:
        pace.resume(step)  # The time of an evaluation is not that of steps.

      # Stop, if a signal asks for it and something is left to do.
      if stopping and (left or not last):
        raise _stopped(step, steps, save_every, say)

  # Finish, after the last save is complete and the writers are closed.
  writer.latest.update(goodput.shares())
  summary = logs.summarise(name, step, started, config.summary, writer)
  if jax.process_index() == 0:
    folder.finish(workdir, summary)
  reporter.finish(report.FINISHED)
  return summary


def _evaluate(
  names: Sequence[str],
  *,
  state,
  step: int,
  evaluators: Mapping[str, Callable],
  writer: writers.Writer,
  goodput: Goodput,
  summary: Sequence[str],
  say: Callable[[str], None],
) -> tuple[list[str], dict[str, float]]:
  """Runs these evaluators; returns the names that a signal left undone, and all numbers."""
  numbers = {}
  for i, name in enumerate(names):
    began = time.perf_counter()
    label = f"step {step}  {name}"
    try:
      with goodput.timer("evaluation"), progress.during(label, say, ends=False):
        preemption.check()
        values = {f"{name}/{k}": v for k, v in evaluators[name](state)}
    except preemption.EvaluationStopped:
      return list(names[i:]), numbers
    writer.write(step, values)
    numbers |= writers.numbers(values)
    seconds = time.perf_counter() - began
    say(f"{label} ({seconds:.0f} s)  {logs.shown(summary, values, f'{name}/')}")
  return [], numbers


def unevaluated(names: Sequence[str], workdir: str, step: int) -> list[str]:
  """Returns those evaluators that are not in the log of `step` yet, the same in all processes.

  An earlier start may have run some of them before it was killed.
  """
  if not names:
    return []
  path = os.path.join(workdir, "metrics.jsonl")
  records = writers.read_jsonl(path) if jax.process_index() == 0 else []
  logged = {key.split("/")[0] for record in records if record["step"] == step for key in record}
  (done,) = next(each_process([np.float32([name in logged for name in names])]))
  return [name for name, ran in zip(names, done, strict=True) if not ran]


def _stopped(
  step: int, steps: int, save_every: int, say: Callable[[str], None]
) -> preemption.Preempted:
  """Prints that a signal stopped the run, and returns the exception to raise."""
  kept = "saved; the same command goes on" if save_every else "nothing saved: checkpoint.every=0"
  say(f"stopped at step {step}/{steps} by {preemption.reason()}, {kept}")
  return preemption.preempted()


def train_batches(
  source: data.Source, batch_size: int, seed: int, step: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this process's rows of the batches after step `step`."""
  return data.train_batches(
    source,
    batch_size,
    seed=seed,
    start_step=step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )

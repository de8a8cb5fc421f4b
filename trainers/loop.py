"""The loop of every trainer: steps, logs, evaluations and checkpoints, and whatever ends it early.

A loop is opened before there is a state, which it may find in a checkpoint, and is left with its
logs closed and its last save completed, however it ends.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from evaluators import Scheduled
from trainers import diagnosis, logs
from umd import data, report
from umd.codecs.codec import encode_batch
from umd.devices import mesh
from umd.devices import mesh as sharding
from umd.runs import preemption, progress, writers
from umd.runs import workdir as folder
from umd.runs.checkpoint import Checkpoints
from umd.runs.goodput import Goodput
from umd.state import Guard, Step, TrainState, make_train_step


def describe(pending: logs.StepMetrics, left: list[str]) -> dict:
  """JSON-able: the metrics of the steps since the last log, and the evaluators not yet run.

  Fetches the metrics from the devices.
  """
  steps = [step for step, _ in pending._pending]
  fetched = jax.device_get([values for _, values in pending._pending])
  return {
    "unlogged": [
      [step, {name: np.asarray(value).item() for name, value in values.items()}]
      for step, values in zip(steps, fetched, strict=True)
    ],
    "unevaluated": left,
  }


def restore(interrupted: Mapping, pending: logs.StepMetrics) -> None:
  """Puts the metrics that `describe` kept back, bit by bit: a float32 is exact as a JSON number."""
  for step, values in interrupted.get("unlogged", []):
    kind = lambda value: np.float32 if isinstance(value, float) else np.int32
    pending.add(step, {name: kind(value)(value) for name, value in values.items()})


def unevaluated(interrupted: Mapping, workdir: str, step: int) -> list[str]:
  """The evaluators that are yet to be run at `step`, the same in all processes.

  Those that an earlier start ran before it was killed are in the log.
  """
  names = interrupted.get("unevaluated", [])
  if not names:
    return []
  path = os.path.join(workdir, "metrics.jsonl")
  records = writers.read_jsonl(path) if jax.process_index() == 0 else []
  logged = {k.split("/")[0] for r in records if r["step"] == step for k in r}
  (done,) = next(mesh.each_process([np.float32([name in logged for name in names])]))
  return [name for name, ran in zip(names, done, strict=True) if not ran]


def ended(step: int, steps: int, saves: bool, say: Callable[[str], None]) -> preemption.Preempted:
  """Tells that a run was stopped; the exception to raise."""
  kept = "saved; the same command goes on" if saves else "nothing saved: checkpoint.every=0"
  say(f"stopped at step {step}/{steps} by {preemption.reason()}, {kept}")
  return preemption.preempted()


def make_step(config: ConfigDict, parts, state: TrainState) -> Step:
  """The compiled step of a trainer's parts, for states of the shapes and places of `state`."""
  return make_train_step(
    parts.objective,
    parts.tx,
    parts.schedule,
    ema_decay=config.ema_decay,
    seed=config.seed,
    state=state,
    guard=Guard(**config.guard.to_dict()),
    accumulate=config.accumulate,
    encode=functools.partial(encode_batch, parts.codec),
    frozen=parts.codec.params,
  )


class Training:
  """`training(state, batch) -> (state, metrics)`, which remembers the state for `inspect`."""

  def __init__(self, config: ConfigDict, parts, state: TrainState, workdir: str):
    self._config, self._parts, self._workdir = config, parts, workdir
    self._step, self._newest = make_step(config, parts, state), state

  def __call__(self, state: TrainState, batch) -> tuple[TrainState, dict]:
    self._newest, values = self._step(state, batch)
    return self._newest, values

  def inspect(self, number: int) -> str:
    """Looks into step `number`, which was not finite; see `trainers.diagnosis.inspect`."""
    parts, seed = self._parts, self._config.seed
    batches_from = lambda n: train_batches(parts.source, self._config.batch_size, seed, n)
    return diagnosis.inspect(parts, batches_from, self._newest.params, number, seed, self._workdir)


BAD_DATA = "bad_data.txt"
REPORT_SECONDS = 60.0  # between two reports that no evaluation asks for


class Loop:
  """One start of a run.

  Attributes:
    step: the step it begins from; 0 unless it resumes.
  """

  def __init__(self, config: ConfigDict, workdir: str, name: str):
    """Opens the run's checkpoints.

    Args:
      config: the trainer's; its `checkpoint`, `log_every`, `summary` and `wandb` count here.
      workdir: of the run.
      name: shown in front of every line printed.
    """
    self._config, self._workdir, self._name = config, workdir, name
    self._say, self._started, self._goodput = logs.printer(name), time.time(), Goodput(workdir)
    retention = {k: v for k, v in config.checkpoint.items() if k != "every"}
    self._checkpoints = Checkpoints(workdir, **retention, say=self._say)
    self.step, self._interrupted = 0, {}

  def restore(self, state):
    """The state of the newest good checkpoint, placed as `state` is; `state` if there is none."""
    found = self._checkpoints.restore_newest(state)
    if found is None:
      return state
    for line in found.reports:
      self._say(f"WARNING: {line}")
    self.step, self._interrupted = found.step, found.data.get("interrupted", {})
    self._say(f"resumed at step {self.step}")
    return found.state

  def run(
    self,
    state,
    step_fn: Callable,
    source: data.Source,
    scheduled: Sequence[Scheduled],
    steps: int,
    *,
    pending: logs.StepMetrics,
    mesh,
    work: writers.Work = writers.Work(),  # noqa: B008 (frozen)
    wandb_key: str | None = None,
  ) -> dict:
    """Trains to the last step; returns the summary, which it also writes.

    Args:
      state: to begin from; `evaluator(state)` yields (name, value).
      step_fn: (state, batch) -> (state, metrics on the devices).
      source: what to train on.
      scheduled: evaluators.
      steps: the last step.
      pending: collects the metrics of steps; `logs.StepMetrics`.
      mesh: all devices.
      work: of a step, for the pace that is logged.
      wandb_key: API key of Weights & Biases.

    Raises:
      Preempted: a signal ended it; it goes on at the next start.
      FloatingPointError: numbers are not finite, see `logs.StepMetrics`.
      OSError: the last checkpoint could not be written.
    """
    self._scheduled, self._steps, self._pending = {s.name: s for s in scheduled}, steps, pending
    self._source = source
    if jax.process_index() == 0:
      folder.start(self._workdir, self._config.to_dict())
    self._goodput.resume(self.step)
    self._writer = logs.make_writer(self._config, self._workdir, self.step, wandb_key)
    batch_size = self._config.batch_size
    self._progress = writers.Progress(steps, self.step, batch_size, work)
    restore(self._interrupted, pending)
    self._report, writer = report.Reporter(self._workdir, steps), contextlib.closing(self._writer)
    with self._report, preemption.protect(), self._checkpoints, writer:
      left = unevaluated(self._interrupted, self._workdir, self.step)
      left = self._evaluate(state, left)[0]
      batches = train_batches(source, batch_size, self._config.seed, self.step)
      batches = progress.first_during("reading the first batch", batches, self._say)
      compiling = progress.during("compiling the training step", self._say)
      for batch in self._goodput.waiting(sharding.prefetch(batches, mesh)):
        if self.step == steps:
          break
        with self._goodput.step(), compiling:
          state, values = step_fn(state, batch)
        compiling = contextlib.nullcontext()
        self.step += 1
        pending.add(self.step, values)
        left, stopping = self._after_step(state)
        if stopping and (self.step < steps or left):
          saves = self._config.checkpoint.every > 0
          raise ended(self.step, steps, saves, self._say)
    return self._finish()

  def _after_step(self, state) -> tuple[list[str], bool]:
    """Logs, evaluates and saves if it is time; (evaluators left undone, whether to stop)."""
    step, every, last = self.step, self._config.checkpoint.every, self.step == self._steps
    due = [s.name for s in self._scheduled.values() if s.due(step, self._steps)]
    saving = every > 0 and (last or step % every == 0)
    if last or due or saving or step % self._config.log_every == 0:
      shares = {**self._goodput.shares(), logs.INPUT_WAIT: self._goodput.input_wait()}
      logs.log(step, self._steps, self._pending, self._progress, self._writer, self._say, shares)
      self._report_bad_data()
    left, values = self._evaluate(state, due)
    stopping = preemption.requested()
    if saving or (stopping and every > 0):
      # After the metrics are safe: a checkpoint promises that everything up to it is written.
      self._writer.flush()
      position = {"position": step * self._config.batch_size}
      if stopping:
        position["interrupted"] = describe(self._pending, left)
      with self._goodput.save(step):
        self._checkpoints.save(state, step, position, values)
    if (due or saving) and not last:
      self._report.update(0.0 if due else REPORT_SECONDS)
    if due:
      self._progress.resume(step)
    return left, stopping

  def _evaluate(self, state, names: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Runs these evaluators; (those left because the run is to end, the numbers of the others)."""
    numbers = {}
    for i, name in enumerate(names):
      began, label = time.perf_counter(), f"step {self.step}  {name}"
      try:
        with self._goodput.timer("evaluation"), progress.during(label, self._say, ends=False):
          preemption.check()
          values = {f"{name}/{k}": v for k, v in self._scheduled[name].evaluator(state)}
      except preemption.EvaluationStopped:
        return list(names[i:]), numbers
      self._writer.write(self.step, values)
      numbers |= writers.numbers(values)
      seconds = time.perf_counter() - began
      shown = logs.shown(self._config.summary, values, f"{name}/")
      self._say(f"{label} ({seconds:.0f} s)  {shown}")
    return [], numbers

  def _report_bad_data(self) -> None:
    """Lists the examples that could not be read; of several processes each has a file.

    Those of earlier starts stay in the list.
    """
    if not self._source.bad:
      return
    process = f"{jax.process_index()}_" if jax.process_count() > 1 else ""
    path = os.path.join(self._workdir, process + BAD_DATA)
    old = (folder.read_bytes(path) or b"").decode(errors="replace").splitlines()
    lines = sorted({*old, *self._source.bad_report().splitlines()})
    if lines != old:
      text = "\n".join(lines) + "\n"
      folder.write_bytes(path, text.encode(errors="backslashreplace"))

  def _finish(self) -> dict:
    self._writer.latest.update(self._goodput.shares())
    summary = logs.summarise(
      self._name, self.step, self._started, self._config.summary, self._writer
    )
    if jax.process_index() == 0:
      folder.finish(self._workdir, summary)
    self._report.finish(report.FINISHED)
    return summary


def train_batches(source: data.Source, batch_size: int, seed: int, step: int):
  """This process's rows of the batches after step `step`."""
  place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  return data.train_batches(source, batch_size, seed=seed, start_step=step, **place)

"""Where the wall time of a run goes, over all its starts."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator

import jax

from umd.runs import workdir as folder

FILE = "goodput.json"
KINDS = ("start", "compile", "input_wait", "evaluation", "checkpoint", "lost")
WRITE_SECONDS = 10.0  # Downtime is known to so much.
MARKS = 20  # checkpoints whose productive time is remembered


class Goodput:
  """Shares of the wall time since the first start of a run; they sum to 1.

  - start: from the beginning of `run` to its first step: data, state, the checkpoint's return.
  - compile: the first call of the step, which traces and compiles it.
  - input_wait: the host waits for a batch. JAX computes behind its back, so that the devices may
    still be at work: an upper bound of the time in which they lack data.
  - evaluation, checkpoint: the host is held up by them; a save's writing in the background is not.
  - lost: downtime between the last sign of life of one start and the next, and steps that were
    done after the checkpoint from which that one goes on.
  - productive: the rest, which is training. It holds what was not measured, e.g. logs.

  No device is waited for to measure anything. Process 0's clock, kept in `goodput.json`.
  """

  def __init__(self, workdir: str, clock: Callable[[], float] = time.time):
    self._path, self._clock = os.path.join(workdir, FILE), clock
    self._start = self._last = clock()
    kept = folder.read_json(self._path) or {}
    self._seconds = dict.fromkeys(KINDS, 0.0) | kept.get("seconds", {})
    self._productive = kept.get("productive", 0.0)
    self._marks = {int(step): seconds for step, seconds in kept.get("marks", {}).items()}
    self._seconds["lost"] += max(0.0, self._start - kept.get("time", self._start))
    self._kind, self._written, self._compiled = "start", None, False
    self._mark_interval()

  def _account(self) -> None:
    """Counts the time since the last call as what it was spent on."""
    now = self._clock()
    passed, self._last = max(0.0, now - self._last), now
    if self._kind == "productive":
      self._productive += passed
    else:
      self._seconds[self._kind] += passed

  def resume(self, step: int) -> None:
    """The run goes on from `step`: what was done after it is lost."""
    self._marks = {s: seconds for s, seconds in self._marks.items() if s <= step}
    kept = max(self._marks.values(), default=0.0)
    self._seconds["lost"] += self._productive - kept
    self._productive = kept
    self._mark_interval()
    self._write()

  @contextlib.contextmanager
  def timer(self, kind: str) -> Iterator[None]:
    """Counts the time within as `kind`, one of KINDS."""
    if kind not in KINDS:
      raise ValueError(f"kind={kind!r} is not one of {KINDS}.")
    self._account()
    outer, self._kind = self._kind, kind
    try:
      yield
    finally:
      self._account()
      self._kind = outer

  def waiting(self, batches: Iterable) -> Iterator:
    """The batches; the time until each of them is there counts as "input_wait"."""
    batches = iter(batches)
    while True:
      with self.timer("input_wait"):
        try:
          batch = next(batches)
        except StopIteration:
          return
      yield batch

  def step(self) -> contextlib.AbstractContextManager:
    """For the call of the training step: the first of a start compiles."""
    if self._compiled:
      return contextlib.nullcontext()
    self._account()
    self._kind, self._compiled = "productive", True
    return self.timer("compile")

  def save(self, step: int) -> contextlib.AbstractContextManager:
    """For the saving of `step`: from there the run may go on one day."""
    self._account()
    self._marks[step] = self._productive
    self._marks = dict(sorted(self._marks.items())[-MARKS:])
    self._write()
    return self.timer("checkpoint")

  def shares(self) -> dict[str, float]:
    """{"goodput/<kind>": share of the wall time}, with "productive"; also a sign of life."""
    self._account()
    if self._written is None or self._clock() - self._written >= WRITE_SECONDS:
      self._write()
    every = {"productive": self._productive, **self._seconds}
    total = max(sum(every.values()), 1e-9)
    return {f"goodput/{kind}": seconds / total for kind, seconds in every.items()}

  def input_wait(self) -> float:
    """Share in 0..1 of the training since the last call (or `resume`) that was waiting for input.

    Compilation, evaluations and checkpoints are no part of it. As of all kinds, the host's view: it
    also waits where the devices still have steps to do.
    """
    self._account()
    waited, productive = self._interval
    waited = self._seconds["input_wait"] - waited
    trained = waited + self._productive - productive
    self._mark_interval()
    return waited / max(trained, 1e-9)

  def _mark_interval(self) -> None:
    self._interval = self._seconds["input_wait"], self._productive

  def _write(self) -> None:
    self._written = self._clock()
    if jax.process_index() == 0:
      kept = {"time": self._last, "seconds": self._seconds, "productive": self._productive}
      folder.write_json(self._path, {**kept, "marks": self._marks})

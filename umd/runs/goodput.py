"""Where the wall time of a run goes, over all its starts."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import jax

from umd.runs import workdir as folder

FILE = "goodput.json"
KINDS = ("start", "compile", "input_wait", "evaluation", "checkpoint", "lost")
WRITE_SECONDS = 10.0  # Downtime is known to this precision.
MARKS = 20  # The number of checkpoints whose productive time is remembered.


class Goodput:
  """Shares of the wall time since the first start of a run; they sum to 1.

  - start: from the beginning of `run` to its first step: data, state, reading the checkpoint.
  - compile: the first call of the step, which traces and compiles it.
  - input_wait: the host waits for a batch. The devices may still be at work then, so this is an
    upper bound of the time in which they lack data.
  - evaluation, checkpoint: they hold the host up; a save's writing in the background does not.
  - lost: the time between the last sign of life of one start and the next, and steps that were
    done after the checkpoint from which that one goes on.
  - productive: the rest, which is training. It includes what is not measured, e.g. logs.

  Nothing here waits for a device. The clock is process 0's, and `goodput.json` keeps the sums.
  """

  def __init__(self, workdir: str, clock: Callable[[], float] = time.time):
    self._path = folder.join(workdir, FILE)
    self._clock = clock
    self._last = clock()
    kept = folder.read_json(self._path) or {}
    self._seconds = dict.fromkeys(KINDS, 0.0) | kept.get("seconds", {})
    self._seconds["lost"] += max(0.0, self._last - kept.get("time", self._last))
    self._productive = kept.get("productive", 0.0)
    self._marks = {int(step): seconds for step, seconds in kept.get("marks", {}).items()}
    self._kind = "start"
    self._written = float("-inf")
    self._compiled = False
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
    """Records that the run goes on from `step`, so that what was done after it is lost."""
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
    """Yields the batches; the time until each of them is there counts as "input_wait"."""
    batches, nothing = iter(batches), object()
    while True:
      with self.timer("input_wait"):
        batch = next(batches, nothing)
      if batch is nothing:
        return
      yield batch

  def step(self) -> contextlib.AbstractContextManager:
    """Wraps the call of the training step: the first one of a start compiles."""
    if self._compiled:
      return contextlib.nullcontext()
    self._account()
    self._kind = "productive"
    self._compiled = True
    return self.timer("compile")

  def save(self, step: int) -> contextlib.AbstractContextManager:
    """Wraps the saving of `step`, from where the run may go on one day."""
    self._account()
    self._marks[step] = self._productive
    self._marks = dict(sorted(self._marks.items())[-MARKS:])
    self._write()
    return self.timer("checkpoint")

  def shares(self) -> dict[str, float]:
    """Returns {"goodput/<kind>": share of the wall time}, with "productive"; a sign of life too."""
    self._account()
    if self._clock() - self._written >= WRITE_SECONDS:
      self._write()
    every = {"productive": self._productive, **self._seconds}
    total = max(sum(every.values()), 1e-9)
    return {f"goodput/{kind}": seconds / total for kind, seconds in every.items()}

  def input_wait(self) -> float:
    """Returns the share in 0..1 of the training since the last call (or `resume`) spent waiting.

    Compilation, evaluations and checkpoints are no part of it.
    """
    self._account()
    waited_before, productive_before = self._interval
    waited = self._seconds["input_wait"] - waited_before
    trained = waited + self._productive - productive_before
    self._mark_interval()
    return waited / max(trained, 1e-9)

  def _mark_interval(self) -> None:
    self._interval = (self._seconds["input_wait"], self._productive)

  def _write(self) -> None:
    self._written = self._clock()
    if jax.process_index() == 0:
      kept = {"time": self._last, "seconds": self._seconds, "productive": self._productive}
      folder.write_json(self._path, {**kept, "marks": self._marks})

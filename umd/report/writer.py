"""Decides when the report of a run is written: beside training, and once more when the run ends."""

import os
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from umd.report import page, read
from umd.runs import preemption, workdir

FILE = "report.html"


def write_run(folder: str, **known) -> read.Run:
  """Writes the report of a run into its workdir; `known` goes to `read.read_run`."""
  run = read.read_run(folder, **known)
  workdir.write_bytes(workdir.join(folder, FILE), page.run_page(run).encode())
  return run


def write_overview(folder: str, *runs: read.Run) -> None:
  """Writes the report of a folder with stages; stages among `runs` are not read again."""
  known = {run.name: run for run in runs}
  stages = [
    known.get(name) or read.read_run(workdir.join(folder, name)) for name in read.stages(folder)
  ]
  name = os.path.basename(read.absolute(folder))
  workdir.write_bytes(workdir.join(folder, FILE), page.overview_page(name, stages).encode())


class Reporter:
  """Keeps `report.html` of a run up to date; only process 0 writes it.

  A report that cannot be written is a warning, once. As a context manager the reporter writes down
  how the run ended if an error ends it.
  """

  def __init__(self, folder: str, steps: int | None = None):
    """Prepares for the run in `folder`; `steps` is its last step, if that is known."""
    self._folder, self._steps, self._cache = folder, steps, {}
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="report")
    self._next, self._last_time, self._warned = Future(), float("-inf"), False
    self._next.set_result(None)

  def __enter__(self) -> "Reporter":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if error is not None:
      stopped = isinstance(error, (preemption.Preempted, KeyboardInterrupt))
      note = "" if stopped else f"{kind.__name__}: {error}".strip().splitlines()[0]
      self.finish(read.INTERRUPTED if stopped else read.FAILED, note)

  def update(self, patience: float = 0.0) -> None:
    """Has the report written by a thread, so that training does not wait for it.

    Args:
      patience: The report is left as it is if it was written less than so many seconds ago.
    """
    if jax.process_index() or time.monotonic() - self._last_time < patience:
      return
    # A report that still waits for its turn will tell what is new, too.
    if self._next.done() or self._next.running():
      self._next = self._thread.submit(self._write, read.RUNNING)

  def finish(self, state: str, note: str = "") -> None:
    """Writes the report for the last time, and returns when it is there."""
    if not jax.process_index():
      self._next.cancel()
      self._thread.submit(self._write, state, note).result()

  def _write(self, state: str, note: str = "") -> None:
    try:
      known = {"state": state, "note": note, "steps": self._steps, "cache": self._cache}
      run = write_run(self._folder, **known)
      if read.is_stage(self._folder):
        write_overview(os.path.dirname(read.absolute(self._folder)), run)
    except Exception as error:  # No report is worth a run.
      if not self._warned:
        path = workdir.join(self._folder, FILE)
        warnings.warn(f"{path} was not written: {error!r}. The run goes on.", stacklevel=2)
      self._warned = True
    self._last_time = time.monotonic()

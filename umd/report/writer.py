"""Keeps the report of a run up to date while it trains, without holding it up."""

import os
import threading
import time
import warnings

import jax

from umd.report import page, read
from umd.runs import preemption
from umd.runs import workdir as folder

FILE = "report.html"


def write_run(workdir: str, **about) -> read.Run:
  """Writes the report of a run into its workdir; what is known is as in `read.read`."""
  run = read.read(workdir, **about)
  folder.write_bytes(folder.join(workdir, FILE), page.run_page(run).encode())
  return run


def write_overview(workdir: str, *known: read.Run) -> None:
  """Writes the report of a folder of stages; those `known` need not be read again."""
  found = {run.name: run for run in known}
  stages = [
    found.get(name) or read.read(folder.join(workdir, name)) for name in read.stages(workdir)
  ]
  name = os.path.basename(read.whole(workdir))
  folder.write_bytes(folder.join(workdir, FILE), page.overview_page(name, stages).encode())


class Reporter:
  """`report.html` of a run; if it cannot be written, that is one warning and no more.

  As a context manager it tells how the run ended if an error ended it. Process 0 writes; elsewhere
  nothing is done.
  """

  def __init__(self, workdir: str, steps: int | None = None):
    """`steps`: the last step, if it is known."""
    self._workdir, self._steps = workdir, steps
    self._lock, self._thread, self._due = threading.Lock(), None, False
    self._pictures, self._warned, self._written = {}, False, float("-inf")

  def __enter__(self) -> "Reporter":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if error is not None:
      stopped = isinstance(error, (preemption.Preempted, KeyboardInterrupt))
      note = "" if stopped else f"{kind.__name__}: {error}".strip().splitlines()[0]
      self.finish(read.INTERRUPTED if stopped else read.FAILED, note)

  def update(self, patience: float = 0.0) -> None:
    """Writes the report behind the caller's back.

    Args:
      patience: not if it was written less than so many seconds ago.
    """
    if jax.process_index() or time.monotonic() - self._written < patience:
      return
    with self._lock:
      self._due = True
      if self._thread is None:
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

  def finish(self, state: str, note: str = "") -> None:
    """Writes the report for the last time, and returns when it is there."""
    with self._lock:
      thread, self._due = self._thread, False
    if thread:
      thread.join()
    if not jax.process_index():
      self._write(state, note)

  def _work(self) -> None:
    while True:
      with self._lock:
        if not self._due:
          self._thread = None
          return
        self._due = False
      self._write(read.RUNNING)

  def _write(self, state: str, note: str = "") -> None:
    try:
      run = write_run(
        self._workdir, state=state, note=note, steps=self._steps, known=self._pictures
      )
      if read.is_stage(self._workdir):
        write_overview(os.path.dirname(read.whole(self._workdir)), run)
    except Exception as error:  # No report is worth a run.
      if not self._warned:
        text = f"{folder.join(self._workdir, FILE)} was not written: {error!r}. The run goes on."
        warnings.warn(text, stacklevel=2)
      self._warned = True
    self._written = time.monotonic()

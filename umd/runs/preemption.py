"""Signals that end a run: it saves at the next step and leaves, and the same command goes on.

SIGTERM and SIGUSR1 (preemption, maintenance, the end of a job's time) and Ctrl-C set a flag that
the training loop asks for with `requested`. Where nothing can be lost, before the first step and
after the last, the signal ends the run by an exception.

Several processes must stop at the same step. JAX's preemption service sees to that
(`umd.devices.distributed` switches it on): it takes SIGTERM in any process, tells all the others,
and lets them agree on the first call of `requested` that none of them has made yet.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # Exit status EX_TEMPFAIL of sysexits.h: start the same command again.
INTERRUPTED = 130  # Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(SystemExit):
  """A run that was asked to end has saved and ends with this exit status."""


class EvaluationStopped(Exception):
  """An evaluation was given up because the run is to end; the next start makes up for it."""


class SignalWatch:
  """What is known of the signals to this process, which has one `SignalWatch`.

  Attributes:
    signal: the first signal that came, None as long as there was none.
  """

  def __init__(self):
    self.signal: int | None = None
    self._handlers = {}  # Those that were there before, by signal.
    self._in_loop = False
    self._protected = False
    self._calls = 0
    self._stopping = False

  @property
  def is_installed(self) -> bool:
    return bool(self._handlers)

  def install(self) -> None:
    self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

  def uninstall(self) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    self._handlers = {}
    self.signal = None

  def _handle(self, number: int, frame) -> None:
    self.signal = self.signal or number
    if number == signal.SIGINT:
      # Whoever presses Ctrl-C again wants the process to end now, whatever it is doing.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    together = jax.distributed.is_initialized()
    saves = self._protected or together
    outcome = "saves at the next step and ends" if saves else "ends; nothing is lost"
    # Not by print: the signal may have come while the main thread holds the lock of the stream.
    os.write(2, f"{signal.Signals(number).name}: the run {outcome}\n".encode())
    if together:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX's service has taken SIGTERM over.
    elif not self._protected:
      raise preempted()

  @contextlib.contextmanager
  def protect(self) -> Iterator[None]:
    self._in_loop = True
    try:
      yield
    finally:
      self._in_loop = False
      self._protected = False

  def requested(self) -> bool:
    self._protected = self._in_loop
    if not self.is_installed:
      return False
    if jax.distributed.is_initialized():
      self._calls += 1
      # The service says yes at one call only, and the run may have to ask again.
      self._stopping |= multihost_utils.reached_preemption_sync_point(self._calls)
      return self._stopping
    return self.signal is not None


_WATCH = SignalWatch()


def install() -> None:
  """Takes SIGTERM, SIGUSR1 and SIGINT from now on; the main thread must call it."""
  _WATCH.install()


def uninstall() -> None:
  """Gives the signals back."""
  _WATCH.uninstall()


def protect() -> contextlib.AbstractContextManager:
  """A loop that asks `requested` after every step; from the first answer on, signals wait for it.

  Before that, and after the loop, a signal ends the run at once.
  """
  return _WATCH.protect()


def requested() -> bool:
  """Returns whether the run is to save and end now; the answer is the same in all processes.

  All processes must make the same calls in the same order. A call takes microseconds, since
  processes only talk to each other once a signal has come.
  """
  return _WATCH.requested()


def check() -> None:
  """Raises EvaluationStopped if the run is to end; all processes must call it alike."""
  if requested():
    raise EvaluationStopped


def preempted() -> Preempted:
  """Returns the exception with which a run ends that has nothing (more) to save."""
  return Preempted(INTERRUPTED if _WATCH.signal == signal.SIGINT else PREEMPTED)


def reason() -> str:
  """Returns the name of the signal; SIGTERM where another process has got it."""
  return signal.Signals(_WATCH.signal or signal.SIGTERM).name


def leave(stopped: Preempted) -> NoReturn:
  """Ends the process of a run that was asked to end, after all that had to be closed is closed.

  Several processes take the ordinary way out, on which JAX lets them meet. One process ends at once:
  threads of libraries may still be at work, and Python can crash as it takes itself down under them.
  """
  if jax.distributed.is_initialized():
    raise stopped
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(stopped.code)

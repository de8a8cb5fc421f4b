"""Signals that end a run: it saves at the next step and leaves, and the same command goes on.

SIGTERM and SIGUSR1 (preemption, maintenance, the end of a job's time) and Ctrl-C are noticed by a
thread, even where the main one is held up in a compilation. Within `protect` they set a flag that
the loop asks for with `requested`; elsewhere nothing can be lost and the process ends at once.

Several processes stop at the same call of `requested`, with no exchange in the calls themselves:
whoever gets the signal says so in the key-value store by which JAX's processes met. All look there
every POLL_SECONDS, say how many calls they have answered and answer no more until all have done so;
the call after the largest number is the one. (JAX's own service for this takes SIGTERM alone, from
the start on, and needs several processes.)
"""

import contextlib
import sys
import time
from collections.abc import Callable
import contextlib
import os
import select
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NoReturn


ERRORS = (RuntimeError,)  # JAX's, of a store that cannot be reached, or of a key that is late


class Store:
  """What JAX's coordination service keeps at process 0 for all.

  Attributes:
    rank, size: this process, and how many there are.
  """

  def __init__(self, client, rank: int, size: int):
    self._client, self.rank, self.size = client, rank, size

  def get(self, key: str) -> str | None:
    """The value, None if there is none yet."""
    try:
      return self._client.key_value_try_get(key)
    except ERRORS as error:
      if "NOT_FOUND" in str(error):
        return None
      raise

  def put_once(self, key: str, value: str) -> None:
    """Sets the value unless it is set."""
    try:
      self._client.key_value_set(key, value)
    except ERRORS as error:
      if "ALREADY_EXISTS" not in str(error):
        raise

  def wait(self, key: str, seconds: float) -> str:
    """The value, as soon as there is one; one of ERRORS after so many seconds."""
    return self._client.blocking_key_value_get(key, int(1000 * seconds))

  def last_out(self, key: str, seconds: float) -> None:
    """Process 0 keeps the store: it waits for so long that the others have said they leave."""
    with contextlib.suppress(*ERRORS):
      if self.rank:
        self.put_once(f"{key}/{self.rank}", "")
        return
      until = time.monotonic() + seconds
      for rank in range(1, self.size):
        self.wait(f"{key}/{rank}", max(0.001, until - time.monotonic()))
      time.sleep(0.2)  # Their last call is answered, and they are gone.


def store() -> Store | None:
  """The store of this run; None if this process is alone."""
  # JAX does not show the client elsewhere.
  module = sys.modules.get("jax._src.distributed")
  state = module and module.global_state
  if not state or state.client is None or state.num_processes == 1:
    return None
  return Store(state.client, state.process_id, state.num_processes)


_told = 0  # Verdicts so far: processes count alike.


def from_main(decide: Callable[[], str], seconds: float) -> str:
  """What process 0's `decide()` says, told to all; nobody waits longer than so many seconds.

  A collective on the devices would do, too, but is not made for waiting. `decide` must not raise.
  """
  global _told
  _told += 1
  shared = store()
  if shared is None:
    return decide()
  key = f"umd/from_main/{_told}"
  if shared.rank == 0:
    shared.put_once(key, decide() or " ")  # No empty values: some versions take them for none.
  return shared.wait(key, seconds).strip()

PREEMPTED = 75  # Exit status, EX_TEMPFAIL of sysexits.h: start the same command again.
INTERRUPTED = 130  # Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 30  # for the answer of another process, which may be dead
KEY, LEAVING = "umd/preemption/", "leaving"


class Preempted(SystemExit):
  """A run that was asked to end has saved and ends, with its exit status."""


class EvaluationStopped(Exception):
  """An evaluation was given up because the run is to end; it is made up for after the restart."""


class Watch:
  """Signals received and what is to be done about them; see the module.

  Attributes:
    signal: the first of them, None as long as there is none.
  """

  def __init__(self):
    self.signal: int | None = None
    self._counts = {"pipe": Counter(), "handler": Counter()}
    self._changed = threading.Condition()
    self._calls, self._stop_at = 0, None  # Answers given; the one from which on they are "yes".
    self._agreeing, self._in_loop, self._protected = False, False, False
    self._cleanups: list[Callable[[], None]] = []
    self._store: Store | None = None

  # In the main thread.

  def start(self) -> None:
    """Begins to act on signals."""
    self._read, self._write = os.pipe()
    for end in (self._read, self._write):
      os.set_blocking(end, False)
    self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
    self._thread.start()

  def install(self) -> None:
    """Takes the process's signals from now on; in the main thread."""
    self.start()
    self._old = {s: signal.signal(s, self.handle) for s in SIGNALS}
    # C writes there, even while Python is held up. Orbax's event loop borrows the place now and
    # then: what it swallows comes through `handle`.
    signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

  def uninstall(self) -> None:
    """Gives them back."""
    signal.set_wakeup_fd(-1)
    for number, handler in self._old.items():
      signal.signal(number, handler)
    self.stop()

  def stop(self) -> None:
    """Ends the thread."""
    os.close(self._write)  # The thread reads the end of it.
    self._thread.join()
    os.close(self._read)

  def handle(self, number, frame=None) -> None:
    """Python's side of a signal."""
    self._counts["handler"][number] += 1
    self._wake()

  def _wake(self) -> None:
    with contextlib.suppress(BlockingIOError):  # Full: it is awake.
      os.write(self._write, b"\0")

  def join(self, store: Store) -> None:
    """Stops together with the others that share `store`, from now on."""
    self._store = store
    self._wake()

  @contextlib.contextmanager
  def protect(self) -> Iterator[None]:
    """A loop that stops when asked; protected once it has asked, after its first step."""
    self._in_loop = True
    try:
      yield
    finally:
      self._in_loop = self._protected = False

  def requested(self) -> bool:
    with self._changed:
      while self._agreeing:
        self._changed.wait()
      self._calls, self._protected = self._calls + 1, self._in_loop
      return self._stop_at is not None and self._calls >= self._stop_at

  def at_leave(self, cleanup: Callable[[], None]) -> None:
    self._cleanups.append(cleanup)

  def forget(self, cleanup: Callable[[], None]) -> None:
    self._cleanups.remove(cleanup)

  # In the thread.

  def _run(self) -> None:
    while True:
      timeout = POLL_SECONDS if self._store and self.signal is None else None
      if select.select([self._read], [], [], timeout)[0]:
        received = os.read(self._read, 4096)
        if not received:
          return
        self._counts["pipe"].update(received)
      self._look()

  def _look(self) -> None:
    counts = self._counts["pipe"] | self._counts["handler"]  # Of each signal, the larger.
    if counts[signal.SIGINT] > 1:
      self.leave(INTERRUPTED)
    number = next((s for s in SIGNALS if counts[s]), None)
    if self.signal is None and (number or self._store):
      try:
        self._notice(number)
      except ERRORS as error:
        if self.signal is not None:  # Another process is gone, and the run with it.
          self._tell(f"no agreement with the other processes: {str(error).splitlines()[0]}")
          self.leave(status(self.signal))

  def _notice(self, number: int | None) -> None:
    """Takes a signal in, one that came here or one that another process tells of."""
    store = self._store
    if store is None:
      self.signal = number
      with self._changed:
        self._stop_at, protected = 0, self._protected
      self._announce("", protected)
      return None if protected else self.leave(status(number))
    told = store.get(KEY + "signal")
    if told is None and number is None:
      return None
    if told is None:
      store.put_once(KEY + "signal", str(number))
      told = store.wait(KEY + "signal", PATIENCE_SECONDS)  # Two may have been told at once.
    self.signal = int(told)
    self._agree(store, "" if number else " (another process)")

  def _agree(self, store: Store, where: str) -> None:
    with self._changed:
      self._agreeing, protected, calls = True, self._protected, self._calls
    self._announce(where, protected)
    store.put_once(f"{KEY}calls/{store.rank}", str(calls) if protected else LEAVING)
    keys = [f"{KEY}calls/{rank}" for rank in range(store.size)]
    everyones = [store.wait(key, PATIENCE_SECONDS) for key in keys]
    if LEAVING in everyones:  # It is not within its loop, so that nobody has much to lose.
      store.last_out(KEY + "left", 3.0)
      self.leave(status(self.signal))
    with self._changed:
      self._stop_at, self._agreeing = max(map(int, everyones)) + 1, False
      self._changed.notify_all()

  def _announce(self, where: str, protected: bool) -> None:
    then = "saves at the next step and ends" if protected else "ends; nothing is lost"
    self._tell(f"{signal.Signals(self.signal).name}{where}: the run {then}")

  def _tell(self, text: str) -> None:
    os.write(2, f"{text}\n".encode())  # No lock that the main thread might hold.

  def leave(self, code: int) -> NoReturn:
    for cleanup in self._cleanups[::-1]:
      with contextlib.suppress(Exception):
        cleanup()
    os._exit(code)


_watch: Watch | None = None


def status(number: int) -> int:
  """The exit status of a run that a signal has ended."""
  return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def install() -> None:
  """Takes SIGTERM, SIGUSR1 and SIGINT from now on; to be called first thing, in the main thread."""
  global _watch
  _watch = Watch()
  _watch.install()


def uninstall() -> None:
  """Gives the signals back."""
  global _watch
  _watch, old = None, _watch
  old.uninstall()


def join() -> None:
  """From now on all processes stop together; to be called once they have met."""
  shared = store()
  if _watch and shared:
    _watch.join(shared)


def protect() -> contextlib.AbstractContextManager:
  """A loop that asks `requested` after every step: a signal then waits for the answer.

  Before the first answer, and after the loop, signals end the process at once.
  """
  return _watch.protect() if _watch else contextlib.nullcontext()


def requested() -> bool:
  """Whether the run is to save and end now; the same answer in all processes.

  All must make the same calls in the same order. Costs microseconds: nothing is exchanged.
  """
  return _watch.requested() if _watch else False


def check() -> None:
  """Raises EvaluationStopped if the run is to end; all processes must call it alike."""
  if requested():
    raise EvaluationStopped


def preempted() -> Preempted:
  """The exception with which a run ends that has saved."""
  number = _watch.signal if _watch and _watch.signal else signal.SIGTERM
  return Preempted(status(number))


def reason() -> str:
  """Name of the signal, "" if there was none."""
  return signal.Signals(_watch.signal).name if _watch and _watch.signal else ""


def leave(code: int, text: str) -> NoReturn:
  """Ends this process at once, from any thread."""
  print(text, file=sys.stderr, flush=True)
  (_watch or Watch()).leave(code)


@contextlib.contextmanager
def cleanup(fn: Callable[[], None]) -> Iterator[None]:
  """Calls `fn` at the end of the context, or when a signal ends the process within it."""
  watch = _watch
  if watch:
    watch.at_leave(fn)
  try:
    yield
  finally:
    if watch:
      watch.forget(fn)
    fn()

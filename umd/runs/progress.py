"""Lines about work that takes long, printed once for all processes.

On a terminal, how far a loop has come is one line that is written over; elsewhere (a file, a pipe)
every line is a line of its own, and there are fewer.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from threading import RLock, Timer

SOON = 2.0  # Seconds that pass in silence.
PATIENCE = 5.0  # Seconds between two lines, and
ON_TERMINAL = 0.5  # between two states of a line that is written over.
ERASE = "\r\x1b[K"  # To the beginning of the line; clear it.

Tell = Callable[[str], None]


class _Line:
  """The last line of a terminal, on which one text may be written over by the next."""

  def __init__(self):
    self._lock = RLock()
    self._passing = self._open = False

  @contextlib.contextmanager
  def passing(self) -> Iterator[None]:
    """What is written within is written over by whatever comes next."""
    with self._lock:  # Other threads' lines stay.
      self._passing = True
      try:
        yield
      finally:
        self._passing = False

  def write(self, text: str) -> None:
    with self._lock:
      passing = self._passing and sys.stdout.isatty()
      if passing:  # What goes on in the next row could not be erased.
        text = text[: shutil.get_terminal_size().columns - 1]
      # Letters that the output does not know are spelled out, not an error.
      encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
      text = text.encode(encoding, "backslashreplace").decode(encoding)
      before, after = ERASE if self._open else "", "" if passing else "\n"
      print(before + text, end=after, file=sys.stdout, flush=True)
      self._open = passing

  def end(self) -> None:
    with self._lock:
      if self._open:
        print(file=sys.stdout, flush=True)
      self._open = False


_LINE = _Line()


def say(text: str, *, everywhere: bool = False) -> None:
  """Prints a line, on process 0 only or `everywhere`."""
  import jax  # Data can be read without it.

  if everywhere or jax.process_index() == 0:
    _LINE.write(text)


def end_line() -> None:
  """For those who write to the terminal by themselves: lets the line stand that is written over."""
  _LINE.end()


def format_seconds(seconds: float) -> str:
  """95 -> "1:35"; 3700 -> "1:01:40"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Clock:
  """Tells how far a loop has come and how long it will take, from SOON on, every PATIENCE seconds.

  On a terminal it does so every ON_TERMINAL seconds, in one line, as long as `tell` ends in `say`.
  """

  def __init__(self, tell: Tell, what: str, total: int):
    self._tell, self._what, self._total = tell, what, total
    self._start = self._last = time.monotonic()
    self._wait = min(SOON, PATIENCE)
    self._first = None  # (done, time) when the first batch was there: compilation lies before it.

  def __call__(self, done: int) -> None:
    now = time.monotonic()
    self._first = self._first or (done, now)
    if now - self._last < self._wait:
      return
    self._last, self._wait = now, ON_TERMINAL if sys.stdout.isatty() else PATIENCE
    since, begun = self._first if done > self._first[0] else (0, self._start)
    left = (now - begun) / max(done - since, 1) * (self._total - done)
    with _LINE.passing():
      self._tell(f"{self._what}: {done} of {self._total}, {format_seconds(left)} left")


@contextlib.contextmanager
def during(what: str, tell: Tell = say, *, ends: bool = True) -> Iterator[None]:
  """For work that gives no sign by itself: says so once it takes SOON, and at last how long it was.

  Lines are "<what> ..." and, if `ends`, "<what>: done in 0:12" ("gave up after" for an error).
  """
  begun = time.monotonic()
  timer = Timer(SOON, tell, [f"{what} ..."])
  timer.daemon = True
  timer.start()
  ended = "gave up after"
  try:
    yield
    ended = "done in"
  finally:
    timer.cancel()
    timer.join()  # It may be speaking.
    seconds = time.monotonic() - begun
    if ends and seconds >= SOON:
      tell(f"{what}: {ended} {format_seconds(seconds)}")


def first_during(what: str, items: Iterable, tell: Tell = say) -> Iterator:
  """The items; the wait for the first of them counts as `during`."""
  items, nothing = iter(items), object()
  with during(what, tell):
    first = next(items, nothing)
  if first is not nothing:
    yield first
    yield from items

"""Lines about work that takes long, printed once for all processes.

Work that ends within SOON seconds says nothing. Lines look the same on a terminal and in a log.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from threading import Timer

SOON = 2.0  # Seconds before the first line.
PATIENCE = 5.0  # Seconds between two lines of a loop; the wait grows with the age of the loop,
SHARE = 0.1  # to this share of it: an hour takes about forty lines.

Tell = Callable[[str], None]


def say(text: str, *, everywhere: bool = False) -> None:
  """Prints a line, on process 0 only or `everywhere`."""
  import jax  # Data can be read without it.

  if everywhere or jax.process_index() == 0:
    # Letters that the output does not know are spelled out, and are no error.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def format_seconds(seconds: float) -> str:
  """Formats 95 as "1:35" and 3700 as "1:01:40"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Clock:
  """Says now and then how far a loop has come and how long it will take: `clock(done)`."""

  def __init__(self, tell: Tell, what: str, total: int):
    self._tell = tell
    self._what = what
    self._total = total
    self._start = time.monotonic()
    self._next = self._start + min(SOON, PATIENCE)
    self._first = None  # (done, time) of the first call: compilation lies before it.

  def __call__(self, done: int) -> None:
    now = time.monotonic()
    self._first = self._first or (done, now)
    if now < self._next:
      return
    self._next = now + max(PATIENCE, SHARE * (now - self._start))
    done_before, begun = self._first if done > self._first[0] else (0, self._start)
    left = (now - begun) / max(done - done_before, 1) * (self._total - done)
    self._tell(f"{self._what}: {done} of {self._total}, {format_seconds(left)} left")


@contextlib.contextmanager
def during(what: str, tell: Tell = say, *, ends: bool = True) -> Iterator[None]:
  """Says "<what> ..." once the work within takes SOON seconds.

  If `ends`, a second line says how long it took in the end: "<what>: done in 0:12", or "gave up
  after" where an error ended it.
  """
  begun = time.monotonic()
  timer = Timer(SOON, tell, [f"{what} ..."])
  timer.daemon = True
  timer.start()
  outcome = "gave up after"
  try:
    yield
    outcome = "done in"
  finally:
    timer.cancel()
    timer.join()  # It may be printing.
    seconds = time.monotonic() - begun
    if ends and seconds >= SOON:
      tell(f"{what}: {outcome} {format_seconds(seconds)}")


def first_during(what: str, items: Iterable, tell: Tell = say) -> Iterator:
  """Yields the items; the wait for the first of them counts as `during`."""
  items, nothing = iter(items), object()
  with during(what, tell):
    first = next(items, nothing)
  if first is not nothing:
    yield first
    yield from items

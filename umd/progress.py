"""Lines about work that takes long, printed once for all processes."""

import time
from collections.abc import Callable

import jax

PATIENCE = 5.0  # Seconds between two lines.

Tell = Callable[[str], None]


def say(text: str) -> None:
  """Prints a line, on process 0 only."""
  if jax.process_index() == 0:
    print(text, flush=True)


def format_seconds(seconds: float) -> str:
  """95 -> "1:35"; 3700 -> "1:01:40"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Clock:
  """Tells how far a loop has come and how long it will take, every PATIENCE seconds."""

  def __init__(self, tell: Tell, what: str, total: int):
    self._tell, self._what, self._total = tell, what, total
    self._start = self._last = time.monotonic()
    self._first = None  # (done, time) when the first batch was there: compilation lies before it.

  def __call__(self, done: int) -> None:
    now = time.monotonic()
    self._first = self._first or (done, now)
    if now - self._last < PATIENCE:
      return
    self._last = now
    since, begun = self._first if done > self._first[0] else (0, self._start)
    left = (now - begun) / max(done - since, 1) * (self._total - done)
    self._tell(f"{self._what}: {done} of {self._total}, {format_seconds(left)} left")

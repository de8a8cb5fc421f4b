"""Lines about long work: not too many, and with what is left to wait for."""

import pytest

from umd import progress


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0, "0:00"),
    (9.4, "0:09"),
    (59.6, "1:00"),
    (95, "1:35"),
    (3599.7, "1:00:00"),
    (3700, "1:01:40"),
    (360000, "100:00:00"),
  ],
)
def test_seconds_are_shown_as_a_clock_does(seconds, text):
  assert progress.format_seconds(seconds) == text


class Time:
  """A clock that goes as it is told."""

  def __init__(self):
    self.now = 0.0

  def monotonic(self):
    return self.now


@pytest.fixture
def time(monkeypatch):
  monkeypatch.setattr(progress, "time", Time())
  return progress.time


def test_a_line_comes_every_few_seconds_with_what_is_left(time):
  """50 numbers, one in two seconds; the first takes a minute longer, as if it were compiled."""
  lines = []
  clock = progress.Clock(lines.append, "numbers", 50)
  time.now = 60.0
  for done in range(1, 51):
    time.now += 2.0
    clock(done)
  assert lines[0] == "numbers: 1 of 50, 50:38 left"  # As long as all of them take that long.
  assert "numbers: 10 of 50, 1:20 left" in lines
  assert 15 < len(lines) <= 100 / progress.PATIENCE + 1


def test_what_is_quick_tells_nothing(time):
  clock = progress.Clock(lambda line: pytest.fail(line), "numbers", 50)
  for done in range(50):
    time.now += 0.09
    clock(done)


def test_process_zero_speaks(monkeypatch, capsys):
  progress.say("hello")
  monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
  progress.say("nobody")
  assert capsys.readouterr().out == "hello\n"

"""Lines about long work: not too many, and with what is left to wait for."""

import io
import time
import types

import jax
import pytest

from umd.runs import progress


@pytest.mark.parametrize(
  "seconds, text",
  [(9.4, "0:09"), (59.6, "1:00"), (95, "1:35"), (3599.7, "1:00:00"), (360000, "100:00:00")],
)
def test_seconds_are_shown_as_a_clock_does(seconds, text):
  assert progress.format_seconds(seconds) == text


@pytest.fixture
def clock(monkeypatch):
  """A clock that is set by hand."""
  fake = types.SimpleNamespace(now=0.0, monotonic=lambda: fake.now)
  monkeypatch.setattr(progress, "time", fake)
  return fake


def test_a_loop_says_what_is_left_more_and_more_seldom(clock):
  """500 numbers, one in two seconds; the first takes a minute longer, as if it were compiled."""
  lines = []
  count = progress.Clock(lines.append, "numbers", 500)
  clock.now = 60.0
  for done in range(1, 501):
    clock.now += 2.0
    count(done)
  assert lines[0].startswith("numbers: 1 of 500, 8:35:38 left")  # So long if all take so long.
  assert lines[1] == "numbers: 5 of 500, 16:30 left"
  assert 20 < len(lines) < 40


def test_two_seconds_are_enough_for_a_first_line_and_what_is_quick_says_nothing(clock):
  lines = []
  count = progress.Clock(lines.append, "numbers", 50)
  for done in range(1, 50):
    clock.now += 0.5
    count(done)
    assert bool(lines) == (clock.now >= 2.0)
  with progress.during("numbers", lambda line: pytest.fail(line)):
    clock.now += 1.9


def test_process_zero_speaks(monkeypatch, capsys):
  progress.say("hello")
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  progress.say("nobody")
  progress.say("everybody", everywhere=True)
  assert capsys.readouterr().out == "hello\neverybody\n"


def test_letters_that_the_output_does_not_know_are_spelled_out(monkeypatch):
  out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr("sys.stdout", out)
  progress.say("caf\u00e9 \udc80")
  out.seek(0)
  assert out.read() == "caf\\xe9 \\udc80\n"


@pytest.mark.parametrize(
  "ends, error, outcome", [(True, None, "done in"), (False, None, ""), (True, OSError, "gave up")]
)
def test_work_without_a_sign_of_its_own_is_announced_while_it_lasts(
  monkeypatch, ends, error, outcome
):
  monkeypatch.setattr(progress, "SOON", 0.01)
  lines = []
  try:
    with progress.during("reading", lines.append, ends=ends):
      until = time.monotonic() + 20
      while not lines and time.monotonic() < until:
        time.sleep(0.01)
      assert lines == ["reading ..."]
      if error:
        raise error
  except OSError:
    assert error
  assert lines[1:] == [] if not ends else lines[1].startswith(f"reading: {outcome}")


def test_the_wait_for_the_first_item_is_said_and_all_items_come(monkeypatch):
  monkeypatch.setattr(progress, "SOON", 0.01)

  def slow(n):
    for i in range(n):
      time.sleep(0.1)
      yield i

  lines = []
  assert list(progress.first_during("first", slow(3), lines.append)) == [0, 1, 2]
  assert lines == ["first ...", "first: done in 0:00"]
  assert list(progress.first_during("first", [], lines.append)) == []

"""Where the time goes, by a clock that goes as it is told."""

import pytest

from umd.runs.goodput import KINDS, Goodput


class Clock:
  now = 1000.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def seconds(goodput, total):
  """{kind: seconds} of what is not 0; the shares sum to 1."""
  shares = goodput.shares()
  assert sum(shares.values()) == pytest.approx(1.0)
  assert set(shares) == {f"goodput/{kind}" for kind in (*KINDS, "productive")}
  return {k.split("/")[1]: round(total * v, 6) for k, v in shares.items() if v}


def train(goodput, clock, steps):
  """Half a second waiting for a batch, 2 s a step, the first 30 s more."""

  def batches():
    for step in steps:
      clock.now += 0.5
      yield step

  for step in goodput.waiting(batches()):
    with goodput.step():
      clock.now += 30 * (step == steps[0])
    clock.now += 2
    yield step


def test_every_second_is_counted_once(tmp_path, clock):
  goodput = Goodput(str(tmp_path), clock)
  clock.now += 5
  goodput.resume(0)
  for step in train(goodput, clock, range(1, 5)):
    if step == 2:
      with goodput.timer("evaluation"):
        clock.now += 7
      with goodput.save(step):
        clock.now += 1
  assert seconds(goodput, 53) == {
    "start": 5,
    "compile": 30,
    "input_wait": 2,
    "productive": 8,
    "evaluation": 7,
    "checkpoint": 1,
  }


def test_downtime_and_steps_done_again_are_lost(tmp_path, clock):
  first = Goodput(str(tmp_path), clock)
  first.resume(0)
  for step in train(first, clock, range(1, 6)):
    if step in (2, 4):
      with first.save(step):
        pass
  first.shares()
  clock.now += 100  # Killed, and started again from the older checkpoint.
  second = Goodput(str(tmp_path), clock)
  second.resume(2)
  # Steps 3 and 4 are done again; the last sign of life was the save after them.
  expected = {"compile": 30, "input_wait": 2, "productive": 4, "lost": 4 + 2.5 + 100}
  assert seconds(second, 142.5) == expected
  for _ in train(second, clock, range(3, 6)):
    pass
  expected["productive"] += 6
  expected["compile"] += 30
  expected["input_wait"] += 1.5
  assert seconds(second, 180) == expected


def test_the_wait_for_input_is_told_of_each_interval_alone(tmp_path, clock):
  goodput = Goodput(str(tmp_path), clock)
  clock.now += 5
  goodput.resume(0)
  shares = []
  for step in train(goodput, clock, range(1, 7)):
    with goodput.timer("evaluation"):
      clock.now += 100  # Neither this nor the compilation is training.
    if step == 4:
      clock.now += 5.5
    if step % 2 == 0:
      shares.append(goodput.input_wait())
  assert shares == pytest.approx([1 / 5, 1 / 10.5, 1 / 5])
  assert goodput.input_wait() == 0


def test_an_error_within_a_timer_does_not_change_what_comes_after(tmp_path, clock):
  goodput = Goodput(str(tmp_path), clock)
  with pytest.raises(KeyError), goodput.timer("evaluation"):
    clock.now += 3
    raise KeyError
  clock.now += 1
  assert seconds(goodput, 4) == {"evaluation": 3, "start": 1}
  with pytest.raises(ValueError, match="kind='eval' is not one of"), goodput.timer("eval"):
    pass

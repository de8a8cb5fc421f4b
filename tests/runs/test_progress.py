"""Lines about long work: not too many, and with what is left to wait for."""

import io
import threading
import types

import jax
import numpy as np
import pytest

from umd import data
from umd.runs import progress


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
    self.timers = []

  def monotonic(self):
    return self.now

  def pass_by(self, seconds):
    """Lets time pass, and what waits for it happen."""
    self.now += seconds
    for timer in [t for t in self.timers if t.at <= self.now]:
      timer.run()

  def Timer(self, seconds, function, args):
    return Timer(self, seconds, function, args)


class Timer:
  """Like threading's, of that clock."""

  def __init__(self, time, seconds, function, args):
    self.at, self._time, self._call = time.now + seconds, time, lambda: function(*args)

  def start(self):
    self._time.timers.append(self)

  def run(self):
    self.cancel()
    self._call()

  def cancel(self):
    if self in self._time.timers:
      self._time.timers.remove(self)

  def join(self):
    pass


@pytest.fixture
def time(monkeypatch):
  monkeypatch.setattr(progress, "time", Time())
  monkeypatch.setattr(progress, "Timer", progress.time.Timer)
  return progress.time


class Terminal(io.StringIO):
  """Standard output that says that it is a terminal; `screen()` is what one sees."""

  def isatty(self):
    return True

  def screen(self):
    lines = [""]
    for part in self.getvalue().replace("\r\x1b[K", "\r").replace("\n", "\0\n\0").split("\0"):
      if part == "\n":
        lines.append("")
      elif "\r" in part:
        lines[-1] = part.rpartition("\r")[2]
      else:
        lines[-1] += part
    return lines


@pytest.fixture
def terminal(monkeypatch):
  # (pytest puts its own standard output back after every fixture.)
  monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stdout=Terminal()))
  monkeypatch.setattr(progress, "_LINE", progress._Line())
  return progress.sys.stdout


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


def test_two_seconds_are_enough_for_a_first_line(time):
  lines = []
  clock = progress.Clock(lines.append, "numbers", 50)
  for done in range(1, 50):
    time.now += 0.5
    clock(done)
    assert bool(lines) == (time.now >= 2.0)


def test_what_is_quick_tells_nothing(time):
  clock = progress.Clock(lambda line: pytest.fail(line), "numbers", 50)
  for done in range(50):
    time.now += 0.03
    clock(done)
  with progress.during("numbers", lambda line: pytest.fail(line)):
    time.pass_by(1.9)


def test_process_zero_speaks(monkeypatch, capsys):
  progress.say("hello")
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  progress.say("nobody")
  progress.say("everybody", everywhere=True)
  assert capsys.readouterr().out == "hello\neverybody\n"


def test_letters_that_the_output_does_not_know_are_spelled_out(monkeypatch):
  out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stdout=out))
  progress.say("caf\u00e9 \udc80")
  out.seek(0)
  assert out.read() == "caf\\xe9 \\udc80\n"


def count(time, tell, to=20):
  clock = progress.Clock(tell, "numbers", to)
  for done in range(1, to + 1):
    time.now += 1.0
    clock(done)


def test_on_a_terminal_one_line_is_written_over_and_others_stay(time, terminal):
  progress.say("before")
  count(time, lambda text: progress.say(f"[here] {text}"))
  assert terminal.screen() == ["before", "[here] numbers: 20 of 20, 0:00 left"]
  assert terminal.getvalue().count("\n") == 1  # One line, whatever its state.
  assert terminal.getvalue().count("numbers") > 20 / progress.PATIENCE + 1  # And a lively one.
  progress.say("after")
  progress.say("and more")
  assert terminal.screen() == ["before", "after", "and more", ""]


def test_a_line_that_is_written_over_fits_the_terminal(time, terminal, monkeypatch):
  monkeypatch.setenv("COLUMNS", "20")
  count(time, lambda text: progress.say(f"[somewhere] {text}"))
  assert terminal.screen() == ["[somewhere] numbers"]
  progress.say("a longer line may go on in the next row")
  assert terminal.screen() == ["a longer line may go on in the next row", ""]


def test_the_line_can_be_ended_for_others(time, terminal):
  count(time, progress.say, to=5)
  progress.end_line()
  progress.end_line()  # Once is enough.
  progress.say("after")
  assert [line.partition(",")[0] for line in terminal.screen()] == ["numbers: 5 of 5", "after", ""]


def test_elsewhere_every_line_is_a_line_of_its_own(time, capsys):
  count(time, progress.say)
  out = capsys.readouterr().out
  assert not {"\r", "\x1b"} & set(out)
  assert [line.partition(",")[0] for line in out.splitlines()] == [
    f"numbers: {n} of 20" for n in (2, 7, 12, 17)
  ]


def test_other_processes_write_nothing_to_their_terminals(time, terminal, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  count(time, progress.say)
  assert terminal.getvalue() == ""


def test_lines_that_others_take_are_none_of_the_terminals(time, terminal):
  lines = []
  count(time, lines.append)
  assert lines and terminal.getvalue() == ""


@pytest.mark.parametrize(
  "ends, error, told",
  [
    (True, False, ["reading ...", "reading: done in 0:12"]),
    (False, False, ["reading ..."]),
    (True, True, ["reading ...", "reading: gave up after 0:12"]),
  ],
)
def test_work_without_a_sign_of_its_own_is_announced_while_it_lasts(time, ends, error, told):
  lines = []
  try:
    with progress.during("reading", lines.append, ends=ends):
      time.pass_by(2.5)
      assert lines == ["reading ..."]
      time.pass_by(9.5)
      if error:
        raise OSError("of the disk")
  except OSError:
    assert error
  assert lines == told


def test_it_is_announced_by_a_thread(monkeypatch):
  monkeypatch.setattr(progress, "SOON", 0.01)
  told, wait = [], threading.Event()
  tell = lambda text: (told.append(text), wait.set())
  with progress.during("work", tell):
    assert wait.wait(20)
  assert told[0] == "work ..." and len(told) == 2


def test_the_wait_for_the_first_item_is_told_and_all_items_come(time):
  def slow(n):
    for i in range(n):
      time.pass_by(3.0)
      yield i

  lines = []
  assert list(progress.first_during("first", slow(3), lines.append)) == [0, 1, 2]
  assert lines == ["first ...", "first: done in 0:03"]
  assert list(progress.first_during("first", [], lines.append)) == []


# Long things and what they say, with a clock that stands SOON at 0: all takes too long.


@pytest.fixture
def impatient(monkeypatch):
  class Always:
    def __init__(self, seconds, function, args):
      self._call = lambda: function(*args)

    def start(self):
      self._call()

    cancel = join = lambda self: None

  monkeypatch.setattr(progress, "SOON", 0.0)
  monkeypatch.setattr(progress, "PATIENCE", 0.0)
  monkeypatch.setattr(progress, "Timer", Always)


def test_data_tells_of_opening_and_of_reading_into_memory(tmp_path, impatient, capsys):
  path = str(tmp_path / "images.npz")
  np.savez(path, images=np.zeros((6, 8, 8, 3), np.uint8), labels=np.arange(6) % 2)
  source = data.load(f"npz:{path}", "all", "value_range(-1, 1)")
  out = capsys.readouterr().out
  assert f"[data] opening npz:{path}, split 'all' ..." in out and "done in" in out
  source.arrays()
  assert "reading into memory: 6 of 6" in capsys.readouterr().out


def test_a_checkpoint_tells_of_being_written_verified_and_read(tmp_path, impatient, capsys):
  from umd.runs.checkpoint import Checkpoints, load_params
  from umd.state import TrainState

  step, w = jax.numpy.int32(3), {"w": jax.numpy.ones(4)}
  state, lines = TrainState(step, w, w, ()), []
  with Checkpoints(str(tmp_path), say=lines.append) as checkpoints:
    checkpoints.save(state, 3, {})
    checkpoints.wait()
    assert lines[0] == "finishing the checkpoint of step 3 ..."
    checkpoints.restore_newest(state)
  for what in ("verifying the newest checkpoint", "reading the checkpoint of step 3"):
    assert f"{what} ..." in lines
  assert load_params(str(tmp_path), "raw")[1] == 3
  assert f"reading {tmp_path}/checkpoints/3/state ..." in capsys.readouterr().out


def test_training_tells_of_waiting_compiling_and_evaluating(tmp_path, impatient, capsys):
  from configs import quickstart
  from evaluators import Scheduled
  from trainers.loop import Training, train
  from umd.devices.mesh import make_mesh

  config = quickstart.get_config("steps=2,batch_size=8").pretrain
  config.checkpoint.every = 0
  source = data.from_arrays("noise", np.zeros((16, 2, 2, 1), np.float32), None, 0)
  step = lambda state, batch: (state, {"loss": np.float32(1), "lr": np.float32(1)})
  judge = Scheduled("judge", 0, lambda state: iter([("value", 1.0)]))
  training = Training(None, lambda: None, step, source, 2, [judge], make_mesh())
  train(training, config, str(tmp_path / "run"), "run")
  lines = capsys.readouterr().out.splitlines()
  for what in ("reading the first batch", "compiling the training step"):
    assert sum(line == f"[run] {what} ..." for line in lines) == 1
    assert sum(line.startswith(f"[run] {what}: done in") for line in lines) == 1
  told = [line for line in lines if "judge" in line]
  assert told[0] == "[run] step 2  judge ..." and told[1].startswith("[run] step 2  judge (")


def test_fits_and_metrics_tell_of_themselves(impatient, monkeypatch):
  from evaluators import fewshot
  from umd.metrics import statistics

  lines, rng = [], np.random.default_rng(0)
  x, y = rng.normal(size=(8, 3)), np.arange(8) % 2
  part = {"class": x.astype(np.float32), "label": y}
  own = dict(_protocols=("umd",), _shots=(1, 2), _seeds=3, _knn=())
  own |= dict(_train=types.SimpleNamespace(num_classes=2))
  own |= dict(_context=types.SimpleNamespace(progress=lines.append))
  list(fewshot.Evaluator._judge(types.SimpleNamespace(**own), "class", part, part))
  assert lines[-1].startswith("fewshot: fits on class: 6 of 6")
  row = statistics.Metric(("one", "two"), lambda samples, reference: (1, 2))
  monkeypatch.setattr(statistics, "METRICS", {"slow": row})
  of = types.SimpleNamespace(count=9, inception="")
  assert statistics.compare(of, of, ["slow"], lines.append) == {"one": 1, "two": 2}
  assert lines[-2] == "computing one, two ..."

"""One run at a time in a workdir: who is refused, what is taken over, and that one of many wins."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from umd.runs import lock, preemption
from umd.runs import workdir as folder

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from umd.runs import lock
with lock.hold(sys.argv[1], ["a"]):
  print("held", flush=True)
  time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
  """A living process that holds the stage "a" of tmp_path/run."""
  command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def claims(workdir) -> list[Path]:
  return sorted(Path(workdir).glob(".lock_*"))


def plant(workdir, age=0.0, token="0", **changes) -> Path:
  """Writes a claim of this process, or of what `changes` make of it, last touched `age` s ago."""
  own = lock.Own(str(workdir), ["a"])
  own.path = str(Path(workdir) / f".lock_{token}.json")
  own.write(lock.HELD)
  path = Path(own.path)
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  os.utime(path, (time.time() - age,) * 2)
  return path


def test_a_second_run_is_refused_while_the_first_lives_and_taken_over_at_once_when_killed(
  tmp_path, holder, capsys
):
  workdir = str(tmp_path / "run")
  (claim,) = claims(workdir)
  refused = pytest.raises(ValueError, match=f"use by process {holder.pid} on .*{claim.name}")
  with refused, lock.hold(workdir, ["b", "a"]):
    pytest.fail("two at once")
  with lock.hold(workdir, ["b"]):  # Another stage may run beside it.
    assert len(claims(workdir)) == 2
  assert claims(workdir) == [claim]
  holder.send_signal(signal.SIGKILL)
  os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # It has ended: a zombie is no life.
  with lock.hold(workdir, ["a"]):
    assert claim not in claims(workdir)
  assert f"took over the lock of process {holder.pid}" in capsys.readouterr().out
  assert not claims(workdir)


def test_errors_release_and_only_what_was_made_is_removed(tmp_path):
  with pytest.raises(KeyError), lock.hold(str(tmp_path / "new" / "run"), ["a"]):
    raise KeyError
  assert not list(tmp_path.iterdir())
  (tmp_path / "mine").mkdir()
  with lock.hold(str(tmp_path / "mine"), ["a"]):
    pass
  with lock.hold(str(tmp_path / "kept"), ["a"]):
    (tmp_path / "kept" / "x").write_text("")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "mine"]
  assert not claims(tmp_path / "mine") and not claims(tmp_path / "kept")


@pytest.mark.parametrize(
  ("age", "changes"),
  [
    (0, {"pid": 2**22 + 1}),  # no such process
    (0, {"started": "1"}),  # its number has been given to another one
    (lock.STALE_SECONDS + 1, {"machine": ["elsewhere", "", ""]}),
    (lock.STALE_SECONDS + 1, {"machine": 5}),
  ],
)
def test_dead_claims_are_taken_over(tmp_path, capsys, age, changes):
  dead = plant(tmp_path, age, **changes)
  with lock.hold(str(tmp_path), ["a"]):
    assert not dead.exists()
  assert "took over" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("age", "changes"),
  [
    (10 * lock.STALE_SECONDS, {}),  # A process of this machine that is known to live.
    (0, {"machine": ["elsewhere", "", ""], "pid": 2**22 + 1}),
    (0, {"machine": None, "pid": 2**22 + 1}),
  ],
)
def test_living_claims_are_not(tmp_path, age, changes):
  living = plant(tmp_path, age, **changes)
  with pytest.raises(ValueError, match="is in use by"), lock.hold(str(tmp_path), ["a"]):
    pytest.fail("two at once")
  assert claims(tmp_path) == [living]


def test_a_claim_that_cannot_be_read_counts_until_it_is_old(tmp_path):
  path = tmp_path / ".lock_0.json"
  path.write_text("{")
  with pytest.raises(ValueError, match="an unknown process"), lock.hold(str(tmp_path), ["a"]):
    pytest.fail("two at once")
  os.utime(path, (time.time() - lock.STALE_SECONDS - 1,) * 2)
  with lock.hold(str(tmp_path), ["a"]):
    assert not path.exists()


def test_a_silent_machine_is_waited_for_until_it_speaks_or_is_given_up(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(lock, "WAIT_SECONDS", 0.05)
  silent = plant(tmp_path, lock.STALE_SECONDS - 0.5, machine=["elsewhere", "", ""])
  began = time.monotonic()
  with lock.hold(str(tmp_path), ["a"]):
    assert time.monotonic() - began > 0.4
  assert "Waits for a sign of life" in capsys.readouterr().out
  silent = plant(tmp_path, lock.SILENT_SECONDS + 5, machine=["elsewhere", "", ""])
  timer = threading.Timer(0.3, os.utime, [silent])
  timer.start()
  with pytest.raises(ValueError, match="is in use by"), lock.hold(str(tmp_path), ["a"]):
    pytest.fail("two at once")
  timer.join()


def test_a_run_gives_signs_of_life_and_ends_when_it_was_taken_over(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
  left = []
  monkeypatch.setattr(lock.preemption, "leave", lambda code, text: left.append((code, text)))
  with lock.hold(str(tmp_path), ["a"]):
    (claim,) = claims(tmp_path)
    os.utime(claim, (0, 0))
    wait(lambda: claim.stat().st_mtime > 0)
    claim.unlink()  # by hand
    wait(claim.exists)
    assert not left
    plant(tmp_path)
    claim.unlink()
    wait(lambda: left)
  assert left[0][0] == 1 and "taken over" in left[0][1]


def wait(condition):
  until = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.01)


RACE = """
import contextlib, os, sys, time
from umd.runs import lock

lock.say = lambda text: None  # It would ask JAX which process this is.
folder, rivals = sys.argv[1], 5

def compete(workdir, at, verdicts, over):
  while time.monotonic() < at:
    pass
  with contextlib.suppress(ValueError), lock.hold(workdir, ["a"]):
    os.write(verdicts, b"w")
    os.read(over, 1)  # Holds on until all have tried.
    return
  os.write(verdicts, b"r")

for workdir in sorted(os.scandir(folder), key=lambda entry: entry.name):
  (verdicts, tell), (over, end) = os.pipe(), os.pipe()
  at = time.monotonic() + 0.05
  for _ in range(rivals):
    if not os.fork():
      compete(workdir.path, at, tell, over)
      os._exit(0)
  print(sorted(os.read(verdicts, 1) for _ in range(rivals)).count(b"w"), flush=True)
  os.write(end, b"." * rivals)
  for _ in range(rivals):
    os.wait()
"""


def test_of_many_that_start_at_once_exactly_one_wins(tmp_path):
  """Also where all of them find the claim of a dead run."""
  workdirs = [tmp_path / f"{i:02d}" for i in range(20)]
  for workdir in workdirs:
    workdir.mkdir()
  for workdir in workdirs[::2]:
    plant(workdir, pid=2**22 + 1)
  done = subprocess.run(
    [sys.executable, "-c", RACE, str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=90,
  )
  assert done.stdout.split() == ["1"] * len(workdirs), done.stderr
  assert not any(map(claims, workdirs))


def test_who_starts_while_another_looks_around_does_not_run_beside_it(tmp_path):
  slow, quick = lock.Own(str(tmp_path), ["a"]), lock.Own(str(tmp_path), ["a"])
  look, looked, go_on, won = slow.others, threading.Event(), threading.Event(), []

  def look_slowly():
    found = look()
    looked.set()
    go_on.wait(20)
    return found

  def acquire(own):
    with contextlib.suppress(ValueError):
      own.acquire()
      won.append(own)

  slow.others = look_slowly
  threads = [threading.Thread(target=acquire, args=(own,)) for own in (slow, quick)]
  threads[0].start()
  looked.wait(20)
  threads[1].start()
  threads[1].join(0.3)
  go_on.set()
  for thread in threads:
    thread.join(20)
  assert len(won) == 1


@pytest.mark.parametrize("first", ["small", "large"])
def test_of_two_that_see_each_other_the_smaller_token_goes_on(tmp_path, first):
  """The larger withdraws, whoever has written first, and is refused when the other holds."""
  a, b = lock.Own(str(tmp_path), ["a"]), lock.Own(str(tmp_path), ["a"])
  small, large = sorted((a, b), key=lambda own: own.path)
  refused = []

  def acquire_large():
    try:
      large.acquire()
    except ValueError as error:
      refused.append(str(error))

  thread = threading.Thread(target=acquire_large)
  if first == "small":
    small.write(lock.CLAIMING)
    thread.start()
    wait(lambda: not os.path.exists(large.path))
    assert small.acquire() == []
  else:
    large.write(lock.CLAIMING)
    acquiring = threading.Thread(target=small.acquire)
    acquiring.start()
    time.sleep(0.2)
    assert acquiring.is_alive()  # It waits for the other to withdraw.
    thread.start()
    acquiring.join(20)
  thread.join(20)
  assert len(refused) == 1 and "is in use" in refused[0]


def test_at_an_address_it_is_the_same(tmp_path, monkeypatch):
  import tensorflow as tf

  class GFile(tf.io.gfile.GFile):
    """In memory, opening a file again to write it appends; object stores replace it."""

    def __init__(self, name, mode="r"):
      if "w" in mode and tf.io.gfile.exists(name):
        tf.io.gfile.remove(name)
      super().__init__(name, mode)

  monkeypatch.setattr(tf.io.gfile, "GFile", GFile)
  monkeypatch.setattr(folder, "SCHEMES", ("ram",))
  workdir = f"ram://bucket/{tmp_path.name}"
  with lock.hold(workdir, ["a"]):
    assert len(lock._find(workdir)) == 1
    with pytest.raises(ValueError, match="is in use"), lock.hold(workdir, ["a"]):
      pytest.fail("two at once")
    with lock.hold(workdir, ["b"]):
      assert len(lock._find(workdir)) == 2
  assert lock._find(workdir) == []


def test_process_0_decides_for_all(tmp_path, monkeypatch):
  """The others write nothing, and are refused with it."""
  told = {}

  class Store:
    rank, size = 0, 2
    put_once = staticmethod(told.__setitem__)
    wait = staticmethod(lambda key, seconds: told[key])

  monkeypatch.setattr(preemption, "store", Store)
  plant(tmp_path)
  for rank in (0, 1):
    monkeypatch.setattr(Store, "rank", rank)
    monkeypatch.setattr(preemption, "_told", 0)
    with pytest.raises(ValueError, match="is in use"), lock.hold(str(tmp_path), ["a"]):
      pytest.fail("two at once")
  told.clear()
  with pytest.raises(KeyError), lock.hold(str(tmp_path / "new"), ["a"]):
    pytest.fail("process 1 waits for process 0")
  assert not (tmp_path / "new").exists()

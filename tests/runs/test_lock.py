"""One run at a time in a folder: who is refused, what is taken over, and what is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stand_ins import object_store

from umd.runs import lock, workdir

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from umd.runs import lock
with lock.hold(sys.argv[1:]):
  print("held", flush=True)
  time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
  """A living process that holds the folder tmp_path/run/pretrain."""
  command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "pretrain")]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def refused(folders, message="is in use by process"):
  with pytest.raises(ValueError, match=message), lock.hold([str(folder) for folder in folders]):
    pytest.fail("two at once")


def test_a_second_run_is_refused_while_the_first_lives_and_goes_on_when_it_is_killed(
  tmp_path, holder, monkeypatch
):
  monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
  stage = tmp_path / "run" / "pretrain"
  (tmp_path / "link").symlink_to(tmp_path / "run")
  refused([stage], f"is in use by process {holder.pid} on ")
  # The same folder by other names, and as one of the stages of a whole run.
  refused([tmp_path / "link" / "pretrain"])
  refused([tmp_path / "run" / "other" / ".." / "pretrain"])
  refused([tmp_path / "run" / "finetune", stage])
  assert sorted(os.listdir(tmp_path / "run")) == ["pretrain"]
  with lock.hold([str(tmp_path / "run" / "finetune")]):  # Another stage may run beside it.
    assert lock.is_held(str(stage))
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert not lock.is_held(str(stage))
  with lock.hold([str(stage)]):
    assert lock.is_held(str(stage))


def test_errors_release_and_only_what_was_made_is_removed(tmp_path):
  with pytest.raises(KeyError), lock.hold([str(tmp_path / "new" / "run")]):
    raise KeyError
  assert not list(tmp_path.iterdir())
  (tmp_path / "kept").mkdir()
  (tmp_path / "kept" / "x").write_text("")
  with lock.hold([str(tmp_path / "kept")]):
    pass
  assert not lock.is_held(str(tmp_path / "kept")) and not lock.is_held(str(tmp_path / "absent"))
  assert (tmp_path / "kept" / "x").exists()


def test_of_many_that_start_at_once_exactly_one_wins(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
  rivals = 8
  together, winners = threading.Barrier(rivals), []

  def compete():
    together.wait(20)
    with contextlib.suppress(ValueError), lock.hold([str(tmp_path / "run")]):
      winners.append(threading.get_ident())
      time.sleep(0.5)

  threads = [threading.Thread(target=compete) for _ in range(rivals)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
  assert len(winners) == 1


@pytest.fixture
def address(monkeypatch):
  """An empty folder of an object store, in which a minute passes in half a second."""
  monkeypatch.setattr(lock, "RENEWAL_SECONDS", 0.2)
  monkeypatch.setattr(lock, "EXPIRED_SECONDS", 0.9)
  monkeypatch.setattr(lock, "SETTLING_SECONDS", 0.1)
  object_store(monkeypatch)
  return "gs://bucket/run"


def test_at_an_address_a_lease_that_is_renewed_refuses_and_one_that_is_not_is_taken_over(address):
  with lock.hold([address]):
    assert lock.is_held(address)
    refused([address])
  assert not lock.is_held(address) and workdir.names(address) == []
  # What a killed run left.
  workdir.write_json(f"{address}/.lock", lock._identity("dead"))
  began = time.monotonic()
  with lock.hold([address]):
    assert time.monotonic() - began > lock.EXPIRED_SECONDS


def test_of_two_that_write_a_lease_at_once_the_last_one_wins(address, monkeypatch):
  monkeypatch.setattr(lock.time, "sleep", lambda seconds: steal())
  steal = lambda: workdir.write_json(f"{address}/.lock", lock._identity("rival"))
  refused([address])

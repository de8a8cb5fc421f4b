"""One run at a time in a workdir: a claim that the others see, kept alive while the run lives.

A claim is a file of its own, `.lock_<token>.json`. Whoever wants to run writes one, looks for those
of others and goes on if no living one is there; of two that see each other before either runs, the
larger token withdraws. Since both write before they look, at least one sees the other: only one can
go on. That needs no more of a file system than that a new file is seen by whoever lists the folder
afterwards: local disks, NFS, Lustre and gs:// do; no file is ever made atomically or renamed over
another's, and taking over a dead run's claim is the same race.

Whether a claim lives: on the same machine its process is looked up, with the time it was started,
since numbers come again. Of another machine (or container) the file must have been touched within
STALE_SECONDS; one that is silent for longer than a few beats is waited for until then.
"""

import contextlib
import datetime
import glob
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from umd.runs import preemption as coordination
from umd.runs import preemption
from umd.runs import workdir as folder
from umd.data.host import tensorflow
from umd.runs.progress import format_seconds, say

BEAT_SECONDS = 30.0
SILENT_SECONDS = 3 * BEAT_SECONDS
STALE_SECONDS = 600.0
POLL_SECONDS = 0.05  # between two looks at a rival that is about to withdraw
WAIT_SECONDS = 5.0  # between two looks at a claim that is silent
CLAIMING, HELD = "claiming", "held"
FIELDS = {"state", "stages", "machine", "pid", "started", "since"}


def _start_time(pid: int) -> str:
  """When a process of this machine was started, "" if it does not run (any more)."""
  if not os.path.exists("/proc/self/stat"):
    return _without_proc(pid)
  try:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
      state, *fields = f.read().rpartition(")")[2].split()
  except (FileNotFoundError, ProcessLookupError):
    return ""
  return "" if state in "ZX" else fields[18]  # Zombies have ended.


def _without_proc(pid: int) -> str:
  with contextlib.suppress(ProcessLookupError):
    with contextlib.suppress(PermissionError):  # It is there, and somebody else's.
      os.kill(pid, 0)
    return "running"
  return ""


def _machine() -> list[str]:
  """Where process numbers mean the same: host, its last boot, and container."""
  boot, namespace = "", ""
  with contextlib.suppress(OSError):
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as f:
      boot = f.read().strip()
    namespace = os.readlink("/proc/self/ns/pid")
  return [socket.gethostname(), boot, namespace]


class Claim(NamedTuple):
  """A claim of another process.

  Attributes:
    path: its file.
    about: what it says; {} if it cannot be read.
    age: seconds since its last sign of life, by the clock of the file system.
  """

  path: str
  about: dict
  age: float

  @property
  def token(self) -> str:
    return os.path.basename(self.path).removeprefix(".lock_").removesuffix(".json")

  @property
  def is_held(self) -> bool:
    return self.about.get("state") != CLAIMING

  def overlaps(self, stages: Sequence[str]) -> bool:
    """Whether it is for one of these stages; one that cannot be read is for all."""
    return not self.about or bool(set(self.about["stages"]) & set(stages))

  def lives(self) -> bool | None:
    """Whether its process does; None: nothing has been heard of it for a while."""
    if self.about.get("machine") == _machine():
      return bool(self.about["started"]) and self.about["started"] == _start_time(self.about["pid"])
    if self.age > STALE_SECONDS:
      return False
    return None if self.age > SILENT_SECONDS else True

  def whose(self) -> str:
    if not self.about:
      return "an unknown process"
    return (
      f"process {self.about['pid']} on {self.about['machine'][0]}, since {self.about['since']}, "
      f"last sign of life {format_seconds(max(0.0, self.age))} ago"
    )


def _changed(path: str) -> float:
  """When a file was last written, by the clock of its file system."""
  if not folder.scheme(path):
    return os.stat(path).st_mtime
  return tensorflow().io.gfile.stat(path).mtime_nsec / 1e9


def _find(workdir: str) -> list[str]:
  if not folder.scheme(workdir):
    return glob.glob(os.path.join(glob.escape(workdir), ".lock_*.json"))
  return tensorflow().io.gfile.glob(os.path.join(workdir, ".lock_*.json"))


class Own:
  """This process's claim, and what it sees of others."""

  def __init__(self, workdir: str, stages: Sequence[str]):
    self._workdir, self._stages, self._token = workdir, list(stages), secrets.token_hex(8)
    self.path = os.path.join(workdir, f".lock_{self._token}.json")
    self._ahead = 0.0  # of the file system's clock over ours

  def write(self, state: str) -> None:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {
      "state": state,
      "stages": self._stages,
      "machine": _machine(),
      "pid": os.getpid(),
      "started": _start_time(os.getpid()),
      "since": since,
    }
    folder.write_json(self.path, about)
    self._ahead = _changed(self.path) - time.time()

  def remove(self) -> None:
    if folder.exists(self.path):
      folder.remove(self.path)

  def beat(self, state: str) -> None:
    """Gives a sign of life."""
    if folder.scheme(self.path) or not os.path.exists(self.path):
      self.write(state)
    else:
      os.utime(self.path)

  def others(self) -> list[Claim]:
    """The claims of others that are in the way, the dead ones too."""
    found = []
    for path in _find(self._workdir):
      if path == self.path:
        continue
      with contextlib.suppress(OSError, *_gone()):  # Removed since.
        contents, changed = folder.read_bytes(path), _changed(path)
        if contents is not None:
          found.append(Claim(path, _read(contents), time.time() + self._ahead - changed))
    return [claim for claim in found if claim.overlaps(self._stages)]

  def acquire(self) -> list[str]:
    """Returns once nobody else lives; lines about what was taken over.

    Raises:
      ValueError: another run lives.
    """
    told = False
    self.write(CLAIMING)
    while True:
      others = self.others()
      verdicts = [(claim, claim.lives()) for claim in others]
      living, silent = ([c for c, lives in verdicts if lives is v] for v in (True, None))
      if not living and not silent:
        break
      if holder := next((claim for claim in living if claim.is_held), None):
        raise ValueError(self._refusal(holder))
      if silent and not told:
        told = True
        say(
          f"{self._workdir}: locked by {silent[0].whose()}. Waits for a sign of life, or until "
          f"{format_seconds(STALE_SECONDS)} have passed without"
        )
      if any(claim.token < self._token for claim in living):
        self._let_others_go_first()
      else:
        time.sleep(WAIT_SECONDS if silent else POLL_SECONDS)
        self.beat(CLAIMING)
    self.write(HELD)
    for claim in others:
      with contextlib.suppress(FileNotFoundError, *_gone()):
        folder.remove(claim.path)
    return [f"{self._workdir}: took over the lock of {c.whose()}: it ended" for c in others]

  def _let_others_go_first(self) -> None:
    """Withdraws until those with a smaller token have made up their minds."""
    self.remove()
    before = lambda c: c.token < self._token and not c.is_held and c.lives() is not False
    while any(map(before, self.others())):
      time.sleep(POLL_SECONDS)
    self.write(CLAIMING)

  def _refusal(self, claim: Claim) -> str:
    return (
      f"workdir={self._workdir!r} is in use by {claim.whose()}. Wait until that run has ended, or "
      "stop it, or choose another workdir. If it is certain that it does not run, remove "
      f"{claim.path}."
    )


def _read(contents: bytes) -> dict:
  """What a claim says, {} if it is damaged or not one of ours."""
  try:
    about = json.loads(contents)
    lists = isinstance(about["stages"], list) and isinstance(about["machine"], list)
    return about if lists and about["machine"] and about.keys() >= FIELDS else {}
  except (ValueError, TypeError, KeyError):
    return {}


def _gone() -> tuple:
  """What TensorFlow raises for a file that is not there."""
  tf = sys.modules.get("tensorflow")
  return (tf.errors.NotFoundError,) if tf else ()


def _keep_alive(own: Own, ended: threading.Event) -> None:
  while not ended.wait(BEAT_SECONDS):
    # A file system that is away for a while is no reason to end.
    with contextlib.suppress(OSError):
      was_there = folder.exists(own.path)
      own.beat(HELD)
      thieves = [] if was_there else [c for c in own.others() if c.is_held and c.lives()]
      if thieves:
        preemption.leave(
          1,
          f"error: this run was silent for so long that its workdir was taken over by "
          f"{thieves[0].whose()}. It ends, so that they do not write over each other.",
        )


@contextlib.contextmanager
def hold(workdir: str, stages: Sequence[str]) -> Iterator[None]:
  """Keeps other runs of these stages out of a workdir; process 0 does it for all.

  Args:
    workdir: made if it is not there, and removed if it is empty in the end.
    stages: names of what is run there; other stages may run at the same time.

  Raises:
    ValueError: such a run lives.
  """
  own, made, ended = Own(workdir, stages), _missing(workdir), threading.Event()
  beats = threading.Thread(target=_keep_alive, args=(own, ended), daemon=True)
  is_main = (coordination.store() is None) or coordination.store().rank == 0

  def release():
    ended.set()
    if is_main:
      if beats.is_alive():
        beats.join(BEAT_SECONDS)  # It must not write the claim anew.
      own.remove()
      for path in made:
        with contextlib.suppress(OSError):  # Not empty.
          os.rmdir(path)

  def decide() -> str:
    try:
      for line in own.acquire():
        say(line)
    except Exception as error:  # Told to all, who wait for the verdict.
      return str(error) or repr(error)
    return ""

  with preemption.cleanup(release):
    problem = coordination.from_main(decide, STALE_SECONDS + 60)
    if problem:
      raise ValueError(problem)
    if is_main:
      beats.start()
    yield


def _missing(workdir: str) -> list[str]:
  """The folders that are to be made for it, the innermost first."""
  missing, path = [], os.path.abspath(workdir)
  while not folder.scheme(workdir) and not os.path.exists(path):
    missing.append(path)
    path = os.path.dirname(path)
  return missing

"""One run at a time in a folder.

On a local or shared file system the kernel keeps the lock (`filelock`, on the file .lock) and
releases it when the process ends, however it ends. The lock belongs to the file, so all spellings
of a path (links, x/../y) meet in it. An object store has no locks: there a run keeps a small lease
object alive, and an object that does not change any more belongs to a dead run.
"""

import contextlib
import datetime
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from etils import epath
from filelock import FileLock, Timeout

from umd.devices import mesh
from umd.runs import workdir
from umd.runs.progress import say

FILE = ".lock"
OWNER = ".lock_owner.json"  # Beside a lock of the kernel: who holds it.
# A run that has just been told to end needs a moment; so does `is_held`, which takes the lock.
PATIENCE_SECONDS = 2.0
# A living run renews its lease so often. One that was not renewed for EXPIRED_SECONDS is dead.
RENEWAL_SECONDS = 20.0
EXPIRED_SECONDS = 90.0
# Of two runs that write a lease at once, the last one wins. Both see that after a moment.
SETTLING_SECONDS = 3.0


def _identity(token: str = "") -> dict:
  """Describes this process to those who find its lock."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
  return {"process": os.getpid(), "host": socket.gethostname(), "time": now, "token": token}


def _read(path: str) -> dict:
  """Returns what a lock says of its owner; {} if there is none, or it cannot be read."""
  with contextlib.suppress(OSError, ValueError):
    owner = workdir.read_json(path)
    return owner if isinstance(owner, dict) else {}
  return {}


def _refusal(folder: str, owner: dict) -> ValueError:
  """Returns the error for those who come second."""
  process, host, since = (owner.get(key, "?") for key in ("process", "host", "time"))
  return ValueError(
    f"workdir={folder!r} is in use by process {process} on {host} (lock of {since}). Wait until "
    "that run has ended, or stop it, or choose another workdir. If it is certain that it does not "
    f"run, remove {workdir.join(folder, FILE)}."
  )


@contextlib.contextmanager
def _hold_file(folder: str) -> Iterator[None]:
  """Holds the lock of a local folder, which is made, and removed again if it stays empty."""
  real = os.path.realpath(folder)
  made = workdir.missing_folders(real)
  os.makedirs(real, exist_ok=True)
  path = os.path.join(real, FILE)
  owner = os.path.join(real, OWNER)
  lock = FileLock(path)
  try:
    lock.acquire(timeout=PATIENCE_SECONDS)
  except Timeout:
    raise _refusal(folder, _read(owner)) from None
  try:
    workdir.write_json(owner, _identity())
    yield
  finally:
    with contextlib.suppress(FileNotFoundError):  # Somebody has removed or renamed the folder.
      os.remove(owner)
      if os.listdir(real) == [FILE]:
        os.remove(path)
    lock.release()
    for empty in made:
      with contextlib.suppress(OSError):  # It is not empty.
        os.rmdir(empty)


def _wait_for_lease(folder: str, path: str) -> None:
  """Returns once nobody renews the lease; no two machines' clocks are compared.

  Raises:
    ValueError: somebody does.
  """
  if lease := _read(path):
    say(f"{folder}: a run left its lock; waiting {EXPIRED_SECONDS:.0f} s for a sign of life")
  until = time.monotonic() + EXPIRED_SECONDS
  while lease and time.monotonic() < until:
    time.sleep(RENEWAL_SECONDS / 10)
    if (now := _read(path)) and now != lease:
      raise _refusal(folder, now)
    lease = now


@contextlib.contextmanager
def _hold_lease(folder: str) -> Iterator[None]:
  """Holds a folder of an object store."""
  path = workdir.join(folder, FILE)
  token = secrets.token_hex(8)
  _wait_for_lease(folder, path)
  workdir.write_json(path, _identity(token))
  time.sleep(SETTLING_SECONDS)
  if (winner := _read(path)).get("token") != token:
    raise _refusal(folder, winner)
  ended = threading.Event()

  def renew():
    while not ended.wait(RENEWAL_SECONDS):
      with contextlib.suppress(Exception):  # A store that is away for a while is no reason to end.
        if (owner := _read(path)).get("token", token) != token:
          print(
            f"error: this run was silent for too long. {_refusal(folder, owner)}", file=sys.stderr
          )
          os._exit(1)  # Both would write over each other.
        workdir.write_json(path, _identity(token))

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join(RENEWAL_SECONDS)
    epath.Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folders: Sequence[str]) -> Iterator[None]:
  """Keeps other runs out of these folders as long as the context lasts.

  All processes of a run call it; process 0 holds the locks for all.

  Raises:
    ValueError: another run holds one of them.
  """
  problem = ""
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        for folder in folders:
          stack.enter_context(_hold_lease(folder) if workdir.scheme(folder) else _hold_file(folder))
      except (ValueError, OSError) as error:  # It is raised below, in all processes.
        problem = str(error)
    if not mesh.all_agree(not problem):
      raise ValueError(problem or f"{folders[0]!r} is in use by another run, see process 0.")
    yield


def is_held(folder: str) -> bool:
  """Returns whether a run that lives holds the folder.

  Raises:
    OSError: the folder cannot be read, or its lock not be opened.
  """
  path = workdir.join(folder, FILE)
  if workdir.scheme(folder):
    if not (lease := _read(path)):
      return False
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(lease["time"])
    return age.total_seconds() < EXPIRED_SECONDS
  if not os.path.exists(path):
    return False
  try:
    with FileLock(path, blocking=False):
      return False
  except Timeout:
    return True

"""The folder of a run: what was asked for, where it ran, and how it ended.

A workdir is a folder of this machine or an address gs://bucket/folder. `etils.epath` reads and
writes both; for gs:// it uses TensorFlow where that is installed and `gcsfs` elsewhere.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from umd.devices import mesh

PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "tensorflow",
  "tensorflow-cpu",
  "tensorflow-datasets",
  "clu",
  "ml_collections",
)
# Network file systems show a file that another machine wrote after a while.
VISIBLE_SECONDS = 30.0


def scheme(path: str) -> str:
  """Returns "gs" for gs://bucket/folder and "" for a path of this machine."""
  head, separator, _ = path.partition("://")
  return head if separator else ""


def join(workdir: str, *parts: str) -> str:
  """Returns the path of something in a workdir."""
  return os.path.join(workdir, *parts)


def exists(path: str) -> bool:
  """Returns whether there is such a file or folder."""
  return epath.Path(path).exists()


def names(path: str) -> list[str]:
  """Returns the sorted names of what a folder holds; none if there is no such folder."""
  folder = epath.Path(path)
  return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def read_bytes(path: str) -> bytes | None:
  """Returns the contents of a file, None if there is no such file."""
  try:
    return epath.Path(path).read_bytes()
  except FileNotFoundError:
    return None


def write_bytes(path: str, contents: bytes) -> None:
  """Writes a file in one piece: a killed process leaves the old file or the new one.

  Raises:
    OSError: the disk is full, or the folder cannot be written.
  """
  file = epath.Path(path)
  try:
    if scheme(path):  # An object appears once it is complete.
      file.write_bytes(contents)
      return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(contents)
    temporary.replace(file)
  except OSError as error:
    reason = error.strerror or error
    raise OSError(f"{path} cannot be written: {reason}. Make room, or choose another.") from error


def remove(path: str) -> None:
  """Removes a file."""
  epath.Path(path).unlink()


def write_json(path: str, value: dict) -> None:
  """Writes a JSON file in one piece."""
  text = json.dumps(value, indent=2, sort_keys=True) + "\n"
  write_bytes(path, text.encode())


def read_json(path: str) -> dict | None:
  """Returns the contents of a JSON file, None if there is no such file."""
  contents = read_bytes(path)
  return None if contents is None else json.loads(contents)


def missing_folders(path: str) -> list[str]:
  """Returns the local folders that must be made for `path` to exist, the innermost first."""
  missing, folder = [], os.path.abspath(path)
  while not os.path.exists(folder):
    missing.append(folder)
    folder = os.path.dirname(folder)
  return missing


def _why_not_writable(workdir: str) -> str:
  """Returns what keeps this process from writing there, "" if nothing does."""
  if not scheme(workdir):
    missing = missing_folders(workdir)
    nearest = os.path.dirname(missing[-1]) if missing else os.path.abspath(workdir)
    if not os.path.isdir(nearest):
      return f"{nearest} is no folder. Choose another."
    writable = os.access(nearest, os.W_OK | os.X_OK)
    return "" if writable else f"no permission to write in {nearest}. Choose another."
  if scheme(workdir) != "gs":
    return "it must be a folder of this machine or gs://..."
  probe = join(workdir, f".writable_{secrets.token_hex(4)}")
  try:
    write_bytes(probe, b"")
    remove(probe)
  except Exception as error:  # The clients of object stores have errors of their own.
    reason = (str(error).splitlines() or [repr(error)])[0]
    return f"{reason}. Check the bucket's name, the network and the credentials of this machine."
  return ""


def check_writable(workdir: str) -> None:
  """Checks that the run can write to its workdir; leaves nothing behind.

  All processes must call it. Process 0 writes most files, but all write the checkpoints, so the
  others must see the same folder.

  Raises:
    ValueError: it cannot be written, or some processes see another folder of that name.
  """
  problem = _why_not_writable(workdir) if jax.process_index() == 0 else ""
  if not mesh.all_agree(not problem):
    raise ValueError(f"workdir={workdir!r} cannot be written: {problem or 'see process 0.'}")
  if jax.process_count() > 1:
    _check_shared(workdir)


def _check_shared(workdir: str) -> None:
  """Raises ValueError, in all processes, unless all see what process 0 writes to the workdir."""
  is_main = jax.process_index() == 0
  token = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbelow(2**31))))
  probe = join(workdir, f".shared_{token}")
  made = missing_folders(workdir) if is_main and not scheme(workdir) else []
  if is_main:
    write_bytes(probe, b"")
  multihost_utils.sync_global_devices("the probe of the workdir is written")
  until = time.monotonic() + VISIBLE_SECONDS
  while not (seen := exists(probe)) and time.monotonic() < until:
    time.sleep(0.5)
  everyone = [flag[0] for (flag,) in mesh.each_process([np.float32([seen])])]
  if is_main:
    remove(probe)
    for folder in made:
      os.rmdir(folder)
  blind = [process for process, flag in enumerate(everyone) if not flag]
  if blind:
    raise ValueError(
      f"workdir={workdir!r} cannot be written: processes {blind} do not see what process 0 writes "
      "there. All of them write the checkpoints: choose a folder on a file system that all "
      "machines share, or gs://..."
    )


def flatten(config: dict, prefix: str = "") -> dict:
  """Returns {"a.b": 1} for {"a": {"b": 1}}, with tuples as lists, as JSON has them."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = json.loads(json.dumps(value))
  return flat


def differences(old: dict, new: dict) -> dict[str, tuple]:
  """Returns {"a.b": (old, new)} for every value that differs; None stands for an absent one."""
  old, new = flatten(old), flatten(new)
  keys = sorted(old.keys() | new.keys())
  return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}


def _last_config(workdir: str) -> dict | None:
  """Returns the config that the folder's run was last started with, None if there is none.

  Raises:
    ValueError: config.json holds something else.
  """
  path = join(workdir, "config.json")
  try:
    config = read_json(path)
  except ValueError as error:
    config = str(error)
  if config is None or isinstance(config, dict):
    return config
  raise ValueError(
    f"{path} holds no config ({config}): it is damaged, or of another program. Restore it from a "
    "copy, or choose another workdir."
  )


def check_same_run(workdir: str, config: dict, harmless: Sequence[str]) -> None:
  """Compares a config with the config.json of the workdir, if there is one.

  Args:
    workdir: the run's folder.
    config: everything that defines the run.
    harmless: keys, or sections "a.b" with all below, that may change between two starts of a run.
      Such changes are printed, and `start` records them.

  Raises:
    ValueError: the folder holds a run with another config (the message lists the differences), or
      its config.json is damaged.
  """
  old = _last_config(workdir)
  if old is None:
    return
  changed = differences(old, config)
  is_harmless = lambda key: any(f"{key}.".startswith(f"{name}.") for name in harmless)
  serious = {key: values for key, values in changed.items() if not is_harmless(key)}
  if serious:
    lines = "\n".join(f"  {k}: there {old!r}, now {new!r}" for k, (old, new) in serious.items())
    raise ValueError(
      f"workdir={workdir!r} holds a run with another config:\n{lines}\n"
      "Choose another workdir, or give the old values to go on with that run."
    )
  if jax.process_index() == 0:
    for key, (before, after) in changed.items():
      print(f"config: {key} was {before!r}, is now {after!r}", flush=True)


def _record_changes(workdir: str, config: dict) -> None:
  """Appends every value that has changed since the last start to config_changes.jsonl."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  lines = [
    json.dumps({"time": now, "key": key, "old": old, "new": new})
    for key, (old, new) in differences(_last_config(workdir) or config, config).items()
  ]
  if lines:
    path = join(workdir, "config_changes.jsonl")
    write_bytes(path, (read_bytes(path) or b"") + "".join(f"{line}\n" for line in lines).encode())


def _without_key(argv: list[str]) -> list[str]:
  """Returns a command without --key and its value: readers of a workdir must not get an API key."""
  flags = [i for i, word in enumerate(argv) if word in ("--key", "-key")]
  hidden = {*flags, *(i + 1 for i in flags)}
  shown = (word for i, word in enumerate(argv) if i not in hidden)
  return [word for word in shown if not word.startswith(("--key=", "-key="))]


def _versions() -> dict[str, str]:
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions


def start(workdir: str, config: dict) -> None:
  """Writes config.json and environment.json (versions, devices and command of this start).

  Values that have changed since the last start are added to config_changes.jsonl, one line
  {time, key, old, new} for each.
  """
  # The changes go first: if the process is killed in between, a change is recorded twice and not
  # never.
  _record_changes(workdir, config)
  write_json(join(workdir, "config.json"), config)
  environment = {
    "command": [sys.executable, *_without_key(sys.argv)],
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    "python": platform.python_version(),
    "platform": platform.platform(),
    "versions": _versions(),
    "backend": jax.default_backend(),
    "devices": [str(d) for d in jax.devices()],
    "device_kind": jax.devices()[0].device_kind,
    "processes": jax.process_count(),
  }
  write_json(join(workdir, "environment.json"), environment)


def finished(workdir: str) -> dict | None:
  """Returns the summary of a run that reached its last step, None if it has not."""
  return read_json(join(workdir, "summary.json"))


def finish(workdir: str, summary: dict) -> None:
  """Marks the run as finished, with its last numbers."""
  write_json(join(workdir, "summary.json"), summary)

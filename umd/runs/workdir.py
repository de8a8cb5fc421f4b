"""The folder of a run: what was asked, where it ran, and how it ended.

A workdir is a folder of this machine, or gs://bucket/folder, which is read and written through
TensorFlow. Of os.path, `join`, `dirname` and `basename` do right by both; `abspath` does not.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from umd.data.host import tensorflow

PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
  *("tensorflow", "tensorflow-cpu", "tensorflow-datasets", "clu", "ml_collections"),
)


SCHEMES = ("gs",)  # Addresses that both TensorFlow and orbax can write.


def scheme(path: str) -> str:
  """ "gs" for gs://bucket/folder, "" for a path of this machine."""
  head, separator, _ = path.partition("://")
  return head if separator else ""


def join(workdir: str, *parts: str) -> str:
  """The path of something in a workdir."""
  return os.path.join(workdir, *parts)


def exists(path: str) -> bool:
  """Whether there is such a file or folder."""
  if not scheme(path):
    return os.path.exists(path)
  tf = tensorflow()
  return tf.io.gfile.exists(path) or tf.io.gfile.isdir(path)


def names(path: str) -> list[str]:
  """Names of the files and folders in a folder, in order; none if it is not there."""
  if not scheme(path):
    return sorted(os.listdir(path)) if os.path.isdir(path) else []
  tf = tensorflow()
  try:
    found = tf.io.gfile.listdir(path)
  except tf.errors.NotFoundError:
    return []
  return sorted(name.rstrip("/") for name in found)  # Object stores end those of folders so.


def read_bytes(path: str) -> bytes | None:
  """The contents of a file, None if there is none."""
  if not scheme(path):
    try:
      with open(path, "rb") as f:
        return f.read()
    except FileNotFoundError:
      return None
  tf = tensorflow()
  try:
    with tf.io.gfile.GFile(path, "rb") as f:
      return f.read()
  except tf.errors.NotFoundError:
    return None


def write_bytes(path: str, contents: bytes) -> None:
  """Writes a file in one piece: a killed process leaves the old one or the new one."""
  if not scheme(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".tmp", "wb") as f:
      f.write(contents)
    os.replace(path + ".tmp", path)
    return
  tf = tensorflow()
  with tf.io.gfile.GFile(path, "wb") as f:  # Object stores show an object once it is complete.
    f.write(contents)


def remove(path: str) -> None:
  """Removes a file."""
  if not scheme(path):
    os.remove(path)
    return
  tf = tensorflow()
  tf.io.gfile.remove(path)


def write_json(path: str, value: dict) -> None:
  """Writes a JSON file in one piece."""
  text = json.dumps(value, indent=2, sort_keys=True) + "\n"
  write_bytes(path, text.encode())


def read_json(path: str) -> dict | None:
  """The contents of a JSON file, None if there is no such file."""
  contents = read_bytes(path)
  return None if contents is None else json.loads(contents)


def _why_not_writable(workdir: str) -> str:
  """What keeps this process from writing there, "" if nothing does."""
  if not scheme(workdir):
    there = os.path.abspath(workdir)
    while not os.path.exists(there):
      there = os.path.dirname(there)
    if not os.path.isdir(there):
      return f"{there} is no folder. Choose another."
    writable = os.access(there, os.W_OK | os.X_OK)
    return "" if writable else f"no permission to write in {there}. Choose another."
  if scheme(workdir) not in SCHEMES:
    known = ", ".join(f"{s}://..." for s in SCHEMES)
    return f"it must be a folder of this machine or {known}."
  tf = tensorflow()
  probe = os.path.join(workdir, f".writable_{secrets.token_hex(4)}")
  try:
    write_bytes(probe, b"")
    remove(probe)
  except tf.errors.OpError as error:
    reason = str(error).splitlines()[0]
    return f"{reason}. Look at the bucket's name, the network and the credentials of this machine."
  return ""


def check_writable(workdir: str) -> None:
  """Raises ValueError unless the run can write there; leaves nothing behind.

  To be called by all processes: of several, process 0 writes and the others must see it.
  """
  is_main = jax.process_index() == 0
  problem = _why_not_writable(workdir) if is_main else ""
  if jax.process_count() > 1:
    problem = _everyones_problem(workdir, problem)
  if problem:
    raise ValueError(f"workdir={workdir!r} cannot be written: {problem}")


def _everyones_problem(workdir: str, problem: str, patience: float = 30.0) -> str:
  """Process 0's problem, or that others do not see what it writes: the same in all processes."""
  from jax.experimental import multihost_utils

  is_main = jax.process_index() == 0
  token = secrets.randbelow(2**31) if is_main and not problem else -1
  token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
  if token < 0:
    return problem or "process 0 cannot write there, see its message."
  probe = os.path.join(workdir, f".shared_{token}")
  made = is_main and not scheme(workdir) and not os.path.exists(workdir)
  if is_main:
    write_bytes(probe, b"")
  multihost_utils.sync_global_devices("workdir probe written")
  until = time.monotonic() + patience  # Network file systems show new files after a while.
  while (missing := read_bytes(probe) is None) and time.monotonic() < until:
    time.sleep(0.5)
  missing = multihost_utils.process_allgather(np.int32(missing))
  if is_main:
    remove(probe)
    if made:
      os.rmdir(workdir)
  blind = np.flatnonzero(missing).tolist()
  if not blind:
    return ""
  return (
    f"processes {blind} do not see what process 0 writes there. All of them write the checkpoints: "
    "choose a folder on a file system that all machines share, or gs://..."
  )


def flatten(config: dict, prefix: str = "") -> dict:
  """{"a": {"b": 1}} -> {"a.b": 1}, with tuples as lists, as JSON has them."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = json.loads(json.dumps(value))
  return flat


def differences(old: dict, new: dict) -> dict[str, tuple]:
  """{"a.b": (old, new)} for every value that differs; None stands for absent."""
  old, new = flatten(old), flatten(new)
  keys = sorted(old.keys() | new.keys())
  return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}


def _snapshot(workdir: str) -> dict | None:
  """The config that the folder's run was last started with, None if there is none."""
  path = os.path.join(workdir, "config.json")
  try:
    config = read_json(path)
  except ValueError as error:
    config = str(error)
  if config is None or isinstance(config, dict):
    return config
  raise ValueError(
    f"{path} holds no config ({config}): it is damaged, or not ours. Bring it back from a copy, "
    "or choose another workdir."
  )


def check_same_run(
  workdir: str, config: dict, harmless: Sequence[str], since: Mapping | None = None
) -> None:
  """Compares a config with the one that the folder's config.json holds, if it holds one.

  Args:
    workdir: the run's folder.
    config: everything that defines the run.
    harmless: keys, or sections "a.b" with all below, that may change between two starts of one run;
      they are reported, and `start` writes them down.
    since: {"a.b": value} of keys that older configs do not have, with the value that does what was
      done then: a config without the key counts as having it.

  Raises:
    ValueError: the folder belongs to a run with another config; lists the differences. Or its
      config.json is damaged.
  """
  old, since = _snapshot(workdir), since or {}
  if old is None:
    return
  changed = differences({**since, **flatten(old)}, {**since, **flatten(config)})
  is_harmless = lambda key: any(f"{key}.".startswith(f"{h}.") for h in harmless)
  serious = {k: v for k, v in changed.items() if not is_harmless(k)}
  if serious:
    lines = "\n".join(f"  {k}: there {old!r}, now {new!r}" for k, (old, new) in serious.items())
    raise ValueError(
      f"workdir={workdir!r} holds a run with another config:\n{lines}\n"
      "Choose another workdir, or give the old values to go on with that run."
    )
  for key, (old, new) in changed.items() if jax.process_index() == 0 else ():
    print(f"config: {key} was {old!r}, is now {new!r}", flush=True)


def _record_changes(workdir: str, config: dict) -> None:
  """Adds a line to config_changes.jsonl for every value that is another than at the last start."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  lines = [
    json.dumps({"time": now, "key": key, "old": old, "new": new})
    for key, (old, new) in differences(_snapshot(workdir) or config, config).items()
  ]
  if lines:
    path = os.path.join(workdir, "config_changes.jsonl")
    write_bytes(path, (read_bytes(path) or b"") + "".join(f"{x}\n" for x in lines).encode())


def _without_key(argv: list[str]) -> list[str]:
  """A command without --key and its value: whoever reads a workdir must not learn an API key."""
  flags = [i for i, word in enumerate(argv) if word in ("--key", "-key")]
  hidden = {*flags, *(i + 1 for i in flags)}
  shown = (word for i, word in enumerate(argv) if i not in hidden)
  return [word for word in shown if not word.startswith(("--key=", "-key="))]


def start(workdir: str, config: dict) -> None:
  """Writes config.json and environment.json (versions, devices, command of the newest start).

  What has changed since the last start is added to config_changes.jsonl: {time, key, old, new}.
  """
  _record_changes(workdir, config)  # First: killed in between, a change is told twice, not never.
  write_json(os.path.join(workdir, "config.json"), config)
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  environment = {
    "command": [sys.executable, *_without_key(sys.argv)],
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    "python": platform.python_version(),
    "platform": platform.platform(),
    "versions": versions,
    "backend": jax.default_backend(),
    "devices": [str(d) for d in jax.devices()],
    "device_kind": jax.devices()[0].device_kind,
    "processes": jax.process_count(),
  }
  write_json(os.path.join(workdir, "environment.json"), environment)


def finished(workdir: str) -> dict | None:
  """The summary of a run that reached its last step, None if it has not."""
  return read_json(os.path.join(workdir, "summary.json"))


def finish(workdir: str, summary: dict) -> None:
  """Marks the run as finished, with its last numbers."""
  write_json(os.path.join(workdir, "summary.json"), summary)

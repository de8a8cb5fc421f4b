"""The folder of a run: what was asked, where it ran, and how it ended."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys

import jax

PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
  *("tensorflow", "tensorflow-cpu", "tensorflow-datasets", "clu", "ml_collections"),
)


def write_json(path: str, value: dict) -> None:
  """Writes a JSON file in one piece: a killed process leaves the old one or the new one."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path + ".tmp", "w", encoding="utf-8") as f:
    json.dump(value, f, indent=2, sort_keys=True)
    f.write("\n")
  os.replace(path + ".tmp", path)


def read_json(path: str) -> dict | None:
  """The contents of a JSON file, None if there is no such file."""
  if not os.path.exists(path):
    return None
  with open(path, encoding="utf-8") as f:
    return json.load(f)


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


def check_same_run(workdir: str, config: dict, harmless: tuple[str, ...]) -> None:
  """Compares a config with the one that the folder's config.json holds, if it holds one.

  Args:
    workdir: the run's folder.
    config: everything that defines the run.
    harmless: top-level keys that may change between two starts of one run; they are reported.

  Raises:
    ValueError: the folder belongs to a run with another config; lists the differences.
  """
  changed = differences(read_json(os.path.join(workdir, "config.json")) or config, config)
  serious = {k: v for k, v in changed.items() if k.split(".")[0] not in harmless}
  if serious:
    lines = "\n".join(f"  {k}: there {old!r}, now {new!r}" for k, (old, new) in serious.items())
    raise ValueError(
      f"workdir={workdir!r} holds a run with another config:\n{lines}\n"
      "Choose another workdir, or give the old values to go on with that run."
    )
  for key, (old, new) in changed.items():
    print(f"config: {key} was {old!r}, is now {new!r}", flush=True)


def start(workdir: str, config: dict) -> None:
  """Writes config.json and environment.json (versions, devices, command of the newest start)."""
  write_json(os.path.join(workdir, "config.json"), config)
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  environment = {
    "command": [sys.executable, *sys.argv],
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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

"""Checksums of a checkpoint's files, in the form that `sha256sum -c SHA256SUMS` reads.

A file system almost always gives back what it was given, or an error. But a byte that flipped on
the way to a disk, on it, or in a copy is read in silence. So every file is listed with its SHA-256
before the checkpoint becomes visible, and is compared with the list before it is used.
"""

import concurrent.futures
import hashlib
import json
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from umd.devices import mesh

SUMS = "SHA256SUMS"
METRICS = "metrics.json"
# Orbax writes these two after the sums, and no array depends on them.
METADATA = "_CHECKPOINT_METADATA"
UNLISTED = (METADATA, "commit_success.txt", SUMS)
THREADS = 4  # Hashing releases Python's lock, and an object store answers several requests at once.
SMALL = 2**20  # Bytes.
CHUNK = 2**22  # Bytes.


def from_main(value: float) -> float:
  """Returns process 0's value, bit by bit the same in all processes."""
  (sent,) = next(mesh.each_process([np.array([value], np.float64)]))
  return float(sent[0])


def steps(folder: str) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, the newest first."""
  found = ocp.path.step.standard_name_format().find_all(folder)
  return sorted((checkpoint.step for checkpoint in found), reverse=True)


def _files(folder: epath.Path, prefix: str = "") -> dict[str, epath.Path]:
  """Returns {path below the folder: file}, without what is written after the sums."""
  files = {}
  for entry in folder.iterdir():
    name = prefix + entry.name
    if entry.is_dir():
      files |= _files(entry, f"{name}/")
    elif name not in UNLISTED:
      files[name] = entry
  return files


def _sum(file: epath.Path) -> str:
  digest = hashlib.sha256()
  with file.open("rb") as stream:
    while chunk := stream.read(CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def _sums(files: dict[str, epath.Path]) -> dict[str, str]:
  with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
    return dict(zip(files, threads.map(_sum, files.values()), strict=True))


def write(folder: epath.Path, metrics: dict[str, float]) -> None:
  """Adds metrics.json and the sums of all files to a checkpoint that is about to be committed."""
  (folder / METRICS).write_text(json.dumps(metrics, sort_keys=True))
  sums = _sums(_files(folder))
  (folder / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def _read_sums(folder: epath.Path) -> dict[str, str]:
  """Returns {file: SHA-256}.

  Raises:
    FileNotFoundError: there is no list.
    ValueError: a line cannot be read.
  """
  *lines, _ = (folder / SUMS).read_bytes().decode().split("\n")
  return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def read_metrics(folder: epath.Path) -> dict[str, float]:
  """Returns the metrics saved with a checkpoint; {} if there are none or they were changed."""
  try:
    if _read_sums(folder).get(METRICS) != _sum(folder / METRICS):
      return {}
    return json.loads((folder / METRICS).read_text())
  except (OSError, ValueError):
    return {}


def _is_hidden(name: str) -> bool:
  """Whether it is a file of the system, such as .DS_Store or .nfs000123."""
  return name.rsplit("/", 1)[-1].startswith(".")


def _first_difference(folder: epath.Path, quick: bool) -> str:
  listed = _read_sums(folder)
  files = _files(folder)
  if missing := sorted(listed.keys() - files.keys()):
    return f"{missing[0]} is missing"
  # A list that was cut short would vouch for fewer files than there are.
  if extra := sorted(n for n in files.keys() - listed.keys() if not _is_hidden(n)):
    return f"{extra[0]} is not listed in {SUMS}"
  files = {name: files[name] for name in listed}
  if quick:
    files = {name: file for name, file in files.items() if file.stat().length <= SMALL}
  sums = _sums(files)
  wrong = sorted(name for name in sums if sums[name] != listed[name])
  more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
  return f"{wrong[0]} is not what was written{more}" if wrong else ""


def verify(folder: epath.Path, quick: bool = False) -> str:
  """Returns what is wrong with a complete checkpoint, "" if it is as it was written; never raises.

  Args:
    folder: of one checkpoint, e.g. <workdir>/checkpoints/500.
    quick: leaves out the contents of files over 1 MiB.
  """
  try:
    json.loads((folder / METADATA).read_text())
  except (OSError, ValueError):
    return f"{METADATA} is missing or cannot be read"
  if not (folder / SUMS).exists():
    return f"{SUMS} is missing"
  try:
    return _first_difference(folder, quick)
  except Exception as error:  # Disks and object stores have errors of their own.
    return f"cannot be read: {(str(error).splitlines() or [repr(error)])[0]}"


class Newest(NamedTuple):
  """The newest good checkpoint of a run.

  Attributes:
    step: its step; None if there is no checkpoint at all.
    damaged: {step: what is wrong} of the newer ones; only process 0 knows them.
  """

  step: int | None
  damaged: dict[int, str]


def find_newest(folder: str, quick: bool = False) -> Newest:
  """Finds the newest checkpoint that is as it was written; process 0 decides for all.

  Args:
    folder: the run's checkpoints.
    quick: leaves out the contents of large files.

  Raises:
    ValueError: there are checkpoints, and all of them are damaged.
  """
  good, damaged = None, {}
  if jax.process_index() == 0:
    for step in steps(folder):
      problem = verify(epath.Path(folder) / str(step), quick)
      if not problem:
        good = step
        break
      damaged[step] = problem
  if from_main(good is None and bool(damaged)):
    lines = "".join(f"\n  {step}: {text}" for step, text in damaged.items())
    raise ValueError(
      f"All checkpoints in {folder} are damaged:{lines or ' see process 0.'}\n"
      "Nothing was changed. Restore one from a copy, or move that folder away to start anew."
    )
  step = from_main(-1 if good is None else good)
  return Newest(None if step < 0 else int(step), damaged)


def remove_temporary(folder: str) -> None:
  """Removes what killed and failed saves left; process 0 does it, while nothing is being saved."""
  if jax.process_index() == 0:
    for path in ocp.path.step.all_temporary_paths(folder):
      # On an object store, orbax takes all folders without its mark for unfinished.
      if path.get_final().name.isdigit():
        path.get().rmtree(missing_ok=True)


def move_aside(folder: str, step: int) -> str:
  """Renames a damaged checkpoint to damaged_<step>, or damaged_<step>_2 and so on; returns that."""
  root = epath.Path(folder)
  names = (f"damaged_{step}{suffix}" for suffix in ("", *(f"_{i}" for i in range(2, 1000))))
  aside = next(root / name for name in names if not (root / name).exists())
  (root / str(step)).rename(aside)
  return str(aside)

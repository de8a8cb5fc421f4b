"""Checksums of a checkpoint's files, in the form that `sha256sum -c SHA256SUMS` reads.

A file system gives back what it was given, or an error, almost always: a byte that flipped on the
way to a disk, on it, or in a copy is read in silence. So every file is listed with its SHA-256
before the checkpoint becomes visible.
"""

from typing import NamedTuple
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from umd.devices import mesh
from umd.state import TrainState
import concurrent.futures
import hashlib
import json
import os
from typing import NamedTuple
from etils import epath


def from_main(value: float) -> float:
  """Process 0's value, bit by bit the same in all."""
  (sent,) = next(mesh.each_process([np.array([value], np.float64)]))
  return float(sent[0])


def steps(folder: str) -> list[int]:
  """Steps of the complete checkpoints in a folder, newest first."""
  found = ocp.path.step.standard_name_format().find_all(folder)
  return sorted((one.step for one in found), reverse=True)


class Found(NamedTuple):
  """The newest good checkpoint, and what is to be said.

  Attributes:
    step: its step; None if there is no checkpoint at all.
    damaged: {step: what is wrong} of the newer ones; known to process 0 only.
    note: of the good one, "" if it was verified; known to process 0 only.
  """

  step: int | None
  damaged: dict[int, str]
  note: str


class Restored(NamedTuple):
  """A state that was read back.

  Attributes:
    state: as it was saved, with the shardings asked for.
    data: the data position saved with it.
    step: its step.
    reports: what is to be said about damaged checkpoints, one line each; on process 0.
  """

  state: TrainState
  data: dict
  step: int
  reports: list[str]


def find_newest(folder: str, quick: bool = False) -> Found:
  """Looks for the newest checkpoint that is as it was written; process 0 decides for all.

  Args:
    folder: the run's checkpoints.
    quick: leaves out the contents of large files.

  Raises:
    ValueError: there are checkpoints, and all of them are damaged.
  """
  found = Found(None, {}, "")
  if jax.process_index() == 0:
    for step in steps(folder):
      verdict = verify(epath.Path(folder) / str(step), quick)
      if verdict.good:
        found = found._replace(step=step, note=verdict.text)
        break
      found.damaged[step] = verdict.text
  lost = found.step is None and bool(found.damaged)
  # -1: none, -2: all are damaged.
  step = int(from_main(-2 if lost else -1 if found.step is None else found.step))
  if step == -2:
    raise ValueError(_all_damaged(folder, found.damaged))
  return found._replace(step=None if step == -1 else step)


def _all_damaged(folder: str, damaged: dict[int, str]) -> str:
  lines = "".join(f"\n  {step}: {text}" for step, text in damaged.items())
  return (
    f"All checkpoints in {folder} are damaged:{lines or ' see process 0.'}\n"
    "Nothing was changed. Bring one back from a copy, or move that folder away to start anew."
  )


def remove_temporary(folder: str) -> None:
  """Removes what killed and failed saves left; process 0 does it, while nothing is being saved."""
  if jax.process_index() == 0:
    for path in ocp.path.step.all_temporary_paths(folder):
      if path.get_final().name.isdigit():  # On an object store, anything might be unfinished.
        path.get().rmtree(missing_ok=True)


def move_aside(folder: str, step: int) -> str:
  """Renames a damaged checkpoint to damaged_<step>, or damaged_<step>_2 and so on; returns that."""
  root = epath.Path(folder)
  names = (f"damaged_{step}{suffix}" for suffix in ("", *(f"_{i}" for i in range(2, 1000))))
  aside = next(root / name for name in names if not (root / name).exists())
  (root / str(step)).rename(aside)
  return str(aside)

SUMS = "SHA256SUMS"
METRICS = "metrics.json"
# Orbax writes these two last, after the sums, and no array depends on them.
METADATA = "_CHECKPOINT_METADATA"
LATER = (METADATA, "commit_success.txt", SUMS)
THREADS = 4  # Hashing leaves the interpreter's lock; an object store answers several at a time.
SMALL = 2**20  # bytes


class Verdict(NamedTuple):
  """What was found: `good`, and if there is anything to say about it, `text`."""

  good: bool
  text: str


def _files(folder: epath.Path, prefix: str = "") -> dict[str, epath.Path]:
  """{path below the folder: file}, without what orbax adds after the sums."""
  found = {}
  for entry in folder.iterdir():
    name = prefix + entry.name
    if entry.is_dir():
      found.update(_files(entry, f"{name}/"))
    elif name not in LATER:
      found[name] = entry
  return found


def _sum(file: epath.Path) -> str:
  with file.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _sums(files: dict[str, epath.Path]) -> dict[str, str]:
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    return dict(zip(files, pool.map(_sum, files.values()), strict=True))


def _footer(lines: str) -> str:
  """Closes the list, so that one that was cut short or changed is not taken for a whole one."""
  return f"# end of list, whose own sum is {hashlib.sha256(lines.encode()).hexdigest()}\n"


def write(folder: epath.Path, metrics: dict[str, float]) -> None:
  """Adds metrics.json and the sums of all files to a checkpoint that is about to be committed."""
  (folder / METRICS).write_text(json.dumps(metrics, sort_keys=True))
  sums = _sums(_files(folder))
  lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
  (folder / SUMS).write_text(lines + _footer(lines))


def read_metrics(folder: epath.Path) -> dict[str, float]:
  """The metrics saved with a checkpoint; {} if there are none, or they cannot be trusted."""
  try:
    listed = _read_sums(folder)
    if listed.get(METRICS) != _sum(folder / METRICS):
      return {}
    return json.loads((folder / METRICS).read_text())
  except (OSError, ValueError):
    return {}


def _read_sums(folder: epath.Path) -> dict[str, str]:
  """{file: its sum}.

  Raises:
    FileNotFoundError: there is no list.
    ValueError: it is not as it was written.
  """
  raw = (folder / SUMS).read_bytes()
  lines, mark, _ = raw.partition(b"# end of list")
  try:
    text = lines.decode()
  except UnicodeDecodeError:
    text, mark = "", b""
  if not mark or raw != (text + _footer(text)).encode():
    raise ValueError(f"{SUMS} is cut short or changed")
  return {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}


def _leads_out(folder: epath.Path) -> str:
  """The first name in a checkpoint's folder that is a link to somewhere outside; "" for none.

  A link to another checkpoint of the same run, or a workdir that is a link itself, is fine.
  """
  here = os.path.realpath(folder.parent) + os.sep
  outside = lambda path: not os.path.realpath(path).startswith(here)
  if outside(folder):
    return folder.name
  for path, folders, files in os.walk(folder):
    for name in (*folders, *files):
      if outside(os.path.join(path, name)):
        return os.path.relpath(os.path.join(path, name), folder)
  return ""


def _metadata_is_whole(folder: epath.Path) -> bool:
  try:
    return isinstance(json.loads((folder / METADATA).read_text()), dict)
  except (OSError, ValueError):
    return False


def _first_wrong(folder: epath.Path, listed: dict[str, str], quick: bool) -> str:
  """What is wrong with the listed files, "" if nothing is."""
  files = _files(folder)
  if missing := sorted(listed.keys() - files.keys()):
    return f"{missing[0]} is missing"
  checked = {name: files[name] for name in listed}
  if quick:
    checked = {name: file for name, file in checked.items() if file.stat().length <= SMALL}
  found = _sums(checked)
  wrong = sorted(name for name in found if found[name] != listed[name])
  more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
  return f"{wrong[0]} is not what was written{more}" if wrong else ""


def verify(folder: epath.Path, quick: bool = False) -> Verdict:
  """Whether a complete checkpoint is as it was written; never raises.

  Args:
    folder: of one checkpoint, e.g. <workdir>/checkpoints/500.
    quick: leaves out the contents of files over 1 MiB.
  """
  try:
    local = "://" not in str(folder)
    if local and (name := _leads_out(folder)):
      return Verdict(False, f"{name} is a link that leads out of {folder.parent}")
    if not _metadata_is_whole(folder):
      return Verdict(False, f"{METADATA} is missing or cannot be read")
    if not (folder / SUMS).exists() and not (folder / METRICS).exists():
      # The sums are there before the checkpoint is: these were not saved, not lost.
      return Verdict(True, f"has no {SUMS} (an older version saved it), so it is not verified")
    problem = _first_wrong(folder, _read_sums(folder), quick)
    return Verdict(not problem, problem)
  except FileNotFoundError as error:
    return Verdict(False, f"{os.path.basename(str(error.filename or SUMS))} is missing")
  except Exception as error:  # Of a disk or an object store, which has errors of its own.
    return Verdict(
      False, f"cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
    )

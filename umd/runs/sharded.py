"""Work that is written to a folder shard by shard, so that it can be stopped and gone on with.

  progress/NAME.json                    settings and command of the work, written first
  progress/NAME-00000-of-00016.json     report of a shard, written once the shard is whole

The shards themselves have names of their own. Each is written under another name and renamed, so
that a killed process leaves nothing that passes for a shard. What is in a shard follows from the
settings alone: any process may write it, and several need nothing but the folder to share the work.
Folders may be gs://bucket/folder.
"""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence

from etils import epath

from umd.runs import workdir

PROGRESS = "progress"
VISIBLE_SECONDS = 60.0  # Network file systems show a file of another machine after a while.


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be written.

  Attributes:
    folder: where it goes.
    settings: all that the contents depend on, as JSON has it.
    command: the command that writes it, for messages.
    name: of the work; a folder may hold several.
  """

  folder: str
  settings: dict
  command: str
  name: str

  @property
  def shards(self) -> int:
    """Number of shards."""
    return self.settings["shards"]

  def file(self, shard: int) -> str:
    """Returns the path of a shard."""
    raise NotImplementedError

  def progress(self, shard: int | None = None) -> str:
    """Returns the path of the settings, or of a shard's report."""
    part = "" if shard is None else f"-{shard:05d}-of-{self.shards:05d}"
    return workdir.join(self.folder, PROGRESS, f"{self.name}{part}.json")


def begun(folder: str) -> dict[str, dict]:
  """Returns {name: {settings, command, shards}} of all works that were begun in a folder."""
  progress = workdir.join(folder, PROGRESS)
  names = [name.removesuffix(".json") for name in workdir.names(progress) if name.endswith(".json")]
  return {n: workdir.read_json(workdir.join(progress, f"{n}.json")) for n in names if "-" not in n}


def unfinished(folder: str, name: str) -> str:
  """Returns a sentence on how much of a work that was begun is there, and how to go on."""
  work = begun(folder)[name]
  reports = workdir.names(workdir.join(folder, PROGRESS))
  done = sum(report.startswith(f"{name}-") and report.endswith(".json") for report in reports)
  return (
    f"{name!r} is not finished, {done} of {work['shards']} shards are there. Go on with the same "
    f"command: {work['command']}"
  )


def begin(plan: Plan, is_main: bool = True, shared: str = "", harmless: Sequence[str] = ()) -> None:
  """Writes the settings down, or compares them with those that are there.

  Args:
    plan: of the work.
    is_main: whether this process writes; the others wait until it has.
    shared: key of the settings in which all works of the folder must agree.
    harmless: last keys of settings that may differ.

  Raises:
    ValueError: the folder holds works with other settings (lists the differences) or something
      else, cannot be written, or is not shared by all processes.
  """
  works = begun(plan.folder)
  for name, work in works.items():
    old, new = work["settings"], plan.settings
    if name != plan.name:
      old, new = ({key: x[key] for key in x if key == shared} for x in (old, new))
    differ = workdir.differences(old, new)
    differ = {key: pair for key, pair in differ.items() if key.split(".")[-1] not in harmless}
    if differ:
      lines = "\n".join(f"  {key}: there {a!r}, now {b!r}" for key, (a, b) in differ.items())
      raise ValueError(
        f"--out={plan.folder!r} holds {name!r} with other settings:\n{lines}\nChoose another "
        f"folder, or give the old settings; the command was: {work['command']}"
      )
  if is_main and plan.name not in works:
    if not works and workdir.names(plan.folder):
      raise ValueError(f"--out={plan.folder!r} holds something else. Choose another folder.")
    work = {"settings": plan.settings, "command": plan.command, "shards": plan.shards}
    try:
      workdir.write_json(plan.progress(), work)
    except OSError as error:
      raise ValueError(
        f"--out={plan.folder!r} cannot be written: {error}. Choose another folder."
      ) from None
  until = time.monotonic() + VISIBLE_SECONDS
  while not workdir.exists(plan.progress()):
    if time.monotonic() > until:
      raise ValueError(
        f"--out={plan.folder!r}: what process 0 writes there is not seen by all processes. Choose "
        "a folder on a file system that all machines share, or gs://..."
      )
    time.sleep(0.2)


def done(plan: Plan) -> dict[int, dict]:
  """Returns {shard: report} of the shards that are whole."""
  reports = {shard: workdir.read_json(plan.progress(shard)) for shard in range(plan.shards)}

  def is_whole(shard: int, report: dict | None) -> bool:
    file = epath.Path(plan.file(shard))
    return report is not None and file.exists() and file.stat().length == report["bytes"]

  return {shard: report for shard, report in reports.items() if is_whole(shard, report)}


def missing(plan: Plan) -> list[int]:
  """Returns the shards that are not there yet, or not whole."""
  whole = done(plan)
  return [shard for shard in range(plan.shards) if shard not in whole]


def check_space(plan: Plan, images: int, image_bytes: int, remedy: str = "") -> None:
  """Raises ValueError if so many images will not fit on the disk; gs:// is not looked at."""
  if workdir.scheme(plan.folder):
    return
  needed, free = images * image_bytes, shutil.disk_usage(plan.folder).free
  if needed > free:
    raise ValueError(
      f"--out={plan.folder!r}: {images} images need {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB "
      f"are free. Choose another disk{remedy}."
    )


def write_shard(plan: Plan, shard: int, write: Callable[[str], None], **report) -> None:
  """Writes a shard in one piece, and then its report.

  Args:
    plan: of the work.
    shard: its number.
    write: writes the file of that path, which is one of this machine.
    report: numbers that `done` returns, beside the `bytes` of the file.
  """
  remote = workdir.scheme(plan.folder)
  target = plan.file(shard)
  local = tempfile.mkdtemp() if remote else os.path.join(plan.folder, PROGRESS)
  temporary = os.path.join(local, f"{os.path.basename(target)}.tmp")
  try:
    write(temporary)
    size = os.path.getsize(temporary)
    if remote:
      epath.Path(temporary).copy(target, overwrite=True)
    else:
      os.makedirs(os.path.dirname(target), exist_ok=True)
      os.replace(temporary, target)
  finally:
    if remote:
      shutil.rmtree(local, ignore_errors=True)
  workdir.write_json(plan.progress(shard), {**report, "bytes": size})


def wait(plan: Plan, tell: Callable[[str], None], pause: float = 5.0) -> None:
  """Returns when all shards are there; `tell` gets a line whenever fewer are left.

  Nothing else keeps the processes together: each writes its shards at its own pace.
  """
  previous = None
  while left := len(missing(plan)):
    if left != previous:
      tell(f"waiting for {left} of {plan.shards} shards, which other processes write")
    previous = left
    time.sleep(pause)

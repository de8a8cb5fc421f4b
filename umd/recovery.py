"""Finds the newest checkpoint of a run that is as it was written."""

from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from umd import checksums, sharding
from umd.state import TrainState


def from_main(value: float) -> float:
  """Process 0's value, bit by bit the same in all."""
  (sent,) = next(sharding.each_process([np.array([value], np.float64)]))
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
      verdict = checksums.verify(epath.Path(folder) / str(step), quick)
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

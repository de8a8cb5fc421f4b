"""Checkpoints: the train state and where the data stood, written by orbax in the background."""

import contextlib
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from umd import workdir as folders
from umd.state import TrainState

FOLDER = "checkpoints"
WEIGHTS = {"ema": "ema_params", "raw": "params"}


def _folder(workdir: str) -> str:
  """Where the checkpoints are; orbax takes gs:// and absolute paths."""
  return os.path.join(workdir if folders.scheme(workdir) else os.path.abspath(workdir), FOLDER)


class Checkpoints:
  """The checkpoints of one run, newest last.

  A checkpoint becomes visible when it is complete: a killed save leaves a temporary folder that is
  never read.
  """

  def __init__(self, workdir: str, keep: int = 2):
    """Opens (and makes) `workdir`/checkpoints; the newest `keep` are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(_folder(workdir), options=options)

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, step: int, data: dict) -> None:
    """Saves in the background; returns when the arrays are copied off the devices.

    Args:
      state: what to save.
      step: its step.
      data: JSON-able description of the data stream's position.
    """
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    self._manager.save(step, args=items)

  def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict]:
    """(state, data position) saved at `step`, with the shapes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
    )
    restored = self._manager.restore(step, args=items)
    return restored["state"], restored["data"]

  def close(self) -> None:
    """Waits for the save under way."""
    self._manager.close()


@contextlib.contextmanager
def _newest(workdir: str):
  """(manager, step, tree of metadata) of a run's newest checkpoint."""
  folder = _folder(workdir)
  if not epath.Path(folder).is_dir():
    raise FileNotFoundError(_no_checkpoint(workdir, folder))
  handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
  with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
    step = manager.latest_step()
    if step is None:
      raise FileNotFoundError(_no_checkpoint(workdir, folder))
    yield manager, step, manager.item_metadata(step)["state"].tree


def _field(weights: str) -> str:
  if weights not in WEIGHTS:
    raise ValueError(f"init_weights={weights!r} is not one of {list(WEIGHTS)}.")
  return WEIGHTS[weights]


def param_shapes(workdir: str) -> dict:
  """The parameters of a run's newest checkpoint as a tree of things with a `shape`; reads no array.

  Raises:
    FileNotFoundError: there is no complete checkpoint.
  """
  with _newest(workdir) as (_, _, tree):
    return tree[WEIGHTS["raw"]]


def load_params(workdir: str, weights: str = "ema") -> tuple[dict, int]:
  """Parameters of another run's newest checkpoint as numpy arrays, and its step.

  Args:
    workdir: the run's folder.
    weights: "ema" or "raw".

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: `weights` is neither.
  """
  field = _field(weights)
  with _newest(workdir) as (manager, step, tree):
    wanted = {field: tree[field]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    state = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    restored = manager.restore(step, args=ocp.args.Composite(state=state))
  return restored["state"][field], step


def _no_checkpoint(workdir: str, folder: str) -> str:
  return (
    f"init_from={workdir!r}: no checkpoint in {folder}. Train that run first, or give the workdir "
    "of one that was trained."
  )

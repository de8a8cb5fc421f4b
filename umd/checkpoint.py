"""Checkpoints: the train state and where the data stood, written by orbax in the background."""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp

from umd.state import TrainState

FOLDER = "checkpoints"
WEIGHTS = {"ema": "ema_params", "raw": "params"}


class Checkpoints:
  """The checkpoints of one run, newest last.

  A checkpoint becomes visible when it is complete: a killed save leaves a temporary folder that is
  never read.
  """

  def __init__(self, workdir: str, keep: int = 2):
    """Opens (and makes) `workdir`/checkpoints; the newest `keep` are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    folder = os.path.join(os.path.abspath(workdir), FOLDER)
    self._manager = ocp.CheckpointManager(folder, options=options)

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


def load_params(workdir: str, weights: str = "ema") -> tuple[dict, int]:
  """Parameters of another run's newest checkpoint as numpy arrays, and its step.

  Args:
    workdir: the run's folder.
    weights: "ema" or "raw".

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: `weights` is neither.
  """
  if weights not in WEIGHTS:
    raise ValueError(f"init_weights={weights!r} is not one of {list(WEIGHTS)}.")
  folder = os.path.join(os.path.abspath(workdir), FOLDER)
  if not os.path.isdir(folder):
    raise FileNotFoundError(_no_checkpoint(workdir, folder))
  handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
  with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
    step = manager.latest_step()
    if step is None:
      raise FileNotFoundError(_no_checkpoint(workdir, folder))
    field = WEIGHTS[weights]
    wanted = {field: manager.item_metadata(step)["state"].tree[field]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    state = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    restored = manager.restore(step, args=ocp.args.Composite(state=state))
  return restored["state"][field], step


def _no_checkpoint(workdir: str, folder: str) -> str:
  return (
    f"init_from={workdir!r}: no checkpoint in {folder}. Train that run first, or give the workdir "
    "of one that was trained."
  )

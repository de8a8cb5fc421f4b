"""The weights of a trained model, by their kind and step, from a run or an exported folder."""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from umd import checksums, recovery, tensors, workdir
from umd.checkpoint import FOLDER, WEIGHTS
from umd.description import Place
from umd.progress import say
from umd.retention import Retention

TENSORS = "model.safetensors"
NEWEST, BEST = "newest", "best"


def _checkpoints(place: Place) -> str:
  folder = place.folder
  return os.path.join(folder if workdir.scheme(folder) else os.path.abspath(folder), FOLDER)


def choose(place: Place, step: int | str = NEWEST) -> int:
  """The step that is meant; that checkpoint is as it was written.

  Args:
    place: of a run.
    step: a number; "newest"; or "best" by the metric that the run's config names.

  Raises:
    FileNotFoundError: there is no such checkpoint; lists those that there are.
    ValueError: it is damaged, or nothing says which is best.
  """
  folder = _checkpoints(place)
  there = recovery.steps(folder) if workdir.exists(folder) else []
  if not there:
    raise FileNotFoundError(
      f"{place.folder!r} has no checkpoint yet. Train on, or give another workdir."
    )
  shown = ", ".join(map(str, sorted(there)))
  if step == NEWEST:
    found = recovery.find_newest(folder)
    for bad, text in found.damaged.items():
      say(f"{folder}: checkpoint {bad} is damaged: {text}; using {found.step}")
    return found.step
  if step == BEST:
    if not place.best:
      raise ValueError(
        f"step='best': the run in {place.folder!r} does not say what is best (checkpoint.best is "
        f"''). Name a step: {shown}."
      )
    metrics = {s: checksums.read_metrics(epath.Path(folder) / str(s)) for s in there}
    step = Retention(best=place.best).best_step(there, metrics)
    if step is None:
      raise ValueError(f"step='best': no checkpoint has {place.best!r}. Name a step: {shown}.")
  if isinstance(step, bool) or not isinstance(step, int):
    raise ValueError(f"step={step!r} must be a number, 'newest' or 'best'.")
  if step not in there:
    raise FileNotFoundError(
      f"step={step}: {place.folder!r} has no such checkpoint; it has {shown}."
    )
  verdict = checksums.verify(epath.Path(folder) / str(step))
  if not verdict.good:
    raise ValueError(
      f"step={step}: that checkpoint of {place.folder!r} is damaged: {verdict.text}. Name another: "
      f"{shown}."
    )
  return step


def _of_checkpoint(path: epath.Path, field: str) -> dict:
  """One field of a train state, as NumPy arrays."""
  about = ocp.PyTreeCheckpointHandler().metadata(path)
  if about is None or field not in (about.tree or {}):
    raise ValueError(f"{path} holds no {field} that can be read. Name another step.")
  wanted = {field: about.tree[field]}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  with ocp.PyTreeCheckpointer() as checkpointer:
    state = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    return checkpointer.restore(path, args=state)[field]


def _of_export(place: Place, which: str, step: int | str) -> tuple[dict, str, int]:
  held = place.weights
  if which not in ("", held["which"]) or step not in (NEWEST, held["step"]):
    raise ValueError(
      f"weights={which!r}, step={step!r}: {place.folder!r} holds the {held['which']} weights of "
      f"step {held['step']} only. Leave both out, or load the run that it was exported from."
    )
  path = workdir.join(place.folder, TENSORS)
  return tensors.read(path, held["sha256"]), held["which"], held["step"]


def read(place: Place, which: str = "", step: int | str = NEWEST) -> tuple[dict, str, int]:
  """(parameters as NumPy float32, which they are, their step).

  Args:
    place: see `umd.description.find`.
    which: "ema" or "raw"; "" for the average, or for what an exported folder holds.
    step: see `choose`.

  Raises:
    FileNotFoundError, ValueError: there are no such weights, or they are damaged.
  """
  if which and which not in WEIGHTS:
    raise ValueError(f"weights={which!r} is not one of {list(WEIGHTS)}.")
  if place.weights is not None:
    return _of_export(place, which, step)
  which = which or "ema"
  step = choose(place, step)
  state = epath.Path(_checkpoints(place)) / str(step) / "state"
  return _of_checkpoint(state, WEIGHTS[which]), which, step

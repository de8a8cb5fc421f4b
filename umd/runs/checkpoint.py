"""Checkpoints: the train state and the position in the data, written by orbax in the background.

A checkpoint becomes visible when it is complete, checksums and all, so a save that was killed is
never read. A checkpoint whose files no longer match their checksums is reported, and the one before
it is used.
"""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from umd.devices import mesh
from umd.runs import integrity, workdir
from umd.runs.progress import during, say

FOLDER = "checkpoints"
WEIGHTS = {"ema": "ema_params", "raw": "params"}
MODES = {"max": max, "min": min}
# A save in the background may take so long. Of several processes, one that cannot write is waited
# for by the others for so long, once or twice.
TIMEOUT_SECONDS = 1200
REMEDY = (
  "Make room on the disk (a save needs as much as one checkpoint holds), or see that the bucket "
  "can be written."
)


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which checkpoints are kept: the newest, every so many steps, and the best by a metric.

  Attributes:
    keep: how many of the newest, at least 1; with 2 there is one to fall back on.
    keep_every: checkpoints of steps that it divides stay for ever; 0 for none.
    best: "max:NAME" or "min:NAME" of a metric, e.g. "max:fewshot/class_umd_10shot_mean"; "" for
      none.
  """

  keep: int = 2
  keep_every: int = 0
  best: str = ""

  def __post_init__(self):
    if self.keep < 1:
      raise ValueError(f"checkpoint.keep={self.keep} must be at least 1; 2 leaves one in reserve.")
    if self.keep_every < 0:
      raise ValueError(f"checkpoint.keep_every={self.keep_every} must be 0 (none) or positive.")
    mode, _, name = self.best.partition(":")
    if self.best and (mode not in MODES or not name):
      raise ValueError(
        f"checkpoint.best={self.best!r} must be 'max:NAME' or 'min:NAME' of a logged metric, e.g. "
        "'max:fewshot/class_umd_10shot_mean', or '' for none."
      )

  @property
  def metric(self) -> str:
    """The name of the metric that decides which one is best, "" for none."""
    return self.best.partition(":")[2]

  def best_step(self, steps: Sequence[int], metrics: Mapping[int, Mapping]) -> int | None:
    """Returns the best of `steps`, the newest of equals; None where no metric is finite.

    Args:
      steps: of the checkpoints that there are.
      metrics: {step: {name: value}} of those where some were measured.
    """
    values = {step: metrics.get(step, {}).get(self.metric, math.nan) for step in steps}
    finite = sorted((step for step in steps if math.isfinite(values[step])), reverse=True)
    if not self.best or not finite:
      return None
    return MODES[self.best.partition(":")[0]](finite, key=values.get)

  def kept(self, steps: Sequence[int], metrics: Mapping[int, Mapping]) -> set[int]:
    """Returns the steps to keep; arguments as in `best_step`."""
    newest = sorted(steps)[-self.keep :]
    regular = [step for step in steps if self.keep_every and step % self.keep_every == 0]
    return {*newest, *regular, self.best_step(steps, metrics)} - {None}


class Restored(NamedTuple):
  """A state that was read back.

  Attributes:
    state: as it was saved, with the shardings asked for.
    data: the position in the data saved with it.
    step: its step.
    reports: what to say about damaged checkpoints, one line each; on process 0.
  """

  state: Any
  data: dict
  step: int
  reports: list[str]


def folder_of(run: str) -> str:
  """Returns where the checkpoints of a run are; orbax takes addresses and absolute paths."""
  return os.path.join(run if workdir.scheme(run) else os.path.abspath(run), FOLDER)


class Checkpoints:
  """The checkpoints of one run.

  As a context manager it closes itself. Where an error ends the context, a failed save is reported
  and does not hide that error.
  """

  def __init__(
    self,
    workdir: str,
    keep: int = 2,
    keep_every: int = 0,
    best: str = "",
    *,
    say: Callable[[str], None] = say,
  ):
    """Opens (and makes) `workdir`/checkpoints.

    Args:
      workdir: of the run.
      keep, keep_every, best: which are kept, see `Retention`.
      say: prints a line on process 0.
    """
    self._retention = Retention(keep, keep_every, best)
    self._say = say
    self._folder = folder_of(workdir)
    self._saving: int | None = None  # The step of the save under way.
    self._failed: tuple[int, BaseException | None] | None = None  # The newest save, if it failed.
    integrity.remove_temporary(self._folder)
    self._open()
    earlier = self._manager.all_steps() if best else ()
    root = epath.Path(self._folder)
    self._metrics = {step: integrity.read_metrics(root / str(step)) for step in earlier}

  def _open(self) -> None:
    options = ocp.CheckpointManagerOptions(
      # The metadata of a damaged checkpoint may be unreadable, and must not keep a run from opening.
      # Orbax's own policy for the best checkpoint needs it, so `should_preserve` is ours.
      lightweight_initialize=True,
      preservation_policy=self,
      async_options=ocp.options.AsyncOptions(
        timeout_secs=TIMEOUT_SECONDS, post_finalization_callback=self._before_commit
      ),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Answers orbax, which asks which of its checkpoints to keep."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = self._retention.kept(steps, self._metrics)
    return [step in kept for step in steps]

  def _before_commit(self) -> None:
    """Adds the checksums; orbax calls it on process 0 when all is written and nothing visible."""
    for path in ocp.path.step.all_temporary_paths(self._folder):
      if path.get_final().name == str(self._saving):
        integrity.write(path.get(), self._metrics[self._saving])
        return
    raise OSError(f"the temporary folder of step {self._saving} in {self._folder} is gone")

  def latest(self) -> int | None:
    """Returns the step of the newest complete checkpoint, None if there is none.

    That checkpoint may be damaged.
    """
    return self._manager.latest_step()

  def save(
    self, state: Any, step: int, data: dict, metrics: dict[str, float] | None = None
  ) -> None:
    """Saves in the background; returns when the arrays are copied off the devices.

    A save that fails is reported, now if it fails at once, otherwise at the next one or at the end;
    the earlier checkpoints are not touched. A step that is saved already is not saved again.

    Args:
      state: any pytree of arrays; `load_params` needs fields `params` and `ema_params`.
      step: its step.
      data: a JSON-able description of the position in the data.
      metrics: of this very step; a checkpoint without the metric of `best` is never the best.
    """
    self.wait()
    if step in self._manager.all_steps():
      return
    values = {name: float(value) for name, value in (metrics or {}).items()}
    if (name := self._retention.metric) and jax.process_count() > 1:
      # All processes must keep the same checkpoints.
      values[name] = integrity.from_main(values.get(name, math.nan))
    self._metrics[step] = {name: x for name, x in values.items() if math.isfinite(x)}
    self._saving = step
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:
      if jax.process_count() > 1:
        raise  # The others are waiting for this process: it must end for them to end.
      self._give_up(error)

  def wait(self) -> bool:
    """Waits for the save under way; returns whether the newest one is safe, in all processes.

    Of several processes, those that could write wait for one that could not for at most twice
    `TIMEOUT_SECONDS` from the beginning of the save.
    """
    if self._saving is None:
      return self._failed is None
    problem = None
    try:
      with during(f"finishing the checkpoint of step {self._saving}", self._say):
        self._manager.wait_until_finished()
    except Exception as error:  # A thread of orbax met it: of the disk, the bucket, a process.
      problem = error
    if mesh.all_agree(problem is None):
      self._saving = None
      self._failed = None
    else:
      self._give_up(problem)
    return self._failed is None

  def _give_up(self, error: BaseException | None) -> None:
    """Reports a failed save, removes what it wrote, and opens the folder again."""
    step = self._saving
    self._failed = (step, error)
    self._saving = None
    reason = "another process failed, see its message"
    if error:
      reason = (str(error).splitlines() or [repr(error)])[0]
    if process := jax.process_index():
      print(f"process {process}: step {step} not saved: {reason}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # It raises the error that was reported already.
      self._manager.close()
    integrity.remove_temporary(self._folder)
    self._open()
    self._say(
      f"WARNING: the checkpoint of step {step} was NOT SAVED: {reason}. The run goes on; its "
      f"newest checkpoint is of step {self.latest()}; the next save tries again. {REMEDY}"
    )

  def restore(self, like: Any, step: int) -> tuple[Any, dict]:
    """Returns (state, position in the data) of a step, with the shapes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
    )
    restored = self._manager.restore(step, args=items)
    return restored["state"], restored["data"]

  def restore_newest(self, like: Any) -> Restored | None:
    """Returns the newest checkpoint that is as it was written; None if nothing was ever saved.

    Newer ones that are damaged are moved to checkpoints/damaged_<step>, so that the run can save
    those steps again.

    Raises:
      ValueError: there are checkpoints, and all of them are damaged; they stay where they are.
    """
    with during("verifying the newest checkpoint", self._say):
      newest = integrity.find_newest(self._folder)
    if newest.step is None:
      return None
    reports = []
    for step, problem in newest.damaged.items():
      aside = integrity.move_aside(self._folder, step)
      reports.append(
        f"checkpoint {step} is damaged: {problem}; moved to {aside}, using an older one"
      )
    self._manager.close()
    self._open()  # Also a barrier: all processes list the same checkpoints.
    with during(f"reading the checkpoint of step {newest.step}", self._say):
      return Restored(*self.restore(like, newest.step), newest.step, reports)

  def close(self) -> None:
    """Waits for the save under way.

    Raises:
      OSError: the last save failed, so that what came after the one before it is lost.
    """
    safe = self.wait()
    self._manager.close()
    if not safe:
      step, error = self._failed
      self._failed = None
      raise OSError(
        f"The last checkpoint, of step {step}, was not saved; the newest is of step "
        f"{self.latest()}. {REMEDY} Then give the same command again."
      ) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.close()
    except OSError as failed:
      if kind is None:
        raise
      self._say(f"WARNING: {failed}")


def _newest_state(run: str, quick: bool) -> tuple[epath.Path, int]:
  """Returns (folder of the state, step) of a run's newest good checkpoint; writes nothing."""
  folder = folder_of(run)
  newest = integrity.find_newest(folder, quick)
  if newest.step is None:
    raise FileNotFoundError(
      f"init_from={run!r}: no checkpoint in {folder}. Train that run first, or give the workdir of "
      "one that was trained."
    )
  for step, problem in newest.damaged.items():
    say(f"{folder}: checkpoint {step} is damaged: {problem}; using {newest.step}")
  return epath.Path(folder) / str(newest.step) / "state", newest.step


def _fields(path: epath.Path) -> dict:
  """Returns the tree of shapes of a saved state."""
  metadata = ocp.PyTreeCheckpointHandler().metadata(path)
  if metadata is None or not metadata.tree:
    raise ValueError(f"{path} holds no train state that can be read. Remove it, or restore it.")
  return metadata.tree


def param_shapes(workdir: str) -> dict:
  """Returns the parameters of a run's newest checkpoint as a tree of things with a `shape`.

  It reads no array and verifies the small files alone, unless they do not suffice.

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: all are damaged.
  """
  try:
    return _fields(_newest_state(workdir, quick=True)[0])[WEIGHTS["raw"]]
  except ValueError:  # Shapes are in small files, and now and then in a large one.
    return _fields(_newest_state(workdir, quick=False)[0])[WEIGHTS["raw"]]


def read_field(path: epath.Path, field: str) -> dict:
  """Returns one field of a saved state, e.g. "ema_params", as numpy arrays.

  Args:
    path: the folder "state" of a checkpoint.
    field: its name.

  Raises:
    ValueError: there is no such field.
  """
  fields = _fields(path)
  if field not in fields:
    raise ValueError(f"{path} holds no {field} that can be read. Name another step.")
  wanted = {field: fields[field]}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.restore(path, args=arguments)[field]


def load_params(workdir: str, weights: str = "ema") -> tuple[dict, int]:
  """Returns the parameters of another run's newest checkpoint as numpy arrays, and its step.

  Damaged checkpoints are reported and passed over; nothing is written to the run's folder.

  Args:
    workdir: the run's folder.
    weights: "ema" or "raw".

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: `weights` is neither, or all checkpoints are damaged.
  """
  if weights not in WEIGHTS:
    raise ValueError(f"init_weights={weights!r} is not one of {list(WEIGHTS)}.")
  with during(f"verifying the newest checkpoint of {workdir}"):
    path, step = _newest_state(workdir, quick=False)
  with during(f"reading {path}"):
    return read_field(path, WEIGHTS[weights]), step

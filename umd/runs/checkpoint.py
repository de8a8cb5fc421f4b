"""Checkpoints: the train state and where the data stood, written by orbax in the background.

None is ever wrong in silence. A save that was killed is not seen. Whatever became of a finished
one, its checksums tell: it is reported, and the one before it used.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
import contextlib
import math
import os
import sys
from collections.abc import Callable
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from umd.runs import integrity
from umd.runs import integrity
from umd.devices import mesh
from umd.runs import workdir as folders
from umd.runs.progress import during, say
from umd.state import TrainState


MODES = {"max": max, "min": min}


@dataclasses.dataclass(frozen=True)
class Retention:
  """The newest `keep`, every `keep_every`-th step, and the best by a metric.

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
    """Name of the metric that decides which one is best, "" for none."""
    return self.best.partition(":")[2]

  def best_step(self, steps: Sequence[int], metrics: Mapping[int, Mapping]) -> int | None:
    """The best of `steps`, the newest of equals; None where no metric is known and finite.

    Args:
      steps: of the checkpoints that there are.
      metrics: {step: {name: value}}, of those where some were measured.
    """
    known = {s: metrics.get(s, {}).get(self.metric, math.nan) for s in steps}
    finite = sorted((s for s in known if math.isfinite(known[s])), reverse=True)
    if not self.best or not finite:
      return None
    return MODES[self.best.partition(":")[0]](finite, key=known.get)

  def kept(self, steps: Sequence[int], metrics: Mapping[int, Mapping]) -> set[int]:
    """The steps to keep; arguments as in `best_step`."""
    newest = sorted(steps)[-self.keep :]
    regular = [s for s in steps if self.keep_every and s % self.keep_every == 0]
    return {*newest, *regular, self.best_step(steps, metrics)} - {None}

FOLDER = "checkpoints"
WEIGHTS = {"ema": "ema_params", "raw": "params"}
# In the background, for a whole save. Of several processes, one that cannot write is missed by the
# others for so long, once or twice.
TIMEOUT_SECONDS = 1200
REMEDY = (
  "Make room on the disk (a save needs as much as one checkpoint holds), or see that the bucket "
  "can be written."
)


def _folder(workdir: str) -> str:
  """Where the checkpoints are; orbax takes gs:// and absolute paths."""
  return os.path.join(workdir if folders.scheme(workdir) else os.path.abspath(workdir), FOLDER)


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [""])[0] or repr(error)


class Checkpoints:
  """The checkpoints of one run, newest last.

  A checkpoint becomes visible when it is complete, checksums and all: a killed save leaves a
  temporary folder that is never read. As a context, leaving it is `close()`; where an error is on
  its way already, a failed save is told and does not hide it.
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
      keep, keep_every, best: which are kept, see `umd.runs.checkpoint.Retention`.
      say: tells a line on process 0.
    """
    self._retention, self._say = Retention(keep, keep_every, best), say
    self._folder = _folder(workdir)
    self._saving: int | None = None  # Step of the save under way.
    self._failed: tuple[int, BaseException | None] | None = None  # The newest, if it failed.
    integrity.remove_temporary(self._folder)
    self._open()
    root, earlier = epath.Path(self._folder), self._manager.all_steps() if best else ()
    self._metrics = {step: integrity.read_metrics(root / str(step)) for step in earlier}

  def _open(self) -> None:
    options = ocp.CheckpointManagerOptions(
      # Of damaged checkpoints, not even the metadata can be read.
      lightweight_initialize=True,
      preservation_policy=self,
      async_options=ocp.options.AsyncOptions(
        timeout_secs=TIMEOUT_SECONDS, post_finalization_callback=self._before_commit
      ),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Orbax asks which of its checkpoints to keep."""
    steps = [one.step for one in checkpoints]
    kept = self._retention.kept(steps, self._metrics)
    return [step in kept for step in steps]

  def _before_commit(self) -> None:
    """On process 0, in the background: all is written, and nothing visible yet."""
    for path in ocp.path.step.all_temporary_paths(self._folder):
      if path.get_final().name == str(self._saving):
        integrity.write(path.get(), self._metrics[self._saving])
        return
    raise OSError(f"the temporary folder of step {self._saving} in {self._folder} is gone")

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, None if there is none; it may be damaged."""
    return self._manager.latest_step()

  def save(
    self, state: TrainState, step: int, data: dict, metrics: dict[str, float] | None = None
  ) -> None:
    """Saves in the background; returns when the arrays are copied off the devices.

    A save that fails is told, now if it fails at once, otherwise at the next one or at the end; the
    earlier checkpoints are as they were. What is saved already is not saved again.

    Args:
      state: what to save.
      step: its step.
      data: JSON-able description of the data stream's position.
      metrics: of this very step; one without the metric of `best` is never the best.
    """
    self.wait()
    if step in self._manager.all_steps():
      return
    metrics, name = {k: float(v) for k, v in (metrics or {}).items()}, self._retention.metric
    if name and jax.process_count() > 1:  # All must keep the same.
      metrics[name] = integrity.from_main(metrics.get(name, math.nan))
    metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    self._saving, self._metrics[step] = step, metrics
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:
      if jax.process_count() > 1:
        raise  # The others are waiting for this process: it must end for them to end.
      self._give_up(error)

  def wait(self) -> bool:
    """Waits for the save under way; whether the newest one is safe, the same in all processes.

    Of several processes, those that could write wait for one that could not for at most twice
    `TIMEOUT_SECONDS` from the beginning of the save.
    """
    if self._saving is None:
      return self._failed is None
    problem = None
    try:
      with during(f"finishing the checkpoint of step {self._saving}", self._say):
        self._manager.wait_until_finished()
    except Exception as error:  # A thread of orbax met it: of the disk, the bucket, a peer.
      problem = error
    if mesh.all_agree(problem is None):
      self._saving = self._failed = None
    else:
      self._give_up(problem)
    return self._failed is None

  def _give_up(self, error: BaseException | None) -> None:
    """After a failed save: tells it, makes room, and lists anew what there is."""
    self._failed, self._saving = (self._saving, error), None
    process, step = jax.process_index(), self._failed[0]
    reason = _first_line(error) if error else "another process failed, see its message"
    if process and error:
      print(f"process {process}: step {step} not saved: {reason}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # It was told already.
      self._manager.close()
    integrity.remove_temporary(self._folder)
    self._open()
    self._say(
      f"WARNING: the checkpoint of step {step} was NOT SAVED: {reason}. The run goes on; its "
      f"newest checkpoint is of step {self.latest()}; the next save tries again. {REMEDY}"
    )

  def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict]:
    """(state, data position) saved at `step`, with the shapes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
    )
    restored = self._manager.restore(step, args=items)
    return restored["state"], restored["data"]

  def restore_newest(self, like: TrainState) -> integrity.Restored | None:
    """The newest checkpoint that is as it was written; None if nothing was ever saved.

    Newer ones that are damaged are moved to checkpoints/damaged_<step>, for the run to save those
    steps again.

    Raises:
      ValueError: there are checkpoints, and all of them are damaged; they are left where they are.
    """
    with during("verifying the newest checkpoint", self._say):
      found = integrity.find_newest(self._folder)
    if found.step is None:
      return None
    reports = [f"checkpoint {found.step} {found.note}"] if found.note else []
    for step, text in found.damaged.items():
      aside = integrity.move_aside(self._folder, step)
      reports.append(f"checkpoint {step} is damaged: {text}; moved to {aside}, using an older one")
    self._manager.close()
    self._open()  # Also a barrier: all see the same checkpoints.
    with during(f"reading the checkpoint of step {found.step}", self._say):
      return integrity.Restored(*self.restore(like, found.step), found.step, reports)

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
        f"{self.latest()}. "
        f"{REMEDY} Then give the same command again."
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


def _newest(workdir: str, quick: bool) -> tuple[epath.Path, int]:
  """(folder of the state, step) of a run's newest good checkpoint; writes nothing."""
  folder = _folder(workdir)
  found = integrity.find_newest(folder, quick)
  if found.step is None:
    raise FileNotFoundError(
      f"init_from={workdir!r}: no checkpoint in {folder}. Train that run first, or give the "
      "workdir of one that was trained."
    )
  for step, text in found.damaged.items():
    say(f"{folder}: checkpoint {step} is damaged: {text}; using {found.step}")
  if found.note:
    say(f"{folder}: checkpoint {found.step} {found.note}")
  return epath.Path(folder) / str(found.step) / "state", found.step


def _tree(path: epath.Path) -> dict:
  """What a checkpoint says that it holds; TensorStore refuses names that lead out of its folder."""
  about = ocp.PyTreeCheckpointHandler().metadata(path)
  if about is None or not about.tree:
    raise ValueError(f"{path} holds no train state that can be read. Remove it, or bring it back.")
  return about.tree


def _field(weights: str) -> str:
  if weights not in WEIGHTS:
    raise ValueError(f"init_weights={weights!r} is not one of {list(WEIGHTS)}.")
  return WEIGHTS[weights]


def param_shapes(workdir: str) -> dict:
  """The parameters of a run's newest checkpoint as a tree of things with a `shape`; reads no array.

  Only the small files are verified, unless they do not suffice.

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: all are damaged.
  """
  try:
    return _tree(_newest(workdir, quick=True)[0])[WEIGHTS["raw"]]
  except ValueError:  # Shapes are in small files, and now and then in a large one.
    return _tree(_newest(workdir, quick=False)[0])[WEIGHTS["raw"]]


def load_params(workdir: str, weights: str = "ema") -> tuple[dict, int]:
  """Parameters of another run's newest checkpoint as numpy arrays, and its step.

  Damaged checkpoints are told and passed over; nothing is written to the run's folder.

  Args:
    workdir: the run's folder.
    weights: "ema" or "raw".

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: `weights` is neither, or all checkpoints are damaged.
  """
  field = _field(weights)
  with during(f"verifying the newest checkpoint of {workdir}"):
    path, step = _newest(workdir, quick=False)
  with during(f"reading {path}"), ocp.PyTreeCheckpointer() as checkpointer:
    wanted = {field: _tree(path)[field]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    state = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    return checkpointer.restore(path, args=state)[field], step

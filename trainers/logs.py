"""What trainers tell and write: lines on the terminal, the sinks of a run, metrics of steps."""

import fnmatch
import os
import time
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from trainers.config.records import given, to_dict
from umd import data
from umd.runs import workdir as folder
from umd.runs import writers
from umd.runs.progress import format_seconds, say


def make_writer(config, workdir: str, step: int, wandb_key: str | None) -> writers.Writer:
  """Opens all sinks of a run that goes on from `step` on process 0, and none on other processes."""
  if jax.process_index():
    return writers.Writer([])
  lines = writers.JsonLines(workdir, step)
  sinks = [lines, writers.PngFolder(workdir), writers.TensorBoard(workdir)]
  if config.wandb.mode != "disabled":
    name = os.path.basename(workdir.rstrip("/"))
    settings = {"name": name, **given(config.wandb)}
    sinks.append(writers.Wandb(workdir, to_dict(config), wandb_key, **settings))
  return writers.Writer(sinks, lines.earlier)


def printer(name: str) -> Callable[[str], None]:
  """Returns `say(text)`, which prints a line of the stage `name` on process 0 only."""
  return lambda text: say(f"[{name}] {text}")


def headline(patterns: Sequence[str], names: Collection[str]) -> list[str]:
  """Returns the names that patterns such as "generation/fid_*" choose, in the patterns' order."""
  return list(dict.fromkeys(n for p in patterns for n in fnmatch.filter(names, p)))


def shown(patterns: Sequence[str], values: dict, prefix: str = "") -> str:
  """Formats the numbers that the patterns choose; their names lose the prefix."""
  chosen = headline(patterns, values)
  return "  ".join(f"{k.removeprefix(prefix)} {values[k]:.4g}" for k in chosen)


def summarise(
  name: str, step: int, started: float, patterns: Sequence[str], writer: writers.Writer
) -> dict:
  """Returns what is kept of a run that ended at `step`: its newest numbers, and which to show."""
  return {
    "name": name,
    "step": step,
    "seconds": time.time() - started,
    "headline": headline(patterns, writer.latest),
    "metrics": writer.latest,
  }


# Metrics of the guard (`umd.state`): numbers of steps, which add up, and what is not logged.
COUNTS = ("skipped", "spikes")
INTERNAL = ("skipped_row",)


class StepMetrics:
  """Metrics of the steps since the last log, left on the devices until they are needed.

  To fetch a number is to wait for its step. A host that waited after every step could not hand the
  devices their next one in time, so everything is fetched at once when there is something to log.
  """

  def __init__(self, max_skipped: int = 1):
    """Starts with no step; `max_skipped` refused steps in a row end the run (`umd.state.Guard`).

    Where metrics have no "skipped", every step is applied.
    """
    self._max_skipped = max_skipped
    self._pending = []

  def add(self, step: int, values: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step, scalars on the devices."""
    self._pending.append((step, values))

  def fetch(self) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Returns (step, metrics) of each step since the last log, on the host."""
    return jax.device_get(self._pending)

  def to_json(self) -> list:
    """Returns what `from_json` reads, for a run that ends between two logs."""
    return [
      [step, {name: value.item() for name, value in values.items()}]
      for step, values in self.fetch()
    ]

  def from_json(self, steps: list) -> None:
    """Takes the steps that `to_json` kept, bit by bit: a float32 is exact as a JSON number."""
    as_array = lambda x: np.float32(x) if isinstance(x, float) else np.int32(x)
    for step, values in steps:
      self.add(step, {name: as_array(value) for name, value in values.items()})

  def drain(
    self,
    say: Callable[[str], None] = lambda text: None,
    inspect: Callable[[int], str] = lambda step: "",
  ) -> dict[str, float]:
    """Returns means over the applied steps ("lr": the last), and numbers of the others.

    If no step was applied, "skipped" and "spikes" are all that is returned.

    Args:
      say: prints which steps were not applied, and why.
      inspect: `inspect(step)` finds what is wrong in a step, before the run ends for it.

    Raises:
      FloatingPointError: `max_skipped` steps in a row were not applied, or a step that was applied
        is not finite. The message names the step and holds what `inspect` returns.
    """
    history = self.fetch()
    self._pending = []
    applied = []
    skipped = {}  # {reason: steps}
    for step, values in history:
      bad = ", ".join(k for k, v in values.items() if not np.isfinite(v))
      reason = f"{bad} not finite" if bad else f"loss {values['loss']:.4g}, a spike"
      problem = ""
      if not values.get("skipped", 0):
        applied.append(values)
        if bad:
          problem = f"{reason}. Parameters are lost from this step on."
      elif values["skipped_row"] >= self._max_skipped:
        row = f"{values['skipped_row']:.0f} steps in a row were not applied"
        problem = f"{reason}; {row}. Parameters are as they were before."
      else:
        skipped.setdefault(reason, []).append(step)
      if problem:
        raise FloatingPointError(
          f"Step {step}: {problem} {inspect(step)}\nThe last checkpoint is from before. Lower "
          "optim.lr or optim.clip_norm (of a linear probe: lrs), or look at the data; of spikes, "
          "raise guard.spike_sigma."
        )
    for reason, steps in skipped.items():
      say(f"not applied: step {', '.join(map(str, steps))}: {reason}")
    means = {}
    if applied:
      names = [k for k in applied[0] if k not in (*COUNTS, *INTERNAL)]
      means = {k: float(np.mean([values[k] for values in applied])) for k in names}
      means["lr"] = float(applied[-1]["lr"])
    for name in COUNTS:
      if history and name in history[0][1]:
        means[name] = int(sum(values[name] for _, values in history))
    return means


INPUT_WAIT = "input_wait"  # The share of the time since the last log, see `umd.runs.goodput`.
SLOW_INPUT = 0.05  # From this share on the line of a step mentions it.


def log(
  step: int,
  steps: int,
  values: dict[str, float],
  pace: dict[str, float],
  shares: dict[str, float],
  writer: writers.Writer,
  say: Callable[[str], None],
) -> None:
  """Writes what is known at `step` of `steps`, and prints a line: loss, speed, remaining time.

  Args:
    step: the number of the step.
    steps: the last step.
    values: what `StepMetrics.drain` returned.
    pace: what `writers.Progress.tick` returned.
    shares: of the wall time, by what it was spent on.
    writer: takes everything but the remaining time.
    say: prints the line.
  """
  rates = {name: value for name, value in pace.items() if name != "eta_seconds"}
  writer.write(step, {**values, **rates, **shares})
  loss = f"{values['loss']:.4f}" if "loss" in values else "of no step"
  line = f"step {step}/{steps}  loss {loss}  {pace['images_per_second']:.0f} images/s"
  if "mfu" in pace:
    line += f"  mfu {100 * pace['mfu']:.1f} %"
  line += f"  ETA {format_seconds(pace['eta_seconds'])}"
  if shares[INPUT_WAIT] >= SLOW_INPUT:
    line += f"  waited for input {shares[INPUT_WAIT]:.0%} of the time"
  say(line)


def list_bad_data(source: data.Source, workdir: str) -> None:
  """Lists the examples that could not be read in bad_data.txt; each process has a file.

  Those of earlier starts stay in the list.
  """
  if not source.bad:
    return
  process = f"{jax.process_index()}_" if jax.process_count() > 1 else ""
  path = os.path.join(workdir, f"{process}bad_data.txt")
  old = (folder.read_bytes(path) or b"").decode(errors="replace").splitlines()
  lines = sorted({*old, *source.bad_report().splitlines()})
  if lines != old:
    folder.write_bytes(path, "".join(f"{x}\n" for x in lines).encode(errors="backslashreplace"))

"""What trainers write: the sinks of a run, and step metrics that wait on the device."""

import fnmatch
import os
import time
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from umd.runs import writers
from umd.runs.progress import format_seconds, say


def make_writer(config: ConfigDict, workdir: str, step: int, wandb_key: str | None):
  """All sinks on process 0, none elsewhere."""
  if jax.process_index():
    return writers.Writer([])
  lines = writers.JsonLines(workdir, step)
  sinks = [lines, writers.PngFolder(workdir), writers.TensorBoard(workdir)]
  if config.wandb.mode != "disabled":
    name = os.path.basename(workdir.rstrip("/"))
    settings = {"name": name, **config.wandb.to_dict()}
    sinks.append(writers.Wandb(workdir, config.to_dict(), wandb_key, **settings))
  return writers.Writer(sinks, lines.earlier)


def printer(name: str):
  """`say(text)`: prints a line of the stage `name`, on process 0 only."""
  return lambda text: say(f"[{name}] {text}")


def headline(patterns: Sequence[str], names: Collection[str]) -> list[str]:
  """The names that patterns such as "generation/fid_*" choose, in the order of the patterns."""
  return list(dict.fromkeys(n for p in patterns for n in fnmatch.filter(names, p)))


def shown(patterns: Sequence[str], values: dict, prefix: str = "") -> str:
  """The numbers of `values` that the patterns choose, as text; their names without the prefix."""
  chosen = headline(patterns, values)
  return "  ".join(f"{k.removeprefix(prefix)} {values[k]:.4g}" for k in chosen)


def summarise(name: str, step: int, started: float, patterns: Sequence[str], writer) -> dict:
  """What is left of a run that ended at `step`: its newest numbers, and which of them to show."""
  return {
    "name": name,
    "step": step,
    "seconds": time.time() - started,
    "headline": headline(patterns, writer.latest),
    "metrics": writer.latest,
  }


INPUT_WAIT = "input_wait"  # Share of the time since the last log, see `umd.runs.goodput`.
SLOW_INPUT = 0.05  # From there on it is told.

# Metrics of the guard (`umd.state`): numbers of steps, and what is not logged.
COUNTS, INTERNAL = ("skipped", "spikes"), ("skipped_row",)


class StepMetrics:
  """Metrics of the steps since the last log, left on the device until they are needed."""

  def __init__(self, max_skipped: int = 1, inspect: Callable[[int], str] = lambda step: ""):
    """Starts with no step pending.

    Args:
      max_skipped: steps in a row that are not applied and end the run, as the guard was told.
        (Where metrics have no "skipped", every step is applied.)
      inspect: `inspect(step)`, called before the run ends, says what is wrong in that step.
    """
    self._pending = []
    self._max_skipped, self._inspect = max_skipped, inspect

  def add(self, step: int, values: dict[str, jax.Array]) -> None:
    self._pending.append((step, values))

  def drain(self, say: Callable[[str], None] | None = None) -> dict[str, float]:
    """Means over the pending steps that were applied (of "lr": the last); numbers of others.

    If no step was applied, "skipped" and "spikes" are all that is returned.

    Args:
      say: is told which steps were not applied, and why.

    Raises:
      FloatingPointError: `max_skipped` steps in a row were not applied, or a step that was applied
        is not finite; names the step, and says what `inspect` says of it.
    """
    steps = [step for step, _ in self._pending]
    fetched = jax.device_get([values for _, values in self._pending])
    self._pending = []
    applied, reasons = [], {}
    for step, values in zip(steps, fetched, strict=True):
      bad = ", ".join(k for k, v in values.items() if not np.isfinite(v))
      reason = f"{bad} not finite" if bad else f"loss {values['loss']:.4g}, a spike"
      if not values.get("skipped", 0):
        applied.append(values)
        if bad:
          self._stop(step, f"{reason}. Parameters are lost from this step on.")
      elif values["skipped_row"] >= self._max_skipped:
        row = f"{int(values['skipped_row'])} steps in a row were not applied"
        self._stop(step, f"{reason}; {row}. Parameters are as they were before.")
      else:
        reasons.setdefault(reason, []).append(step)
    for reason, skipped in reasons.items() if say else ():
      say(f"not applied: step {', '.join(map(str, skipped))}: {reason}")
    names = [k for k in (applied[0] if applied else ()) if k not in (*COUNTS, *INTERNAL)]
    means = {k: float(np.mean([v[k] for v in applied])) for k in names}
    means |= {"lr": float(applied[-1]["lr"])} if applied else {}
    return means | {
      k: int(sum(v[k] for v in fetched)) for k in COUNTS if fetched and k in fetched[0]
    }

  def _stop(self, step: int, what: str) -> None:
    raise FloatingPointError(
      f"Step {step}: {what} {self._inspect(step)}\nThe last checkpoint is from before. Lower "
      "optim.lr or optim.clip_norm (of a linear probe: lrs), or look at the data; of spikes, raise "
      "guard.spike_sigma."
    )


def log(step, steps, pending: StepMetrics, progress, writer, say, shares: dict) -> None:
  """Writes what is pending, the pace and the shares of time; tells loss and remaining time.

  Input that holds the loop up is told too.
  """
  values, pace = pending.drain(say), progress.tick(step)
  eta = pace.pop("eta_seconds")
  writer.write(step, {**values, **pace, **shares})
  mfu = f"  mfu {100 * pace['mfu']:.1f} %" if "mfu" in pace else ""
  loss = f"{values['loss']:.4f}" if "loss" in values else "of no step"
  waited = shares[INPUT_WAIT]
  note = f"  waited for input {waited:.0%} of the time" if waited >= SLOW_INPUT else ""
  say(
    f"step {step}/{steps}  loss {loss}  "
    f"{pace['images_per_second']:.0f} images/s{mfu}  ETA {format_seconds(eta)}{note}"
  )

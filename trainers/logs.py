"""What trainers write: the sinks of a run, and step metrics that wait on the device."""

import fnmatch
import os
import time
from collections.abc import Collection, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from umd import metrics
from umd.progress import format_seconds


def make_writer(config: ConfigDict, workdir: str, step: int, wandb_key: str | None):
  """All sinks on process 0, none elsewhere."""
  if jax.process_index():
    return metrics.Writer([])
  lines = metrics.JsonLines(workdir, step)
  sinks = [lines, metrics.PngFolder(workdir), metrics.TensorBoard(workdir)]
  if config.wandb.mode != "disabled":
    name = os.path.basename(workdir.rstrip("/"))
    settings = {"name": name, **config.wandb.to_dict()}
    sinks.append(metrics.Wandb(workdir, config.to_dict(), wandb_key, **settings))
  return metrics.Writer(sinks, lines.earlier)


def printer(name: str):
  """`say(text)`: prints a line of the stage `name`, on process 0 only."""
  is_main = jax.process_index() == 0
  return lambda text: print(f"[{name}] {text}", flush=True) if is_main else None


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


class StepMetrics:
  """Metrics of the steps since the last log, left on the device until they are needed."""

  def __init__(self):
    self._pending = []

  def add(self, step: int, values: dict[str, jax.Array]) -> None:
    self._pending.append((step, values))

  def drain(self) -> dict[str, float]:
    """Means over the pending steps (of "lr": the last).

    Raises:
      FloatingPointError: the loss or the gradient of a step was not finite; names the first.
    """
    steps = [step for step, _ in self._pending]
    fetched = jax.device_get([values for _, values in self._pending])
    self._pending = []
    for step, values in zip(steps, fetched, strict=True):
      bad = [k for k, v in values.items() if not np.isfinite(v)]
      if bad:
        raise FloatingPointError(
          f"Step {step}: {', '.join(bad)} not finite. Parameters are lost from this step on; the "
          "last checkpoint is from before. Lower optim.lr or optim.clip_norm (of a linear probe: "
          "lrs), or look at the data."
        )
    means = {k: float(np.mean([v[k] for v in fetched])) for k in (fetched[0] if fetched else ())}
    return {**means, "lr": float(fetched[-1]["lr"])} if fetched else {}


def log(step: int, steps: int, pending: StepMetrics, progress, writer, say) -> None:
  """Writes what is pending, and the pace; tells the loss and the remaining time."""
  values, pace = pending.drain(), progress.tick(step)
  writer.write(step, {**values, "images_per_second": pace["images_per_second"]})
  say(
    f"step {step}/{steps}  loss {values['loss']:.4f}  "
    f"{pace['images_per_second']:.0f} images/s  ETA {format_seconds(pace['eta_seconds'])}"
  )

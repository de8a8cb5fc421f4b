"""What a run that ends between two steps leaves to its next start: nothing is lost or doubled."""

import os
from collections.abc import Callable, Mapping

import jax
import numpy as np

from trainers import logs
from umd import metrics, preemption, sharding


def describe(pending: logs.StepMetrics, left: list[str]) -> dict:
  """JSON-able: the metrics of the steps since the last log, and the evaluators not yet run.

  Fetches the metrics from the devices.
  """
  steps = [step for step, _ in pending._pending]
  fetched = jax.device_get([values for _, values in pending._pending])
  return {
    "unlogged": [
      [step, {name: np.asarray(value).item() for name, value in values.items()}]
      for step, values in zip(steps, fetched, strict=True)
    ],
    "unevaluated": left,
  }


def restore(interrupted: Mapping, pending: logs.StepMetrics) -> None:
  """Puts the metrics that `describe` kept back, bit by bit: a float32 is exact as a JSON number."""
  for step, values in interrupted.get("unlogged", []):
    kind = lambda value: np.float32 if isinstance(value, float) else np.int32
    pending.add(step, {name: kind(value)(value) for name, value in values.items()})


def unevaluated(interrupted: Mapping, workdir: str, step: int) -> list[str]:
  """The evaluators that are yet to be run at `step`, the same in all processes.

  Those that an earlier start ran before it was killed are in the log.
  """
  names = interrupted.get("unevaluated", [])
  if not names:
    return []
  path = os.path.join(workdir, "metrics.jsonl")
  records = metrics.read_jsonl(path) if jax.process_index() == 0 else []
  logged = {k.split("/")[0] for r in records if r["step"] == step for k in r}
  (done,) = next(sharding.each_process([np.float32([name in logged for name in names])]))
  return [name for name, ran in zip(names, done, strict=True) if not ran]


def ended(step: int, steps: int, saves: bool, say: Callable[[str], None]) -> preemption.Preempted:
  """Tells that a run was stopped; the exception to raise."""
  kept = "saved; the same command goes on" if saves else "nothing saved: checkpoint.every=0"
  say(f"stopped at step {step}/{steps} by {preemption.reason()}, {kept}")
  return preemption.preempted()

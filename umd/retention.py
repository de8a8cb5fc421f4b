"""Which checkpoints of a run are kept."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

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

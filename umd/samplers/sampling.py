"""How images are drawn from noise, as one record.

Configs, evaluators, the command line, exported models, the demo and the API all mean these fields.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from umd.samplers.solvers import SOLVERS
from umd.samplers.timesteps import SPACINGS


def _setting(default, help: str, within: str | tuple[str, ...] | None = None):
  """A field with its meaning and with the values that it may have: an interval, or a choice."""
  return dataclasses.field(default=default, metadata={"help": help, "within": within})


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of sampling; the metadata of each field hold its "help" and what it is "within".

  Raises:
    ValueError: a value makes no sense, whatever the model and its path.
  """

  sampler: str = _setting(
    "ddim", "The solver; dpmpp_2m needs the fewest steps, see docs/sampling.md.", tuple(SOLVERS)
  )
  steps: int = _setting(125, "Number of steps from noise to images.", "[1, inf)")
  spacing: str = _setting(
    "uniform",
    "Places of the steps: even in time, or denser where it is clean.",
    tuple(SPACINGS),
  )
  eta: float = _setting(0.0, "Noise that ddim adds: 0 is deterministic, 1 ancestral.", "[0, 1]")
  head: str = _setting("eps", "The head of the network that the sampler reads: eps, x0 or v.")
  cfg_scale: float = _setting(1.0, "Scale of classifier-free guidance; 1 is none.", "[0, inf)")
  cfg_channels: int = _setting(
    0, "Number of channels that are guided, counted from the first; 0 guides all.", "[0, inf)"
  )
  guidance_interval: tuple[float, float] = _setting(
    (0.0, 1.0), "Guide between these shares of the path only; (0, 1) guides everywhere.", "[0, 1]"
  )
  clip_x0: bool = _setting(
    True, "Keep x0 in [-1, 1] at every step. Latents have no such bounds and are never clipped."
  )

  def __post_init__(self):
    for name, choices in (("sampler", SOLVERS), ("spacing", SPACINGS)):
      if getattr(self, name) not in choices:
        raise ValueError(f"{name}={getattr(self, name)!r} is not one of {list(choices)}.")
    if self.steps < 1:
      raise ValueError(f"steps={self.steps} must be at least 1.")
    if not 0 <= self.eta <= 1:
      raise ValueError(f"eta={self.eta} must be in [0, 1]: 0 is deterministic, 1 ancestral.")
    if self.eta and "eta" not in SOLVERS[self.sampler].options:
      takers = [name for name, solver in SOLVERS.items() if "eta" in solver.options]
      raise ValueError(f"eta={self.eta}: sampler={self.sampler!r} takes no eta, only {takers} do.")
    if not self.cfg_scale >= 0:
      raise ValueError(f"cfg_scale={self.cfg_scale} must be in [0, inf); 1 is no guidance.")
    low, high = self.guidance_interval
    if not 0 <= low < high <= 1:
      raise ValueError(
        f"guidance_interval={(low, high)} must be (low, high) with 0 <= low < high <= 1, shares of "
        "the path; (0, 1) guides everywhere."
      )

  def updated(self, given: Mapping[str, Any]) -> "Sampling":
    """Replaces settings by those given that are not None.

    Another sampler does not inherit the options of this one, such as eta.

    Raises:
      ValueError: there is no such setting, or a value makes no sense.
    """
    known = [field.name for field in dataclasses.fields(self)]
    for name in given:
      if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown setting of sampling {name!r}.{hint} Known: {known}.")
    given = {name: value for name, value in given.items() if value is not None}
    if "guidance_interval" in given:  # JSON has no tuples, and the record must be hashable.
      given["guidance_interval"] = tuple(given["guidance_interval"])
    if given.get("sampler", self.sampler) != self.sampler:
      given = {name: getattr(DEFAULT, name) for name in SOLVERS[self.sampler].options} | given
    return dataclasses.replace(self, **given)


DEFAULT = Sampling()

"""Evaluators look at a train state and yield pairs of a name and a number, a word or a picture.

An evaluator is a module of this folder with two classes. `Settings` is a frozen dataclass that says
what a config may set, with type, default, range and meaning. `Evaluator(context, settings)` is
built at start, so that mistakes show before anything is trained. Calling it with a `TrainState`
yields `(name, float | str | Images)`, and a writer decides by the type where a value goes.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping

from evaluators.context import Context

__all__ = ["Context", "Scheduled", "from_config", "known", "settings_of"]


@dataclasses.dataclass(frozen=True)
class Scheduled:
  """An evaluator, which runs every `every` steps (0: never on the way) and after the last step."""

  name: str
  every: int
  evaluator: Callable

  def due(self, step: int, steps: int) -> bool:
    return step == steps or (self.every > 0 and step % self.every == 0)


def known() -> list[str]:
  """Lists the modules of this folder that are evaluators."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "context")


def settings_of(kind: str) -> type:
  """Returns the dataclass of what a config may set of an evaluator, one of `known()`."""
  return importlib.import_module(f"evaluators.{kind}").Settings


def from_config(configs: Mapping[str, Mapping], context: Context) -> list[Scheduled]:
  """Builds the evaluators of a config's `evals`.

  Args:
    configs: {name: {type, every, **settings}}; `name` prefixes the metrics, `type` is the module.
    context: what all of them share.

  Raises:
    ValueError: a type or a setting makes no sense.
    FileNotFoundError: data are not there.
  """
  scheduled = []
  for name, config in configs.items():
    settings = dict(config)
    kind = settings.pop("type")
    every = settings.pop("every")
    if kind not in known():
      raise ValueError(f"evals.{name}.type={kind!r} is not one of {known()}.")
    make = importlib.import_module(f"evaluators.{kind}").Evaluator
    try:
      evaluator = make(context, settings_of(kind)(**settings))
    except (ValueError, FileNotFoundError) as error:
      raise type(error)(f"evals.{name}: {error}") from error
    scheduled.append(Scheduled(name, every, evaluator))
  return scheduled

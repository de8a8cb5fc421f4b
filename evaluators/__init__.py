"""Evaluators: each looks at a train state and yields (name, number or picture) pairs.

An evaluator is a module here with a class `Evaluator(context, **settings)`; calling it with a
`TrainState` yields `(name, float | str | Images)`.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping

from evaluators.context import Context

__all__ = ["Context", "Scheduled", "from_config"]


@dataclasses.dataclass(frozen=True)
class Scheduled:
  """An evaluator and when it runs: every `every` steps (0: never on the way) and after the last."""

  name: str
  every: int
  evaluator: Callable

  def due(self, step: int, steps: int) -> bool:
    return step == steps or (self.every > 0 and step % self.every == 0)


def known() -> list[str]:
  """Names of the modules that hold an evaluator."""
  not_evaluators = {"context", "classifier", "judges", "knn", "ridge"}
  return sorted({m.name for m in pkgutil.iter_modules(__path__)} - not_evaluators)


def _check_settings(name: str, settings: Mapping, make: Callable) -> None:
  """Raises ValueError for settings that `make` does not take, and for missing ones."""
  parameters = dict(inspect.signature(make).parameters)
  parameters.pop("context")
  missing = {k for k, p in parameters.items() if p.default is p.empty} - settings.keys()
  unknown = settings.keys() - parameters.keys()
  if unknown or missing:
    raise ValueError(
      f"evals.{name}: unknown settings {sorted(unknown)}, missing settings {sorted(missing)}. "
      f"This evaluator takes {sorted(parameters)}."
    )


def from_config(configs: Mapping[str, Mapping], context: Context) -> list[Scheduled]:
  """Builds the evaluators of a config's `evals`.

  Args:
    configs: {name: {type, every, **settings}}; `name` prefixes the metrics, `type` is the module.
    context: shared by all.

  Raises:
    ValueError: a type, an interval or a setting that does not exist; names the known ones.
    FileNotFoundError: data that is not there.
  """
  scheduled = []
  for name, config in configs.items():
    settings = dict(config)
    kind, every = settings.pop("type", None), settings.pop("every", None)
    if kind not in known():
      raise ValueError(f"evals.{name}.type={kind!r} is not one of {known()}.")
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
      raise ValueError(
        f"evals.{name}.every={every!r} must be a number of steps, or 0 for only after the last."
      )
    make = importlib.import_module(f"evaluators.{kind}").Evaluator
    _check_settings(name, settings, make)
    try:
      scheduled.append(Scheduled(name, every, make(context, **settings)))
    except (ValueError, FileNotFoundError) as error:
      raise type(error)(f"evals.{name}: {error}") from error
  return scheduled

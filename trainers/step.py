"""The step of a run, made from its config, and what to do when its numbers are not finite."""

import functools

from ml_collections import ConfigDict

from trainers import nonfinite
from trainers.loop import train_batches
from umd.codec import encode_batch
from umd.guard import Guard
from umd.state import Step, TrainState, make_train_step


def make_step(config: ConfigDict, parts, state: TrainState) -> Step:
  """The compiled step of a trainer's parts, for states of the shapes and places of `state`."""
  return make_train_step(
    parts.objective,
    parts.tx,
    parts.schedule,
    ema_decay=config.ema_decay,
    seed=config.seed,
    state=state,
    guard=Guard(**config.guard.to_dict()),
    accumulate=config.accumulate,
    encode=functools.partial(encode_batch, parts.codec),
    frozen=parts.codec.params,
  )


class Training:
  """`training(state, batch) -> (state, metrics)`, which remembers the state for `inspect`."""

  def __init__(self, config: ConfigDict, parts, state: TrainState, workdir: str):
    self._config, self._parts, self._workdir = config, parts, workdir
    self._step, self._newest = make_step(config, parts, state), state

  def __call__(self, state: TrainState, batch) -> tuple[TrainState, dict]:
    self._newest, values = self._step(state, batch)
    return self._newest, values

  def inspect(self, number: int) -> str:
    """Looks into step `number`, which was not finite; see `trainers.nonfinite.inspect`."""
    parts, seed = self._parts, self._config.seed
    batches_from = lambda n: train_batches(parts.source, self._config.batch_size, seed, n)
    return nonfinite.inspect(parts, batches_from, self._newest.params, number, seed, self._workdir)

"""The state of training, and the step from one state to the next.

A step draws what is random, computes the loss L and its gradient g at the parameters p, and then,
if the guard finds the numbers sound,

  p   <-  p + AdamW(g)
  e   <-  d e + (1 - d) p,    d = min(ema_decay, (1 + n) / (10 + n)),    n steps applied before.

e is the average that is evaluated and sampled: it has less of the noise of single steps than p. The
ramp of d forgets the random initialisation in runs that are shorter than the average's memory.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from umd.devices.mesh import (
  batch_sharding,
  by_batch,
  chunks_of_rows,
  gathered_at_once,
  on,
  placed,
  replicated,
  state_shardings,
)
from umd.runs import progress


@flax.struct.dataclass
class GuardState:
  """What the guard remembers from step to step, as scalars on the devices.

  Attributes:
    row: int32, the number of steps in a row, up to the last, that were not applied.
    total: int32, the number of steps of the run that were not applied.
    seen: int32, the number of losses behind `mean` and `var`.
    mean, var: float32, running mean and variance of the losses of applied steps.
  """

  row: jax.Array
  total: jax.Array
  seen: jax.Array
  mean: jax.Array
  var: jax.Array


def init_guard() -> GuardState:
  """Returns the state before the first step."""
  # Every leaf is made afresh: a step overwrites them all, so they must not share a buffer.
  count = lambda: jnp.zeros((), jnp.int32)
  value = lambda: jnp.zeros((), jnp.float32)
  return GuardState(count(), count(), count(), value(), value())


@dataclasses.dataclass(frozen=True)
class Guard:
  """Decides inside the jitted step whether its update is applied.

  An update is refused if the loss or the norm of the gradient is not finite, or if the loss is a
  spike: more than `spike_sigma` standard deviations above the mean of the losses before it. After
  `max_skipped` refusals in a row everything is refused, so that the state stays as it was before
  the row until the trainer reads the metrics and stops.

  Attributes:
    max_skipped: the number of refused steps in a row that stops the run, at least 1.
    spike_sigma: standard deviations; 0 applies spikes like all other steps.
    spike_window: steps. The first so many losses have plain mean and variance and are never
      spikes; from then on mean and variance forget at the rate of 1 / spike_window a step.
  """

  max_skipped: int = 10
  spike_sigma: float = 0.0
  spike_window: int = 100

  def __post_init__(self):
    if self.max_skipped < 1:
      raise ValueError(f"guard.max_skipped={self.max_skipped} must be at least 1 step.")
    if not 0 <= self.spike_sigma < math.inf:
      raise ValueError(
        f"guard.spike_sigma={self.spike_sigma} must be 0 (off) or a number of standard deviations."
      )
    if self.spike_window < 2:
      raise ValueError(f"guard.spike_window={self.spike_window} must be at least 2 losses.")

  def judge(
    self, state: GuardState, loss: jax.Array, grad_norm: jax.Array
  ) -> tuple[jax.Array, GuardState, dict[str, jax.Array]]:
    """Returns (whether to apply the step, the guard's next state, metrics), all scalars.

    The metrics are "skipped" (1 if the step is not applied), "skipped_row" (`GuardState.row`) and,
    where spikes are looked for, "spikes" (1 if the loss is one).
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike = jnp.zeros((), bool)
    if self.spike_sigma:
      limit = state.mean + self.spike_sigma * jnp.sqrt(state.var)
      spike = finite & (state.seen >= self.spike_window) & (loss > limit)
    applied = finite & ~spike & (state.row < self.max_skipped)
    skipped = 1 - applied.astype(jnp.int32)
    new = state.replace(row=(state.row + 1) * skipped, total=state.total + skipped)
    metrics = {"skipped": skipped, "skipped_row": new.row}
    if self.spike_sigma:
      # The running mean and variance take in the losses of applied steps (Welford 1962).
      seen = jnp.minimum(state.seen + 1, self.spike_window)
      delta = loss - state.mean
      share = 1.0 / seen
      mean = state.mean + share * delta
      var = (1.0 - share) * (state.var + share * jnp.square(delta))
      new = choose(applied, new.replace(seen=seen, mean=mean, var=var), new)
      metrics["spikes"] = spike.astype(int)
    return applied, new, metrics


def choose(condition: jax.Array, new, old):
  """Returns the tree `new` if the condition holds, else `old`, leaf by leaf.

  XLA fuses the select into the update that makes `new` and reads `old` anyway, so it takes no
  memory of its own; a branch would keep both trees.
  """
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


@flax.struct.dataclass
class TrainState:
  """All that changes while training; a checkpoint holds this and nothing else.

  Attributes:
    step: int32 scalar, the number of steps done, applied or not.
    params: the parameters.
    ema_params: their exponential moving average, which is evaluated and sampled.
    opt_state: the optimiser's moments and counters.
    guard: which steps were not applied; () where nothing is trained.
  """

  step: jax.Array
  params: dict
  ema_params: dict
  opt_state: optax.OptState
  guard: GuardState | tuple[()] = ()


class Loss(Protocol):
  """What is minimised, in two parts: all that is random is drawn before anything is computed.

  `draw(batch, key)` makes trees of [B, ...], and `objective(params, drawn)` their mean loss over
  the rows, and its terms by name.
  """

  def draw(self, batch: Mapping, key: jax.Array): ...

  def __call__(self, params, drawn) -> tuple[jax.Array, Mapping[str, jax.Array]]: ...


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
  """Returns the key of step 0, 1, ...: randomness is a function of (seed, step).

  Nothing random is carried from step to step, so a resumed run draws what the whole run would.
  """
  return jax.random.fold_in(jax.random.key(seed), step)


def ema_decay_at(step: jax.Array, ema_decay: float) -> jax.Array:
  """Returns d of step 0, 1, ...: min(ema_decay, (1 + step) / (10 + step))."""
  return jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))


def _fresh_state(init: Callable, tx: optax.GradientTransformation, key) -> TrainState:
  params = init(key)
  # The average starts as a copy: two leaves that a step overwrites must not share a buffer.
  average = jax.tree.map(jnp.copy, params)
  return TrainState(jnp.zeros((), jnp.int32), params, average, tx.init(params), init_guard())


def state_shapes(
  init: Callable, tx: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
  """Returns shapes and types of a fresh state, and on a mesh also where its leaves are placed."""
  shapes = jax.eval_shape(lambda key: _fresh_state(init, tx, key), jax.random.key(0))
  return shapes if mesh is None else placed(shapes, state_shardings(shapes, mesh))


def init_state(init: Callable, tx: optax.GradientTransformation, key, mesh: Mesh) -> TrainState:
  """Returns a fresh state; `init(key)` makes parameters, which the mesh's axis "fsdp" splits."""
  with progress.during("compiling the initial state"):
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes(init, tx, mesh))
    return jax.jit(lambda key: _fresh_state(init, tx, key), out_shardings=shardings)(key)


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step, together with the parameters that it reads and does not train."""

  compiled: Callable
  frozen: Any

  def __call__(self, state: TrainState, batch) -> tuple[TrainState, dict]:
    return self.compiled(state, batch, self.frozen)

  def lower(self, state: TrainState, batch):
    """Lowers the step for states and batches of these shapes and places."""
    return self.compiled.lower(state, batch, self.frozen)


def make_gradient(objective: Loss, accumulate: int, devices: int) -> Callable:
  """Builds `gradient(params, drawn) -> ((loss, terms), gradient)`, a mean over micro-batches.

  What is random is drawn for the whole batch, so the number of micro-batches changes numbers by
  their rounding only. Each device takes its share of each micro-batch from its own rows.
  """
  gradient = jax.value_and_grad(objective, has_aux=True)
  if accumulate == 1:
    return gradient

  def mean(params, drawn):
    chunks = chunks_of_rows(drawn, accumulate, devices)
    first = jax.tree.map(lambda x: x[0], chunks)
    shapes = jax.eval_shape(gradient, params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, rows):
      # Inside the loop the partitioner needs to be told anew that rows are split over devices.
      return jax.tree.map(jnp.add, total, gradient(params, by_batch(rows))), None

    total, _ = jax.lax.scan(add, zeros, chunks)
    return jax.tree.map(lambda x: x / accumulate, total)

  return mean


def make_train_step(
  objective: Loss,
  tx: optax.GradientTransformation,
  schedule: Callable,
  *,
  ema_decay: float,
  seed: int,
  state: TrainState,
  guard: Guard = Guard(),
  accumulate: int = 1,
  encode: Callable | None = None,
  frozen=(),
) -> Step:
  """Builds the jitted `step(state, batch) -> (state, metrics)`.

  Metrics are scalars that stay on the devices: "loss", "loss/<stream>/<term>", "lr", "grad_norm"
  (before clipping), "param_norm", and those of the guard. A refused step leaves parameters, average
  and optimiser as they are, to the bit; the next one has the next batch and draws anew.

  Args:
    objective: what is minimised.
    tx: the optimiser.
    schedule: the learning rate by applied step, for the metrics alone; `tx` has its own.
    ema_decay: the largest decay of the average.
    seed: of everything random.
    state: arrays, or shapes, that are placed as the states of the run will be.
    guard: decides which steps are applied.
    accumulate: the number of micro-batches, which are computed one after the other to save memory.
    encode: `encode(frozen, batch, key)` makes what the objective is given of a batch as read.
    frozen: parameters that `encode` reads and nothing trains, whole on every device.
  """
  places = jax.tree.map(lambda x: x.sharding, state)
  mesh = places.step.mesh
  # Where parameters are kept in parts ("fsdp"), those outside of layers are gathered here. Layers
  # gather their own, so that never more than one layer is whole beside its parts.
  whole = lambda params, drawn: objective(gathered_at_once(params), drawn)
  gradient = make_gradient(whole, accumulate, mesh.size)

  def step(state: TrainState, batch, frozen):
    key = step_key(seed, state.step)
    if encode:
      batch = encode(frozen, batch, key)
    with on(mesh):
      # Each device draws for and computes on its own rows. Left to itself, the partitioner may
      # split activations by width, or gather the batch, at several times the cost.
      drawn = by_batch(objective.draw(batch, key))
      (loss, terms), grads = gradient(state.params, drawn)
    # The sum over devices leaves each with the part of the gradient whose parameters it keeps.
    grads = jax.lax.with_sharding_constraint(grads, places.params)
    grad_norm = optax.tree.norm(grads)
    applied, guard_state, verdict = guard.judge(state.guard, loss, grad_norm)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = choose(applied, (params, opt_state), (state.params, state.opt_state))

    # Ramp and learning rate follow the applied steps, as the optimiser's own counters do.
    count = state.step - state.guard.total
    decay = ema_decay_at(count, ema_decay)
    average = optax.incremental_update(params, state.ema_params, 1.0 - decay)
    average = choose(applied, average, state.ema_params)

    metrics = {
      "loss": loss,
      **{f"loss/{name}": value for name, value in terms.items()},
      "lr": schedule(count),
      "param_norm": optax.tree.norm(params),
      "grad_norm": grad_norm,
      **verdict,
    }
    return TrainState(state.step + 1, params, average, opt_state, guard_state), metrics

  everywhere = replicated(mesh)
  compiled = jax.jit(
    step,
    in_shardings=(places, batch_sharding(mesh), everywhere),
    out_shardings=(places, everywhere),
    # The new state overwrites the old one in memory, so that there is only ever one.
    donate_argnums=0,
  )
  return Step(compiled, frozen)

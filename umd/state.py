"""The state of training, and the step from one state to the next."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from umd.devices.mesh import batch_sharding, replicated, state_shardings
from umd.devices.placement import by_batch, chunks_of_rows, gathered_at_once, on
from umd.runs import progress


@flax.struct.dataclass
class GuardState:
  """What the guard carries from step to step: scalars on the device.

  Attributes:
    row: int32, steps in a row, up to the last, that were not applied.
    total: int32, steps of the run that were not applied.
    seen: int32, losses that `mean` and `var` are made of.
    mean, var: float32, running mean and variance of the loss of applied steps.
  """

  row: jax.Array
  total: jax.Array
  seen: jax.Array
  mean: jax.Array
  var: jax.Array


def init_guard() -> GuardState:
  """The state before the first step. (Donated leaves share no buffer: each is made afresh.)"""
  count, value = (lambda: jnp.zeros((), jnp.int32)), (lambda: jnp.zeros((), jnp.float32))
  return GuardState(count(), count(), count(), value(), value())


@dataclasses.dataclass(frozen=True)
class Guard:
  """Judges each step on the device, inside the jitted step.

  A step is not applied if its loss or the norm of its gradient is not finite, or if its loss is a
  spike: more than `spike_sigma` standard deviations above the mean of the losses before it. After
  `max_skipped` such steps in a row nothing is applied any more: the state stays as it was before
  the row, for whoever looks into it, until the trainer reads the metrics and stops.

  Attributes:
    max_skipped: steps in a row after which the run stops, at least 1.
    spike_sigma: standard deviations; 0 applies spikes like all other steps.
    spike_window: steps. Of the first so many losses mean and variance are the plain ones and
      nothing is a spike; from then on they forget at the rate of 1 / spike_window a step.
  """

  max_skipped: int = 10
  spike_sigma: float = 0.0
  spike_window: int = 100

  def __post_init__(self):
    if self.max_skipped < 1:
      raise ValueError(
        f"guard.max_skipped={self.max_skipped} must be at least 1: the number of skipped steps in "
        "a row that stops the run."
      )
    if not 0 <= self.spike_sigma < float("inf"):
      raise ValueError(
        f"guard.spike_sigma={self.spike_sigma} must be 0 (off) or a positive number of standard "
        "deviations."
      )
    if self.spike_window < 2:
      raise ValueError(
        f"guard.spike_window={self.spike_window} must be at least 2: one loss has no variance."
      )

  def judge(
    self, state: GuardState, loss: jax.Array, grad_norm: jax.Array
  ) -> tuple[jax.Array, GuardState, dict[str, jax.Array]]:
    """(whether to apply the step, the state after it, metrics), all scalars.

    The metrics are "skipped" (1 if the step is not applied), "skipped_row" (as in `GuardState`)
    and, where spikes are looked for, "spikes" (1 if that is the reason).
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike = jnp.zeros((), bool)
    if self.spike_sigma:
      limit = state.mean + self.spike_sigma * jnp.sqrt(state.var)
      spike = finite & (state.seen >= self.spike_window) & (loss > limit)
    apply = finite & ~spike & (state.row < self.max_skipped)
    skipped = 1 - apply.astype(jnp.int32)
    new = state.replace(row=(state.row + 1) * skipped, total=state.total + skipped)
    metrics = {"skipped": skipped, "skipped_row": new.row}
    if self.spike_sigma:
      new, metrics = self._remember(new, loss, apply), {**metrics, "spikes": spike.astype(int)}
    return apply, new, metrics

  def _remember(self, state: GuardState, loss: jax.Array, apply: jax.Array) -> GuardState:
    """Takes the loss of an applied step into the running mean and variance (Welford 1962)."""
    seen = jnp.minimum(state.seen + 1, self.spike_window)
    delta, share = loss - state.mean, 1.0 / seen
    mean = state.mean + share * delta
    var = (1.0 - share) * (state.var + share * jnp.square(delta))
    keep = lambda new, old: jnp.where(apply, new, old)
    return state.replace(
      seen=keep(seen, state.seen), mean=keep(mean, state.mean), var=keep(var, state.var)
    )


def choose(apply: jax.Array, new, old):
  """The tree `new` if `apply`, else `old`, leaf by leaf.

  A select is fused into the update that makes `new` and reads `old` anyway: it takes no memory
  of its own, where a branch would keep both.
  """
  return jax.tree.map(lambda a, b: jnp.where(apply, a, b), new, old)


@flax.struct.dataclass
class TrainState:
  """All that changes while training; nothing else is saved.

  Attributes:
    step: int32 scalar, number of steps done.
    params: what the gradient moves.
    ema_params: their exponential moving average, what is evaluated and sampled.
    opt_state: the optimiser's.
    guard: which steps were not applied; () where nothing is trained.
  """

  step: jax.Array
  params: dict
  ema_params: dict
  opt_state: optax.OptState
  guard: GuardState | tuple[()] = ()


class Objective(Protocol):
  """What is minimised, in two parts: all that is random is drawn before anything is computed.

  `draw(batch, key)` makes trees of [rows, ...], and `objective(params, drawn)` their loss, a mean
  over rows, and its terms by name.
  """

  def draw(self, batch: Mapping, key: jax.Array): ...

  def __call__(self, params, drawn) -> tuple[jax.Array, Mapping[str, jax.Array]]: ...


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
  """What step `step` = 0, 1, ... draws its randomness from: a function of (seed, step)."""
  return jax.random.fold_in(jax.random.key(seed), step)


def ema_decay_at(step: jax.Array, ema_decay: float) -> jax.Array:
  """Decay of step `step` = 0, 1, ...: min(ema_decay, (1 + step) / (10 + step)).

  The ramp forgets the random initialisation in runs that are shorter than the average's memory.
  """
  return jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))


def init_state(init: Callable, tx: optax.GradientTransformation, key, mesh: Mesh) -> TrainState:
  """A fresh state; `init(key)` returns parameters, which the mesh's axis "fsdp" splits."""
  make = _maker(init, tx)
  with progress.during("compiling the initial state"):
    shardings = state_shardings(jax.eval_shape(make, key), mesh)
    return jax.jit(make, out_shardings=shardings)(key)


def state_shapes(init: Callable, tx: optax.GradientTransformation) -> TrainState:
  """Shapes and types of what `init_state` returns."""
  return jax.eval_shape(_maker(init, tx), jax.random.key(0))


def _maker(init: Callable, tx: optax.GradientTransformation) -> Callable:
  def make(key):
    params = init(key)
    # The average starts as a copy: two donated leaves must not share a buffer.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params), init_guard())

  return make


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step with the parameters that it reads and does not train."""

  compiled: Callable
  frozen: Any

  def __call__(self, state: TrainState, batch) -> tuple[TrainState, dict]:
    return self.compiled(state, batch, self.frozen)

  def lower(self, state: TrainState, batch):
    """The step lowered for states and batches of these shapes and places."""
    return self.compiled.lower(state, batch, self.frozen)


def make_gradient(objective: Objective, accumulate: int, devices: int) -> Callable:
  """`gradient(params, drawn) -> ((loss, terms), gradient)`, the mean over micro-batches.

  What is random is drawn for the whole batch, so the number of micro-batches changes numbers by
  their rounding only. Each device takes its share of each micro-batch from its own rows.
  """
  gradient = jax.value_and_grad(objective, has_aux=True)
  if accumulate == 1:
    return gradient

  def mean(params, drawn):
    chunks = chunks_of_rows(drawn, accumulate, devices)
    add = lambda total, rows: (jax.tree.map(jnp.add, total, gradient(params, by_batch(rows))), None)
    first = jax.tree.map(lambda x: x[0], chunks)
    shapes = jax.eval_shape(gradient, params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.tree.map(lambda x: x / accumulate, jax.lax.scan(add, zeros, chunks)[0])

  return mean


def make_train_step(
  objective: Objective,
  tx: optax.GradientTransformation,
  schedule: Callable,
  *,
  ema_decay: float,
  seed: int,
  state: TrainState,
  guard: Guard = Guard(),  # noqa: B008 (frozen)
  accumulate: int = 1,
  encode: Callable | None = None,
  frozen=(),
) -> Step:
  """Builds the jitted `step(state, batch) -> (state, metrics)` for states placed as `state` is.

  Every device computes on its own rows, with whole parameters; where these are kept in parts, each
  layer gathers its own, and every device updates the part that it keeps. `accumulate` micro-batches
  are worked on one after the other, which takes less memory. All randomness of a step is a function
  of (seed, step). The state is donated. Metrics are device scalars: "loss", "loss/<stream>/<term>",
  "lr", "grad_norm" (before clipping), "param_norm", and those of the guard.

  A step that the guard does not let pass leaves parameters, average and optimiser as they are, to
  the bit, and is counted: the next one has the next batch and draws anew. The learning rate and
  the average's ramp follow the steps that were applied, as the optimiser's own counters do.

  `encode(frozen, batch, key)` makes what the loss is given of a batch as it was read; `frozen` are
  parameters that nothing trains, whole on every device.
  """

  def step(state: TrainState, batch, frozen):
    key = step_key(seed, state.step)
    batch = encode(frozen, batch, key) if encode else batch
    with on(mesh):
      drawn = by_batch(objective.draw(batch, key))
      (total, terms), grads = gradient(state.params, drawn)
    grads = jax.lax.with_sharding_constraint(grads, placed.params)
    new, values = _advance(state, total, grads, tx, guard, ema_decay)
    metrics = {
      "loss": total,
      **{f"loss/{k}": v for k, v in terms.items()},
      "lr": schedule(state.step - state.guard.total),
      "param_norm": optax.tree.norm(new.params),
      **values,
    }
    return new, metrics

  placed = jax.tree.map(lambda x: x.sharding, state)
  mesh = placed.step.mesh
  whole = lambda params, drawn: objective(gathered_at_once(params), drawn)
  gradient = make_gradient(whole, accumulate, mesh.size)
  everywhere, rows = replicated(mesh), batch_sharding(mesh)
  shardings = dict(in_shardings=(placed, rows, everywhere), out_shardings=(placed, everywhere))
  return Step(jax.jit(step, donate_argnums=0, **shardings), frozen)


def _advance(state: TrainState, loss, grads, tx, guard: Guard, ema_decay: float):
  """(the state after a step with these gradients, if the guard lets it pass; metrics)."""
  grad_norm = optax.tree.norm(grads)
  apply, guard_state, verdict = guard.judge(state.guard, loss, grad_norm)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  params, opt_state = choose(apply, (params, opt_state), (state.params, state.opt_state))
  decay = ema_decay_at(state.step - state.guard.total, ema_decay)
  ema = optax.incremental_update(params, state.ema_params, 1.0 - decay)
  ema = choose(apply, ema, state.ema_params)
  new = TrainState(state.step + 1, params, ema, opt_state, guard_state)
  return new, {"grad_norm": grad_norm, **verdict}

"""The state of training, and the step from one state to the next."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from umd import progress
from umd.guard import Guard, GuardState, choose, init_guard
from umd.sharding import batch_sharding, replicated, state_shardings


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


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
  """What step `step` = 0, 1, ... draws its randomness from: a function of (seed, step)."""
  return jax.random.fold_in(jax.random.key(seed), step)


def ema_decay_at(step: jax.Array, ema_decay: float) -> jax.Array:
  """Decay of step `step` = 0, 1, ...: min(ema_decay, (1 + step) / (10 + step)).

  The ramp forgets the random initialisation in runs that are shorter than the average's memory.
  """
  return jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))


def init_state(
  init: Callable, tx: optax.GradientTransformation, key, mesh: Mesh, fsdp: bool = False
) -> TrainState:
  """A fresh state on the mesh; `init(key)` returns parameters.

  With `fsdp` every device keeps a part of every large leaf, otherwise all of all leaves.
  """

  def make(key):
    params = init(key)
    # The average starts as a copy: two donated leaves must not share a buffer.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params), init_guard())

  with progress.during("compiling the initial state"):
    shardings = state_shardings(jax.eval_shape(make, key), mesh, fsdp)
    return jax.jit(make, out_shardings=shardings)(key)


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


def make_train_step(
  loss: Callable,
  tx: optax.GradientTransformation,
  schedule: Callable,
  *,
  ema_decay: float,
  seed: int,
  state: TrainState,
  guard: Guard = Guard(),  # noqa: B008 (frozen)
  encode: Callable | None = None,
  frozen=(),
) -> Step:
  """Builds the jitted `step(state, batch) -> (state, metrics)` for states placed as `state` is.

  The model computes with whole parameters: where they are kept in parts, each step gathers them,
  and every device updates the part that it keeps. All randomness of a step is a function of
  (seed, step). The state is donated. Metrics are device scalars: "loss", "loss/<stream>/<term>",
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
    applied = state.step - state.guard.total
    grad = jax.value_and_grad(loss, has_aux=True)
    whole = jax.lax.with_sharding_constraint(state.params, everywhere)
    (total, terms), grads = grad(whole, batch, key)
    grads = jax.lax.with_sharding_constraint(grads, placed.params)
    grad_norm = optax.tree.norm(grads)
    apply, guard_state, verdict = guard.judge(state.guard, total, grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = choose(apply, (params, opt_state), (state.params, state.opt_state))
    decay = ema_decay_at(applied, ema_decay)
    ema = optax.incremental_update(params, state.ema_params, 1.0 - decay)
    ema = choose(apply, ema, state.ema_params)
    metrics = {
      "loss": total,
      **{f"loss/{k}": v for k, v in terms.items()},
      "lr": schedule(applied),
      "grad_norm": grad_norm,
      "param_norm": optax.tree.norm(params),
      **verdict,
    }
    return TrainState(state.step + 1, params, ema, opt_state, guard_state), metrics

  placed = jax.tree.map(lambda x: x.sharding, state)
  mesh = placed.step.mesh
  everywhere, rows = replicated(mesh), batch_sharding(mesh)
  shardings = dict(in_shardings=(placed, rows, everywhere), out_shardings=(placed, everywhere))
  return Step(jax.jit(step, donate_argnums=0, **shardings), frozen)

"""The state of training, and the step from one state to the next."""

from collections.abc import Callable, Collection

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from umd.sharding import batch_sharding, replicated


@flax.struct.dataclass
class TrainState:
  """All that changes while training; nothing else is saved.

  Attributes:
    step: int32 scalar, number of steps done.
    params: what the gradient moves.
    ema_params: their exponential moving average, what is evaluated and sampled.
    opt_state: the optimiser's.
  """

  step: jax.Array
  params: dict
  ema_params: dict
  opt_state: optax.OptState


def ema_decay_at(step: jax.Array, ema_decay: float) -> jax.Array:
  """Decay of step `step` = 0, 1, ...: min(ema_decay, (1 + step) / (10 + step)).

  The ramp forgets the random initialisation in runs that are shorter than the average's memory.
  """
  return jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))


def init_state(init: Callable, tx: optax.GradientTransformation, key, mesh: Mesh) -> TrainState:
  """A fresh state, replicated over the mesh; `init(key)` returns parameters."""

  def make(key):
    params = init(key)
    # The average starts as a copy: two donated leaves must not share a buffer.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))

  return jax.jit(make, out_shardings=replicated(mesh))(key)


def _leaves(params) -> dict:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def adopt(state: TrainState, loaded: dict, fresh: Collection[str], mesh: Mesh) -> TrainState:
  """Starts parameters and their average from `loaded`, but for the subtrees named in `fresh`.

  Step and optimiser stay as they are: new.

  Raises:
    ValueError: leaves are missing, left over or of another shape; the message lists them. Or a
      name in `fresh` is a part of neither.
  """
  parts = state.params.keys() | loaded.keys()
  if unknown := set(fresh) - parts:
    raise ValueError(
      f"init_fresh={sorted(unknown)} are no parts of a model; known: {sorted(parts)}."
    )
  own, given = _leaves(state.params), _leaves(loaded)
  is_fresh = lambda name: name.split("/")[0] in fresh
  wrong = [
    f"{name}: here {getattr(own.get(name), 'shape', 'absent')}, "
    f"there {getattr(given.get(name), 'shape', 'absent')}"
    for name in sorted(own.keys() | given.keys())
    if not is_fresh(name)
    and getattr(own.get(name), "shape", None) != getattr(given.get(name), "shape", None)
  ]
  if wrong:
    raise ValueError(
      "init_from: the checkpoint does not fit the model; leaves that differ:\n  "
      + "\n  ".join(wrong)
      + "\nUse the model settings of the checkpoint, or name the subtree in init_fresh."
    )
  pick = lambda path, leaf: (
    leaf
    if is_fresh(name := jax.tree_util.keystr(path, simple=True, separator="/"))
    else jnp.asarray(given[name], leaf.dtype)
  )
  params = jax.tree_util.tree_map_with_path(pick, state.params)
  copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=replicated(mesh))
  return state.replace(params=copy(params), ema_params=copy(params))


def make_train_step(
  loss: Callable,
  tx: optax.GradientTransformation,
  schedule: Callable,
  *,
  ema_decay: float,
  seed: int,
  mesh: Mesh,
) -> Callable:
  """Builds the jitted `step(state, batch) -> (state, metrics)`.

  All randomness of a step is a function of (seed, step). The state is donated. Metrics are device
  scalars: "loss", "loss/<stream>/<term>", "lr", "grad_norm" (before clipping), "param_norm".
  """

  def step(state: TrainState, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grad = jax.value_and_grad(loss, has_aux=True)
    (total, terms), grads = grad(state.params, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay_at(state.step, ema_decay)
    ema = optax.incremental_update(params, state.ema_params, 1.0 - decay)
    metrics = {
      "loss": total,
      **{f"loss/{k}": v for k, v in terms.items()},
      "lr": schedule(state.step),
      "grad_norm": optax.tree.norm(grads),
      "param_norm": optax.tree.norm(params),
    }
    return TrainState(state.step + 1, params, ema, opt_state), metrics

  everywhere, rows = replicated(mesh), batch_sharding(mesh)
  return jax.jit(
    step, donate_argnums=0, in_shardings=(everywhere, rows), out_shardings=(everywhere, everywhere)
  )

"""Linear probes: many linear classifiers on frozen features, trained side by side."""

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

EPS = 1e-6  # Of the batch normalisation, as in MAE's linear probe.
DECAY = 0.9  # Of its running statistics.


@flax.struct.dataclass
class ProbeState:
  """All that changes while the heads train.

  Attributes:
    step: the number of steps done, an int32 scalar.
    params: {"kernel" [H, D, C], "bias" [H, C]} of H heads.
    mean, var: the running statistics of the features, [D].
    opt_state: the optimiser's state of all heads, with leading axis H.
  """

  step: jax.Array
  params: dict
  mean: jax.Array
  var: jax.Array
  opt_state: optax.OptState


def lars(wd: float) -> optax.GradientTransformation:
  """Makes LARS (You et al. 2017) up to the learning rate, as MAE's probe has it.

  Weight decay and the trust ratio (coefficient .001) apply to matrices, not to biases. Momentum .9
  sums updates without their learning rate, which is multiplied on last.
  """
  matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
  ratio = optax.scale_by_trust_ratio(trust_coefficient=1e-3)
  return optax.chain(
    optax.add_decayed_weights(wd, matrices), optax.masked(ratio, matrices), optax.trace(0.9)
  )


def init_probe(key, heads: int, width: int, num_classes: int, wd: float) -> ProbeState:
  """Makes equal heads on features of a width: they differ by their learning rates alone."""
  kernel = 0.01 * jax.random.normal(key, (width, num_classes))
  one = {"kernel": kernel, "bias": jnp.zeros(num_classes)}
  params = jax.tree.map(lambda x: jnp.stack([x] * heads), one)
  opt_state = jax.vmap(lars(wd).init)(params)
  zero = jnp.zeros((), jnp.int32)
  return ProbeState(zero, params, jnp.zeros(width), jnp.ones(width), opt_state)


def _logits(params, x: Float[Array, "b d"]) -> Float[Array, "h b c"]:
  exact = jnp.einsum("bd,hdc->hbc", x, params["kernel"], precision="highest")
  return exact + params["bias"][:, None]


def predict(state: ProbeState, features: Float[Array, "b d"]) -> Float[Array, "h b c"]:
  """Returns the logits of every head, of features normalised by the running statistics."""
  return _logits(state.params, (features - state.mean) * jax.lax.rsqrt(state.var + EPS))


def train_probe(
  state: ProbeState,
  features: Float[Array, "b d"],
  labels: Int[Array, "b"],
  lrs: Float[Array, "h"],
  wd: float,
) -> tuple[ProbeState, Float[Array, "h"]]:
  """Trains every head for one step on a batch; returns the new state and the losses.

  Features are normalised by the batch's mean and variance, without a scale or bias of their own.
  """
  mean, var = features.mean(axis=0), features.var(axis=0)
  x = (features - mean) * jax.lax.rsqrt(var + EPS)

  def loss(params):
    logits = _logits(params, x)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[None])
    return each.mean(axis=1).sum(), each.mean(axis=1)

  grads, losses = jax.grad(loss, has_aux=True)(state.params)
  updates, opt_state = jax.vmap(lars(wd).update)(grads, state.opt_state, state.params)
  scale = lambda update: -lrs.reshape(-1, *[1] * (update.ndim - 1)) * update
  params = optax.apply_updates(state.params, jax.tree.map(scale, updates))
  n = features.shape[0]
  run = lambda old, new: DECAY * old + (1 - DECAY) * new
  return ProbeState(
    state.step + 1,
    params,
    run(state.mean, mean),
    run(state.var, var * n / max(n - 1, 1)),  # unbiased, as torch's
    opt_state,
  ), losses


def hits(logits: Float[Array, "h b c"], labels: Int[Array, "b"], k: int) -> Float[Array, "b h"]:
  """Returns 1 where the label is among the k largest logits, else 0."""
  _, top = jax.lax.top_k(logits, k)
  return (top == labels[None, :, None]).any(axis=-1).astype(jnp.float32).T

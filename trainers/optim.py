"""AdamW with warm-up, cosine decay, clipping, and weight decay on matrices only."""

from collections.abc import Callable

import jax
import optax


def make_schedule(lr: float, steps: int, warmup: float) -> Callable:
  """Learning rate: linear from 0 to `lr` over a share `warmup` of the steps, then cosine to 0.

  Raises:
    ValueError: the warm-up is not a share of the run.
  """
  if not 0 <= warmup < 1:
    raise ValueError(f"optim.warmup={warmup} must be in [0, 1): it is a share of the steps.")
  return optax.warmup_cosine_decay_schedule(0.0, lr, int(warmup * steps), steps, 0.0)


def decay_mask(params):
  """True for the leaves that decay: matrices, known by names that end in "kernel".

  Norms, biases, class and mask tokens, position and label embeddings do not decay. A rule by rank
  would be wrong: stacking the layers gives every bias a second axis.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.endswith("kernel"), params)


def make_optimizer(
  schedule: Callable,
  *,
  wd: float,
  beta1: float,
  beta2: float,
  clip_norm: float,
  mu_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Clips by global norm, then takes a step of AdamW (Loshchilov & Hutter 2019).

  Args:
    schedule: the learning rate by step.
    wd: weight decay, scaled by the learning rate.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    clip_norm: the largest global norm of the gradient.
    mu_dtype: type of the first moment; None for that of the parameters.
  """
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(schedule, beta1, beta2, 1e-8, weight_decay=wd, mask=decay_mask, mu_dtype=mu_dtype),
  )


def from_config(optim, steps: int) -> tuple[Callable, optax.GradientTransformation]:
  """Returns (learning rate by step, optimiser) of a config's `optim`, for a run of `steps`."""
  schedule = make_schedule(optim.lr, steps, optim.warmup)
  tx = make_optimizer(
    schedule,
    wd=optim.wd,
    beta1=optim.beta1,
    beta2=optim.beta2,
    clip_norm=optim.clip_norm,
    mu_dtype=optim.mu_dtype,
  )
  return schedule, tx

"""How a run descends: its length, its learning rate, AdamW, and the compiled step."""

import functools
from collections.abc import Callable

import jax
import optax

from umd.codecs.codec import Pixels, encode_batch
from umd.state import Step, TrainState, make_train_step


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


def count_steps(config, examples: int) -> int:
  """Returns the length of a run: `steps`, or `epochs` over so many examples."""
  if (config.steps > 0) == (config.epochs > 0):
    raise ValueError(
      f"steps={config.steps} and epochs={config.epochs}: give one of them, and leave the other 0."
    )
  return config.steps or max(1, round(config.epochs * examples / config.batch_size))


def make_step(config, parts, like: TrainState) -> Step:
  """Builds the step of a trainer's parts, for states of the shapes and places of `like`."""
  # Pixels are trained on as they are; of latents the step makes its own.
  is_encoded = not isinstance(parts.codec, Pixels)
  return make_train_step(
    parts.objective,
    parts.tx,
    parts.schedule,
    ema_decay=config.ema_decay,
    seed=config.seed,
    state=like,
    guard=config.guard,
    accumulate=config.accumulate,
    encode=functools.partial(encode_batch, parts.codec) if is_encoded else None,
    frozen=parts.codec.params,
  )

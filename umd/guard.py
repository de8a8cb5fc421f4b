"""Which steps of training are applied: none that is not finite, and none that spikes."""

import dataclasses

import flax
import jax
import jax.numpy as jnp


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

"""What every evaluator is given, and the one way in which evaluators run over a data set."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from umd.data import Source, eval_batches
from umd.inference import Inference
from umd.objectives import Stream
from umd.sharding import prefetch, replicated


@dataclasses.dataclass(frozen=True)
class Context:
  """What an evaluator may use.

  Attributes:
    inference: the model and its path.
    streams: what it is trained on.
    mesh: all devices.
    batch_size: of evaluation, over all devices; results do not depend on it.
    seed: of everything random in evaluation.
    cache: folder for what is computed once per workdir.
  """

  inference: Inference
  streams: Sequence[Stream]
  mesh: Mesh
  batch_size: int
  seed: int
  cache: str

  def check_timestep(self, t: int) -> None:
    """Raises ValueError unless t is a timestep of the path; JAX would clamp it in silence."""
    timesteps = self.inference.path.timesteps
    if not 0 <= t <= timesteps:
      raise ValueError(f"t={t} must be in [0, timesteps={timesteps}].")

  def jit(self, fn: Callable) -> Callable:
    """Compiles `fn(params, batch) -> {name: [B, ...]}` for `map`.

    Every process gets the whole result, with the batch's `_mask` beside it.
    """
    masked = lambda params, batch, **kwargs: {
      **fn(params, batch, **kwargs),
      "_mask": batch["_mask"],
    }
    return jax.jit(masked, out_shardings=replicated(self.mesh))

  def map(self, fn: Callable, params, source: Source) -> dict[str, np.ndarray]:
    """Runs a function that `jit` compiled over the source.

    Returns {name: [n, ...]}, one row per example in the source's order; the rows that `_mask` marks
    as filling are gone.
    """
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    parts = []
    for batch in prefetch(eval_batches(source, self.batch_size, **place), self.mesh):
      parts.append(fn(params, batch))
    whole = {k: np.concatenate([np.asarray(p[k]) for p in parts]) for k in parts[0]}
    real = whole.pop("_mask") > 0
    return {k: v[real] for k, v in whole.items()}

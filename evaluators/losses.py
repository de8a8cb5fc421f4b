"""The training objective on held-out images, by noise level, for averaged and raw weights."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from evaluators.context import Context
from umd.checkpoint import WEIGHTS
from umd.data import load
from umd.inference import example_keys, example_normal, example_uniform
from umd.objectives import TIMESTEPS, Stream, score
from umd.state import TrainState


class Evaluator:
  """Scores each stream as it is trained, and nothing that it is not trained on.

  A stream's timesteps are cut into `bins` equally likely ranges, and each image is scored once in
  each. Timesteps, noise and masks are functions of (seed, example), so two evaluations differ by
  the weights alone. Labels are shown where the stream shows them, none is dropped.

  Yields "<weights>/<stream>/<term>/<range>", e.g. "ema/noised/eps/t1-250".
  """

  def __init__(self, context: Context, *, data: str, split: str, bins: int = 4):
    self._context, self._source = context, load(data, split)
    timesteps = context.inference.path.timesteps
    if not 1 <= bins <= timesteps:
      raise ValueError(f"bins={bins} must be in [1, timesteps={timesteps}].")
    self._bins = bins
    self._ranges = {s.name: self._cut(s) for s in context.streams}
    self._score = context.jit(self._score_batch)

  def _cut(self, stream: Stream) -> list[tuple[str, float, float]]:
    """(name, from, to) of the bins, as ranges of the uniform draw that makes the timestep."""
    draw, timesteps = TIMESTEPS[stream.timesteps], self._context.inference.path.timesteps
    ranges = {}
    for b in range(self._bins):
      low, high = b / self._bins, (b + 1) / self._bins
      first, last = (int(draw(jnp.float32(u), timesteps)) for u in (low, high - 1e-6))
      ranges[f"t{first}" if first == last else f"t{first}-{last}"] = (low, high)
    return [(name, *edges) for name, edges in ranges.items()]

  def _score_batch(self, params, batch):
    inference, out = self._context.inference, {}
    model, images = inference.model, batch["image"]
    keys = example_keys(self._context.seed, batch["index"])
    for i, stream in enumerate(self._context.streams):
      labels = batch["label"] if model.num_classes and stream.labels else None
      for j, (name, low, high) in enumerate(self._ranges[stream.name]):
        fold = lambda part, i=i, j=j: jax.vmap(
          lambda key: jax.random.fold_in(key, part + 3 * (j + self._bins * i))
        )(keys)
        u = low + (high - low) * example_uniform(fold(0), ())
        t = TIMESTEPS[stream.timesteps](u, inference.path.timesteps)
        eps = example_normal(fold(1), images.shape[1:])
        mask_noise = example_uniform(fold(2), (model.tokens,))
        scores = score(model, inference.path, stream, params, images, labels, t, eps, mask_noise)
        out.update({f"{stream.name}/{term}/{name}": v for term, v in scores.items()})
    return out

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float]]:
    for weights, field in WEIGHTS.items():
      scores = self._context.map(self._score, getattr(state, field), self._source)
      for name, values in scores.items():
        yield f"{weights}/{name}", values.mean()

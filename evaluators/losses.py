"""The training objective on held-out images, by noise level, for averaged and raw weights."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from evaluators.context import Context, Weights, count, setting
from umd.models.network import num_tokens
from umd.objectives import TIMESTEPS, Draw, Stream, score
from umd.runs.checkpoint import WEIGHTS
from umd.samplers.keys import example_keys, example_normal, example_uniform
from umd.state import TrainState


@dataclasses.dataclass(frozen=True)
class Settings:
  data: Mapping = setting("The held-out images.")
  num: int = setting("Score the first so many images only; 0 scores all.", 0, "[0, inf)")
  bins: int = setting("The number of equally likely ranges of noise levels.", 4, "[1, inf)")


class Evaluator:
  """Scores each stream as it is trained, and nothing that the model is not trained on.

  A stream's timesteps are cut into equally likely ranges, and each image is scored once in each.
  Timesteps, noise and masks are functions of (seed, example), so two evaluations differ by the
  weights alone. Labels are shown where the stream shows them, and none is dropped. The images are
  read once for all streams, ranges and weights.

  Yields "<weights>/<stream>/<term>/<range>", for example "ema/noised/eps/t1-250".
  """

  def __init__(self, context: Context, settings: Settings):
    self._context = context
    self._source = context.open("data", settings.data)
    self._num = settings.num
    self._bins = settings.bins
    count(self._source, settings.num)
    timesteps = context.inference.path.timesteps
    if settings.bins < 1 or (timesteps and settings.bins > timesteps):
      raise ValueError(f"bins={settings.bins} must be in [1, timesteps={timesteps}].")
    # One program per stream: what tells the ranges and the weights apart is data, not shape.
    self._score = {
      stream.name: context.jit(functools.partial(self._score_batch, stream))
      for stream in context.streams
    }

  def _ranges(self, stream: Stream) -> list[tuple[str, float, float]]:
    """Lists (name, from, to) of the bins, as ranges of the uniform draw that makes the timestep."""
    draw, path = TIMESTEPS[stream.timesteps], self._context.inference.path
    ranges = {}
    for b in range(self._bins):
      low, high = b / self._bins, (b + 1) / self._bins
      ends = {float(draw(jnp.float32(u), path)) for u in (low, high - 1e-6)}
      ranges["t" + "-".join(f"{t:g}" for t in sorted(ends))] = (low, high)
    return [(name, *edges) for name, edges in ranges.items()]

  def _score_batch(self, stream: Stream, weights: Weights, batch, part, low, high):
    """Scores a batch at timesteps of the range (low, high); `part` makes its noise a new one."""
    images = self._context.see(weights, batch)
    model, path = self._context.inference.model, self._context.inference.path
    keys = example_keys(self._context.seed, batch["index"])
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, part), 3))(keys)
    u = low + (high - low) * example_uniform(keys[:, 0], ())
    t = TIMESTEPS[stream.timesteps](u, path)
    eps = example_normal(keys[:, 1], images.shape[1:])
    mask_noise = example_uniform(keys[:, 2], (num_tokens(model),))
    labels = batch["label"] if model.num_classes and stream.labels else None
    draw = Draw(images, labels, t, eps, mask_noise)
    return score(model, path, [stream], weights.model, [draw])[0]

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float]]:
    ranges = {stream.name: self._ranges(stream) for stream in self._context.streams}

    def score_all(params, batch):
      rows = {}
      for weights, values in params.items():
        for i, (stream, bins) in enumerate(ranges.items()):
          for j, (name, low, high) in enumerate(bins):
            part = j + self._bins * i
            out = self._score[stream](values, batch, part=part, low=low, high=high)
            rows |= {f"{weights}/{stream}/{term}/{name}": x for term, x in out.rows.items()}
      return out._replace(rows=rows)

    params = {name: self._context.weights(getattr(state, field)) for name, field in WEIGHTS.items()}
    for name, values in self._context.map(score_all, params, self._source, num=self._num).items():
      yield name, values.mean()

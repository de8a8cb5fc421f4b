"""How well dropped patches are filled in, as a number and as pictures."""

import functools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from evaluators.context import Context, count
from umd.codecs import codec
from umd.data import eval_batches
from umd.devices.mesh import replicated, run_ahead
from umd.masks import num_kept
from umd.models.network import num_tokens
from umd.runs import progress
from umd.runs.writers import Images, to_grid
from umd.samplers.keys import example_keys
from umd.state import TrainState


class Evaluator:
  """Squared error of the x0 head on dropped patches, with fixed masks, in pixels.

  Yields "masked_mse"; "mean_image_mse", what the mean of the images scores on the same patches; of
  a model of latents "codec_mse", what encoding and decoding alone costs there; and "images", rows
  of original | masked | reconstructed.
  """

  def __init__(
    self,
    context: Context,
    *,
    data: Mapping,
    mask_ratio: float,
    num: int = 0,
    t: int = 0,
    rows: int = 8,
    scale: int = 6,
  ):
    """`num`: look at the first so many images only; 0 for all."""
    model = context.inference.model
    if "x0" not in model.heads:
      raise ValueError(f"reconstruction reads the head 'x0', the model has {model.heads}.")
    if num_kept(num_tokens(model), mask_ratio) == num_tokens(model):
      raise ValueError(f"mask_ratio={mask_ratio} masks no token; set it higher.")
    context.check_timestep(t)
    self._context, self._source, self._num = context, context.open("data", data), num
    if codec.stored(self._source):
      raise ValueError(
        f"data: {self._source.name} holds latents, but reconstructions are compared in pixels. "
        "Name data with images."
      )
    self._scale = scale

    def reconstruct(weights, batch, mean):
      images, keys = batch["image"], example_keys(context.seed, batch["index"])
      seen = context.see(weights, batch)
      filled, masked = context.inference.reconstruct(weights.model, seen, keys, mask_ratio, t)
      decode = lambda x: context.codec.decode(weights.codec, x)
      filled, masked = decode(filled), context.codec.spread(masked)
      over_masked = lambda error: (error * masked).sum((1, 2, 3)) / masked.sum((1, 2, 3))
      errors = {"error": filled, "mean_error": mean}
      errors |= {} if isinstance(context.codec, codec.Pixels) else {"codec_error": decode(seen)}
      errors = {name: over_masked((made - images) ** 2) for name, made in errors.items()}
      return {"image": images, "filled": filled, "masked": masked, **errors}

    # The same images every time, spread over the data.
    shown = np.linspace(0, count(self._source, num) - 1, rows).astype(int)
    self._reconstruct = context.jit(reconstruct, ("image", "filled", "masked"), shown)

  @functools.cached_property
  def _mean(self) -> np.ndarray:
    """The mean image [H, W, C], from one pass over the data when it is first needed."""
    context, n = self._context, count(self._source, self._num)

    def add_up(batch):
      inside = batch["_mask"] * (batch["index"] < n)
      return (batch["image"] * inside[:, None, None, None]).sum(axis=0), inside.sum()

    compiled = jax.jit(add_up, out_shardings=replicated(context.mesh))
    total, seen = 0.0, 0
    clock = progress.Clock(context.progress, f"mean image of {self._source.name}", n)
    batches = eval_batches(self._source, context.batch_size, **context.place())
    for images, number in run_ahead(compiled, batches, context.mesh):
      total, seen = total + np.asarray(images, np.float64), seen + int(number)
      clock(seen)
      if seen == n:
        break
    return (total / seen).astype(np.float32)

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float | Images]]:
    fn = functools.partial(self._reconstruct, mean=self._mean)
    weights = self._context.weights(state.ema_params)
    out = self._context.map(fn, weights, self._source, num=self._num)
    yield "masked_mse", out["error"].mean()
    yield "mean_image_mse", out["mean_error"].mean()
    if "codec_error" in out:
      yield "codec_mse", out["codec_error"].mean()
    # Dropped patches are shown in mid-grey.
    original, filled, masked = (out[k] for k in ("image", "filled", "masked"))
    cells = np.stack([original, np.where(masked > 0, 0.0, original), filled], axis=1)
    yield "images", to_grid(cells.reshape(-1, *original.shape[1:]), 3, self._scale)

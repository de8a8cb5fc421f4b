"""How well masked patches are filled in, as a number and as pictures."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from evaluators.context import Context, count, setting
from umd.codecs import codec
from umd.data import eval_batches
from umd.devices.mesh import replicated, run_ahead
from umd.masks import num_kept
from umd.models.network import num_tokens
from umd.runs import progress
from umd.runs.writers import Images, to_grid
from umd.samplers.keys import example_keys
from umd.state import TrainState


@dataclasses.dataclass(frozen=True)
class Settings:
  data: Mapping = setting("The images.")
  mask_ratio: float = setting("The share of patches that is masked.", within="[0, 1)")
  num: int = setting("Look at the first so many images only; 0 takes all.", 0, "[0, inf)")
  t: int = setting("The time to which the images are noised; 0 is clean.", 0, "[0, inf)")
  rows: int = setting("The number of images that are shown.", 8, "[1, inf)")
  scale: int = setting("Each pixel is drawn as so many by so many.", 6, "[1, inf)")


class Evaluator:
  """Measures the squared error of the x0 head on masked patches, in pixels, with fixed masks.

  Yields "masked_mse"; "mean_image_mse", what the mean of all images scores on the same patches; for
  a model of latents "codec_mse", what encoding and decoding alone costs there; and "images", rows
  of the original, the masked and the reconstructed image.
  """

  def __init__(self, context: Context, settings: Settings):
    model = context.inference.model
    if "x0" not in model.heads:
      raise ValueError(f"reconstruction reads the head 'x0', the model has {model.heads}.")
    if num_kept(num_tokens(model), settings.mask_ratio) == num_tokens(model):
      raise ValueError(f"mask_ratio={settings.mask_ratio} masks no token; set it higher.")
    context.check_time(settings.t)
    self._context = context
    self._settings = settings
    self._source = context.open("data", settings.data)
    if codec.stored(self._source):
      raise ValueError(
        f"data: {self._source.name} holds latents, but reconstructions are compared in pixels. "
        "Name data with images."
      )
    # The same images every time, spread over the data.
    self._num = count(self._source, settings.num)
    shown = np.linspace(0, self._num - 1, settings.rows).astype(int)
    pictures = ("image", "filled", "masked")
    self._reconstruct = context.jit(self._reconstruct_batch, pictures, shown)

  def _reconstruct_batch(self, weights, batch, mean):
    context, settings = self._context, self._settings
    images = batch["image"]
    keys = example_keys(context.seed, batch["index"])
    seen = context.see(weights, batch)
    filled, masked = context.inference.reconstruct(
      weights.model, seen, keys, settings.mask_ratio, settings.t
    )
    filled = context.codec.decode(weights.codec, filled)
    masked = context.codec.spread(masked)
    guesses = {"error": filled, "mean_error": mean}
    if not isinstance(context.codec, codec.Pixels):
      guesses["codec_error"] = context.codec.decode(weights.codec, seen)
    errors = {
      name: ((guess - images) ** 2 * masked).sum((1, 2, 3)) / masked.sum((1, 2, 3))
      for name, guess in guesses.items()
    }
    return {"image": images, "filled": filled, "masked": masked, **errors}

  @functools.cached_property
  def _mean(self) -> np.ndarray:
    """The mean image [H, W, C], from one pass over the data when it is first needed."""
    context = self._context

    def add_up(batch):
      inside = batch["_mask"] * (batch["index"] < self._num)
      return (batch["image"] * inside[:, None, None, None]).sum(axis=0), inside.sum()

    compiled = jax.jit(add_up, out_shardings=replicated(context.mesh))
    total, seen = 0.0, 0
    clock = progress.Clock(context.progress, f"mean image of {self._source.name}", self._num)
    batches = eval_batches(self._source, context.batch_size, **context.place())
    for images, number in run_ahead(compiled, batches, context.mesh):
      total = total + np.asarray(images, np.float64)
      seen += int(number)
      clock(seen)
      if seen == self._num:
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
    # Masked patches are shown in mid-grey.
    original, filled, masked = (out[name] for name in ("image", "filled", "masked"))
    cells = np.stack([original, np.where(masked > 0, 0.0, original), filled], axis=1)
    cells = cells.reshape(-1, *original.shape[1:])
    yield "images", to_grid(cells, 3, self._settings.scale)

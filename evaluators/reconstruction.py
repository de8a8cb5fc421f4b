"""How well dropped patches are filled in, as a number and as pictures."""

from collections.abc import Iterator

import numpy as np

from evaluators.context import Context
from umd.data import load
from umd.inference import example_keys
from umd.metrics import Images, to_grid
from umd.state import TrainState


class Evaluator:
  """Squared error of the x0 head on dropped patches, with fixed masks.

  Yields "masked_mse"; "mean_image_mse", what the mean image of the split scores on the same
  patches; and "images", rows of original | masked | reconstructed.
  """

  def __init__(
    self,
    context: Context,
    *,
    data: str,
    split: str,
    mask_ratio: float,
    t: int = 0,
    rows: int = 8,
    scale: int = 6,
  ):
    model = context.inference.model
    if "x0" not in model.heads:
      raise ValueError(f"reconstruction reads the head 'x0', the model has {model.heads}.")
    if model.keep(mask_ratio) == model.tokens:
      raise ValueError(f"mask_ratio={mask_ratio} masks no token; set it higher.")
    context.check_timestep(t)
    self._context, self._source = context, load(data, split)
    self._rows, self._scale = rows, scale
    mean = self._source.images.mean(axis=0)

    def reconstruct(params, batch):
      images, keys = batch["image"], example_keys(context.seed, batch["index"])
      filled, masked = context.inference.reconstruct(params, images, keys, mask_ratio, t)
      over_masked = lambda error: (error * masked).sum((1, 2, 3)) / masked.sum((1, 2, 3))
      return {
        "image": images,
        "filled": filled,
        "masked": masked,
        "error": over_masked((filled - images) ** 2),
        "mean_error": over_masked((mean - images) ** 2),
      }

    self._reconstruct = context.jit(reconstruct)

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float | Images]]:
    out = self._context.map(self._reconstruct, state.ema_params, self._source)
    yield "masked_mse", out["error"].mean()
    yield "mean_image_mse", out["mean_error"].mean()
    # The same images every time, spread over the split; dropped patches shown in mid-grey.
    ids = np.linspace(0, len(self._source) - 1, self._rows).astype(int)
    original, filled, masked = (out[k][ids] for k in ("image", "filled", "masked"))
    cells = np.stack([original, np.where(masked > 0, 0.0, original), filled], axis=1)
    yield "images", to_grid(cells.reshape(-1, *original.shape[1:]), 3, self._scale)

"""Images in several views at once, for latents that are stored: see tools/encode_latents."""

from umd.data.host import tensorflow
from umd.data.preprocess import Preprocess
from umd.data.records import Records
from umd.data.sources import Source

AT_MOST = 256  # Views of an image.
SEEDS = 2**53 // AT_MOST  # Each view has its own seed, below 2**53 as all of them.


class Views(Source):
  """Images in several views: `image` is float32 [V, H, W, C] in [-1, 1], `image_size` (H, W, C).

  View 0 is the square in the middle of an image, as for evaluation; view 1 the same, mirrored; each
  other view a random crop, as in training: a function of the seed, the view's number and the
  image's place in the source.

  Attributes, apart from those of all sources:
    strings: what is done for each view.
  """

  def __init__(
    self,
    records: Records,
    size: int,
    views: int,
    *,
    area_min: float = 80,
    seed: int = 0,
    max_bad: float = 0,
  ):
    """V = `views` of size x size px; crops have `area_min` to 100 percent of an image's area.

    Raises:
      ValueError: `views`, `seed` or `area_min` is out of its range.
    """
    if not 1 <= views <= AT_MOST or not 0 <= seed < SEEDS:
      raise ValueError(f"views={views} must be in 1..{AT_MOST}, and seed={seed} in 0..{SEEDS - 1}.")
    middle = f"decode|resize_small({size})|central_crop({size})|value_range(-1, 1)"
    crop = f"decode_jpeg_and_inception_crop({size}, area_min={area_min:g}, scaled=0)"
    crop = f"{crop}|flip_lr|value_range(-1, 1)"
    super().__init__(records, middle, max_bad)
    self._middle, self._seed = self.preprocess, seed
    self._crop = Preprocess(crop, records.dtype, records.shape, records.name)
    self.strings = (middle, f"{middle}, mirrored", *[crop] * (views - 2))[:views]
    self.preprocess = self  # The pipeline calls it, and asks for its spec.
    self.spec = {"image": ((views, *self.image_size), "float32"), "label": ((), "int32")}

  def __call__(self, example, seed, index):
    """All views of the example {image, label} at `index`; the pipeline's own seed has no say."""
    del seed
    tf = tensorflow()
    first = self._middle(example, 0, index)
    images = [first["image"], tf.reverse(first["image"], [1])][: len(self.strings)]
    for view in range(2, len(self.strings)):
      images.append(self._crop(example, self._seed * AT_MOST + view, index)["image"])
    return {"image": tf.stack(images), "label": first["label"]}

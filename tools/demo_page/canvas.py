"""Between what a browser shows or sends and the arrays that a model takes."""

import numpy as np

SIDE = 256  # Small images are shown enlarged, about so many pixels wide.
COVERED = 0.25  # A pixel is to be filled in if so much of it is painted over.
PAINT = (230, 30, 120)
HIDDEN = 128  # The grey in place of what the model is not shown.

Size = tuple[int, int, int]


def enlarge(image: np.ndarray, side: int = SIDE) -> np.ndarray:
  """uint8 [H, W, C] as [s H, s W, 3], each pixel an s x s block, about `side` pixels high."""
  scale = max(1, side // image.shape[0])
  return np.broadcast_to(_blocks(image, scale), (*np.multiply(image.shape[:2], scale), 3))


def _blocks(array: np.ndarray, scale: int) -> np.ndarray:
  return array.repeat(scale, axis=0).repeat(scale, axis=1)


def cover(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """The image [H, W, C], grey where the mask [H, W] is true."""
  return np.where(mask[..., None], np.uint8(HIDDEN), image)


def _over_white(image):
  """A Pillow image, upright, as RGB; transparent parts are white."""
  from PIL import Image, ImageOps

  image = ImageOps.exif_transpose(image)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert("RGB")


def _middle(width: int, height: int, size: Size) -> tuple[float, float, float, float]:
  """The largest box (left, top, right, bottom) in the middle of the proportions of `size`."""
  rows, columns, _ = size
  scale = min(width / columns, height / rows)
  left, top = (width - columns * scale) / 2, (height - rows * scale) / 2
  return left, top, left + columns * scale, top + rows * scale


def fit(image, size: Size) -> tuple[np.ndarray, str]:
  """A Pillow image as uint8 (H, W, C) of the model's size, and what was done to it ("" if nothing).

  One of another size is cropped to the middle and resized. What `enlarge` made comes back exactly.
  """
  from PIL import Image

  image = _over_white(image)
  (width, height), (rows, columns, channels) = image.size, size
  whole = width % columns == 0 and width * rows == height * columns
  how = Image.Resampling.BOX if whole else Image.Resampling.BILINEAR
  small = image.resize((columns, rows), how, box=_middle(width, height, size))
  exact = whole and np.array_equal(_blocks(np.asarray(small), width // columns), image)
  done = f"{height} x {width} px, cropped to the middle and resized to {rows} x {columns}"
  small = small.convert("L") if channels == 1 else small
  return np.asarray(small, np.uint8).reshape(size), "" if exact else done


def paint(mask: np.ndarray, scale: int) -> np.ndarray:
  """A mask [H, W] as a layer of the editor: RGBA, [s H, s W, 4], transparent where it is false."""
  layer = np.zeros((*mask.shape, 4), np.uint8)
  layer[mask] = (*PAINT, 255)
  return _blocks(layer, scale)


def painted(layers, size: Size) -> np.ndarray:
  """bool [H, W] of the model's size: what is painted over in Pillow layers of one size.

  The same part in the middle is taken as `fit` takes of an image of that size.
  """
  from PIL import Image

  share = np.zeros(size[:2], np.float32)
  for layer in layers:
    alpha = layer.convert("RGBA").getchannel("A").point(lambda level: 255 * (level > 0))
    box = _middle(*alpha.size, size)
    alpha = alpha.resize((size[1], size[0]), Image.Resampling.BOX, box=box)
    share = np.maximum(share, np.asarray(alpha, np.float32) / 255)
  # A line too thin for that counts where it is thickest.
  return share >= max(min(COVERED, float(share.max())), 1e-6)


def white(image, size: Size, image_size: tuple[int, int]) -> np.ndarray:
  """bool [H, W] of the model's size: where a black and white Pillow image is white.

  Args:
    image: the mask; of the size of the picture that it is for, or of the model's.
    size: (H, W, C).
    image_size: (width, height) of that picture.

  Raises:
    ValueError: it has another size.
  """
  from PIL import Image

  levels = image.convert("L").point(lambda level: 255 * (level > 127))
  if levels.size not in ((size[1], size[0]), image_size):
    raise ValueError(
      f"the mask is {levels.size[1]} x {levels.size[0]} px: make it of the image's size, "
      f"{image_size[1]} x {image_size[0]}, or of the model's, {size[0]} x {size[1]}."
    )
  alpha = Image.new("RGBA", levels.size)
  alpha.putalpha(levels)
  return painted([alpha], size)

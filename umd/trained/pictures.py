"""Reads images and masks for a model from files, and writes grids and animations."""

import os
from collections.abc import Sequence

import numpy as np

from umd.runs import workdir
from umd.runs.progress import Tell, say
from umd.runs.writers import to_grid

ANIMATIONS = (".webp", ".gif")
FRAME, LAST = 80, 1500  # Milliseconds that a frame, and the last one, are shown.
SIDE = 64  # Smaller images are enlarged to about so many pixels.

Size = tuple[int, int, int]


def _open(path: str):
  """Opens a Pillow image, upright."""
  from PIL import Image, ImageOps, UnidentifiedImageError

  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f"{path!r}: there is no such file. Give the path of an image.")
  try:
    image = Image.open(path)
    image.load()
    return ImageOps.exif_transpose(image)
  except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"{path!r} cannot be read as an image: {error}.") from None


def _fit(image, size: Size, resample):
  """Crops the largest part in the middle of the model's proportions, and resizes it."""
  (width, height), (rows, columns, _) = image.size, size
  scale = min(width / columns, height / rows)
  left, top = (width - columns * scale) / 2, (height - rows * scale) / 2
  box = (left, top, left + columns * scale, top + rows * scale)
  return image.resize((columns, rows), resample, box=box)


def read_image(path: str, size: Size, tell: Tell = say) -> np.ndarray:
  """Reads an image as uint8 (H, W, C) of the model's size, transparent parts over white.

  An image of another size is cropped to the middle and resized, and `tell` says so.

  Raises:
    FileNotFoundError, ValueError: there is no such file, or it is no image.
  """
  from PIL import Image

  image = _open(path)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  image = image.convert("L" if size[2] == 1 else "RGB")
  if image.size != (size[1], size[0]):
    tell(
      f"{path}: {image.size[1]} x {image.size[0]} px, cropped to the middle and resized to "
      f"{size[0]} x {size[1]}"
    )
    image = _fit(image, size, Image.Resampling.BILINEAR)
  return np.asarray(image, np.uint8).reshape(size)


def _box(text: str, size: Size) -> np.ndarray:
  mask, parts = np.zeros(size[:2], bool), text.split(",")
  if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
    raise ValueError(f"--mask=box:{text} must be box:TOP,LEFT,HEIGHT,WIDTH in pixels.")
  top, left, height, width = map(int, parts)
  if not height or not width or top + height > size[0] or left + width > size[1]:
    raise ValueError(
      f"--mask=box:{text} must hold pixels of the model's images, which are {size[0]} x {size[1]}."
    )
  mask[top : top + height, left : left + width] = True
  return mask


def read_mask(mask: str, size: Size, image_file: str) -> np.ndarray:
  """Reads a mask as bool [H, W] of the model's size, true where an image is to be filled in.

  Args:
    mask: "box:TOP,LEFT,HEIGHT,WIDTH" in pixels of the model's images, or an image file, white where
      it is to be filled in, of the size of `image_file` (and treated alike) or the model's.
    size: (H, W, C).
    image_file: the image that the mask is for.

  Raises:
    FileNotFoundError, ValueError: there is no such file, it has another size, or marks nothing.
  """
  from PIL import Image

  if mask.startswith("box:"):
    return _box(mask.removeprefix("box:"), size)
  white = _open(mask).convert("L").point(lambda level: 255 * (level > 127))
  if white.size not in ((size[1], size[0]), _open(image_file).size):
    raise ValueError(
      f"--mask={mask!r} is {white.size[1]} x {white.size[0]} px: make it of the size of "
      f"{image_file!r}, or of the model's images, {size[0]} x {size[1]}."
    )
  if white.size != (size[1], size[0]):
    white = _fit(white, size, Image.Resampling.BOX)
  marked = np.asarray(white) > 0  # Any white in a pixel counts.
  if not marked.any():
    raise ValueError(f"--mask={mask!r} has nothing white, so there is nothing to fill in.")
  return marked


def grid(images: np.ndarray, columns: int) -> np.ndarray:
  """Arranges uint8 images [n, H, W, C] in rows of `columns`, small ones enlarged."""
  scale = max(1, SIDE // images.shape[1])
  return to_grid(images.astype(np.float32) / 127.5 - 1, columns, scale).pixels


def encode_png(pixels: np.ndarray) -> bytes:
  """Encodes uint8 [H, W, 1 or 3] as a PNG file."""
  import io

  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
  return file.getvalue()


def write_png(path: str, pixels: np.ndarray) -> None:
  """Writes a PNG file in one piece."""
  workdir.write_bytes(path, encode_png(pixels))


def write_animation(path: str, frames: Sequence[np.ndarray]) -> None:
  """Writes frames uint8 [H, W, 1 or 3] as an endless animation, .webp or .gif, in one piece."""
  import io

  from PIL import Image

  as_rgb = lambda frame: np.broadcast_to(frame, (*frame.shape[:2], 3))
  first, *rest = (Image.fromarray(np.ascontiguousarray(as_rgb(frame))) for frame in frames)
  file, last = io.BytesIO(), [FRAME] * len(rest) + [LAST]
  kind = {"lossless": True} if path.endswith(".webp") else {}
  first.save(
    file,
    os.path.splitext(path)[1][1:].upper(),
    save_all=True,
    append_images=rest,
    duration=last,
    loop=0,
    **kind,
  )
  workdir.write_bytes(path, file.getvalue())

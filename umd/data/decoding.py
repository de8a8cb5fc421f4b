"""Encoded images to pixels, as a viewer shows them, whole or a window of them.

TensorFlow decodes the usual kinds, inside the graph. Pillow decodes the rare ones that TensorFlow
refuses or gets wrong: transparent palettes and WebPs, GIFs, BMPs of less than 24 bits.

Transparent pixels are shown over white, the page for which most such images are made: drawings and
letters are mostly dark, and would vanish over black. 16 bits become 8 by value / 257. CMYK becomes
RGB. The orientation in EXIF is not applied, as in all pipelines of ImageNet.
"""

import io
import math

import numpy as np

from umd.data.host import tensorflow

ASPECT_RATIOS = (3 / 4, 4 / 3)  # Width by height, of inception crops.
RATIOS = (1, 2, 4, 8)  # A JPEG decoder can shrink an image by them: its blocks are 8 x 8 pixels.
# The accurate inverse DCT: TensorFlow's default is darker by .8 of 255.
JPEG = dict(dct_method="INTEGER_ACCURATE")

# The first bytes, in which the kinds differ; \C is any byte. A PNG has its colour type at byte 25;
# a chunk tRNS, before the pixels but perhaps after profiles and texts, makes colours transparent.
# A BMP has the bits of a pixel at byte 28. WebPs of the kind "VP8 " are opaque.
BEGIN = 1 << 16
PNG_ALPHA = r"\CPNG\r\n\x1a\n\C{17}[\x04\x06]\C*"
SPECIAL = rf"{PNG_ALPHA}|\CPNG\r\n\x1a\n\C*tRNS\C*|GIF8\C*|BM\C*|RIFF\C{{4}}WEBP\C*"
USUAL = r"BM\C{26}\x18\x00\C*|RIFF\C{4}WEBPVP8 \C*"
FORMATS = ("PNG", "GIF", "BMP", "WEBP")  # Of Pillow's many kinds: some run other programs.


def decoded(data, shape, channels=None):
  """Returns uint8 [H, W, C] of a JPEG, PNG, GIF, BMP or WebP; of a moving one, the first image.

  Args:
    data: bytes, a tensor.
    shape: (H, W, C) of the source's images, None where it is not known. Where C is known, as TFDS
      declares it, no pixels are transparent: an alpha channel is ignored.
    channels: 1, 3, or 4 (PNG only: the alpha channel is kept); None: those of `shape`, else 3.
  """
  tf = tensorflow()
  channels = channels or shape[2] or 3
  of_jpeg = lambda: tf.io.decode_jpeg(data, channels=channels, **JPEG)

  def of_other():
    image = _rgb(data) if shape[2] is None else _plain(data)
    return image if channels == 3 else tf.image.rgb_to_grayscale(image)

  if channels == 4:
    image = tf.io.decode_png(data, channels=4)
  else:
    image = tf.cond(tf.io.is_jpeg(data), of_jpeg, of_other)
  known = shape[:2] if shape[2] in (None, channels) else (None, None)
  return tf.ensure_shape(image, [*known, channels])


def _plain(data):
  """Returns uint8 [H, W, 3] as TensorFlow decodes it."""
  return tensorflow().io.decode_image(data, channels=3, expand_animations=False)


def _rgb(data):
  """Returns uint8 [H, W, 3] of an image that is no JPEG."""
  tf = tensorflow()
  begin = tf.strings.substr(data, 0, BEGIN)
  like = tf.strings.regex_full_match

  def over_white():
    rgba = tf.cast(tf.io.decode_png(data, channels=4), tf.int32)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    return tf.cast((color * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)

  def by_pillow():
    image = tf.numpy_function(_pillow, [data], tf.uint8, stateful=False)
    return tf.ensure_shape(image, [None, None, 3])

  def special():
    of_other = lambda: tf.cond(like(begin, USUAL), usual, by_pillow)
    return tf.cond(like(begin, PNG_ALPHA), over_white, of_other)

  usual = lambda: _plain(data)  # What is no image at all gets its error from TensorFlow.
  return tf.cond(like(begin, SPECIAL), special, usual)


def _pillow(data) -> np.ndarray:
  """Returns uint8 [H, W, 3] of what TensorFlow cannot read, or not rightly.

  Raises:
    tf.errors.InvalidArgumentError: it is damaged.
  """
  from PIL import Image  # Only the rare kinds need it.

  data = data if isinstance(data, bytes) else data.item()  # Eager calls give an array of them.
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      if image.mode.startswith("I"):  # 16 bits; Pillow would clip.
        values = np.asarray(image)
        clear = values == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(clear, 255, np.round(values / 257)).astype(np.uint8))
      if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
      return np.asarray(image.convert("RGB"))
  except Exception as error:  # Damaged files make Pillow raise errors of many kinds.
    reason = str(error).split(" <_io")[0] or type(error).__name__
    raise tensorflow().errors.InvalidArgumentError(None, None, reason) from None


def resized(image, size):
  """Returns float32 [*size, C] of an image: bilinear, antialiased."""
  return tensorflow().image.resize(image, size, method="bilinear", antialias=True)


def inception_window(shape, seed, area: tuple[float, float]):
  """Returns a random window (top, left, height, width) of an image; `area` in percent of it."""
  tf = tensorflow()
  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    shape,
    tf.zeros([0, 0, 4]),
    seed=seed,
    min_object_covered=0,
    aspect_ratio_range=ASPECT_RATIOS,
    area_range=(area[0] / 100, area[1] / 100),
    max_attempts=100,
    use_image_if_no_bounding_boxes=True,
  )
  return tf.concat([begin[:2], extent[:2]], axis=0)


def window_of_jpeg(data, window, size: tuple[int, int], scaled: float, channels: int):
  """Returns float32 [*size, C] of a window of a JPEG, bilinear and antialiased.

  Of the 8 x 8 coefficients of a block the decoder can drop the highest, which makes an image 2, 4
  or 8 times smaller: most of them are for details that resizing would take away again.

  Args:
    data: the JPEG's bytes, a tensor.
    window: int32 (top, left, height, width) in pixels of the whole image.
    size: (height, width) of the result.
    scaled: how many times `size` the decoded window still has, at least, on both sides; the image
      is decoded as small as that allows. 0: at its full size.
    channels: C, 1 or 3.
  """
  tf = tensorflow()
  decode = lambda cut, ratio: tf.io.decode_and_crop_jpeg(
    data, cut, channels=channels, ratio=ratio, **JPEG
  )
  if not scaled:
    return resized(decode(window, 1), size)
  room = tf.reduce_min(window[2:] // [math.ceil(side * scaled) for side in size])
  chosen = tf.reduce_sum(tf.cast(room >= RATIOS[1:], tf.int32))  # Where 4 fits, 2 does.
  ratio = tf.gather(RATIOS, chosen)
  # The whole pixels, of the smaller image, that have a share in the window.
  begin, end = window[:2] // ratio, (window[:2] + window[2:] + ratio - 1) // ratio
  cut = tf.concat([begin, end - begin], axis=0)
  pixels = tf.switch_case(chosen, [lambda ratio=ratio: decode(cut, ratio) for ratio in RATIOS])
  # The window's corner lies up to 7/8 of a pixel inside of them: rounded, it would shift the image.
  exact = tf.cast(window, tf.float32) / tf.cast(ratio, tf.float32)
  scale = tf.constant(size, tf.float32) / exact[2:]
  return tf.raw_ops.ScaleAndTranslate(
    images=pixels[None],
    size=size,
    scale=scale,
    translation=(tf.cast(begin, tf.float32) - exact[:2]) * scale,
    kernel_type="triangle",
    antialias=True,
  )[0]

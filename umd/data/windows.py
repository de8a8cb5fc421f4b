"""Random windows of images, resized; of JPEGs only what is needed is decoded, and no finer."""

import math

from umd.data.decoding import JPEG
from umd.data.host import tensorflow

ASPECT_RATIOS = (3 / 4, 4 / 3)  # Width by height, of inception crops.
RATIOS = (1, 2, 4, 8)  # By which a JPEG decoder can shrink an image: its blocks are 8 x 8 pixels.


def inception_window(shape, seed, area: tuple[float, float]):
  """A random window (top, left, height, width) of an image of `shape`; `area` in percent."""
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


def resized(image, size):
  """float32 [*size, C] of an image: bilinear, antialiased."""
  return tensorflow().image.resize(image, size, method="bilinear", antialias=True)


def window_of_jpeg(data, window, size: tuple[int, int], scaled: float, channels: int):
  """float32 [*size, C] of a window of a JPEG, bilinear and antialiased.

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
  if not scaled:
    return resized(_decoded(data, window, channels, 1), size)
  room = tf.reduce_min(window[2:] // [math.ceil(side * scaled) for side in size])
  chosen = tf.reduce_sum(tf.cast(room >= RATIOS[1:], tf.int32))  # Where 4 fits, 2 does.
  ratio = tf.gather(RATIOS, chosen)
  # The whole pixels that have a share in the window.
  begin, end = window[:2] // ratio, (window[:2] + window[2:] + ratio - 1) // ratio
  cut = tf.concat([begin, end - begin], axis=0)
  branches = [lambda ratio=ratio: _decoded(data, cut, channels, ratio) for ratio in RATIOS]
  pixels = tf.switch_case(chosen, branches)
  # The window's corner lies up to 7/8 of a pixel inside of them: rounded, it would shift the image.
  real = tf.cast(window, tf.float32) / tf.cast(ratio, tf.float32)
  scale = tf.constant(size, tf.float32) / real[2:]
  return tf.raw_ops.ScaleAndTranslate(
    images=pixels[None],
    size=size,
    scale=scale,
    translation=(tf.cast(begin, tf.float32) - real[:2]) * scale,
    kernel_type="triangle",
    antialias=True,
  )[0]


def _decoded(data, window, channels: int, ratio: int):
  """uint8 [h, w, C] of a window of the image that is `ratio` times smaller, in its pixels."""
  return tensorflow().io.decode_and_crop_jpeg(data, window, channels=channels, ratio=ratio, **JPEG)

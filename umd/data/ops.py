"""Preprocessing ops: what may stand in a `pp` string, as in "decode|resize(64)|flip_lr".

Each function here takes an op's arguments and returns the op: a function of an example (a dict of
tensors with at least `image` and `label`) and of its OpContext, which returns the changed example.
Images are [H, W, C]: uint8 after decoding, float32 from the first resize on. All that resizes is
bilinear and antialiased.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from umd.data.decoding import decoded, inception_window, resized, window_of_jpeg
from umd.data.host import tensorflow

Example = dict[str, Any]
Size = int | tuple[int, int]  # The side of a square, or (height, width).


@dataclasses.dataclass(frozen=True)
class OpContext:
  """What an op knows apart from the example.

  Attributes:
    seed: int64 [2], from which the op draws all that it draws for this example.
    shape: (H, W, C) of the source's images, None where it is not known before decoding.
  """

  seed: Any
  shape: tuple[int | None, ...]


Op = Callable[[Example, OpContext], Example]


def decode(channels: int | None = None) -> Op:
  """Decodes JPEG, PNG, GIF (first frame), BMP or WebP to uint8; leaves decoded images as they are.

  `channels` is 1, 3 or 4 (PNG only); by default the source's where it knows them, else 3.
  Transparent pixels are shown over white, and EXIF orientation is ignored: see
  `umd.data.decoding`.
  """
  if channels not in (None, 1, 3, 4):
    raise ValueError(f"channels={channels!r} must be 1, 3 or 4.")

  def op(example, context):
    image = example["image"]
    if image.dtype != tensorflow().string:
      return example
    return {**example, "image": decoded(image, context.shape, channels)}

  return op


def decode_jpeg_and_inception_crop(
  size: Size, area_min: float = 5, area_max: float = 100, scaled: float = 1.25
) -> Op:
  """Does what decode|inception_crop does, but of a JPEG decodes only what is kept, and coarsely.

  The window is decoded 2, 4 or 8 times smaller if it then still has `scaled` times the pixels of
  `size` on both sides. 0 decodes as decode|inception_crop does. At 64 px, photographs of 500 x 375
  differ from that by 1.1 of 255 on average, by .3 with scaled=2, and by 10 without antialiasing.
  """
  size, crop_pixels = _pair("size", size), inception_crop(size, area_min, area_max)
  if not (scaled == 0 or 1 <= scaled < math.inf):
    raise ValueError(
      f"scaled={scaled} must be 0 (decode in full) or at least 1, the sides of the decoded window "
      "by those of the result."
    )

  def op(example, context):
    tf = tensorflow()
    data = example["image"]
    if data.dtype != tf.string:
      return crop_pixels(example, context)
    channels = context.shape[2] or 3

    def of_jpeg():
      window = inception_window(tf.io.extract_jpeg_shape(data), context.seed, (area_min, area_max))
      return window_of_jpeg(data, window, size, scaled, channels)

    def of_other():
      return crop_pixels({"image": decoded(data, context.shape, channels)}, context)["image"]

    image = tf.cond(tf.io.is_jpeg(data), of_jpeg, of_other)
    return {**example, "image": tf.ensure_shape(image, [*size, channels])}

  return op


def inception_crop(size: Size, area_min: float = 5, area_max: float = 100) -> Op:
  """Cuts a random window and resizes it to `size`.

  The window has area_min to area_max percent of the image's area and a width of 3/4 to 4/3 of its
  height; an image too elongated for that is taken whole (Szegedy et al., arXiv:1409.4842).
  """
  size = _pair("size", size)
  if not 0 < area_min <= area_max <= 100:
    raise ValueError(
      f"area_min={area_min}, area_max={area_max} must be percents, 0 < area_min <= area_max <= 100."
    )

  def crop(image, context):
    window = inception_window(tensorflow().shape(image), context.seed, (area_min, area_max))
    return resized(_cut(image, window[:2], window[2:]), size)

  return _on_image("inception_crop", crop)


def random_crop(size: Size, padding: int = 0) -> Op:
  """Cuts a random window of `size` after putting `padding` black pixels around the image."""
  size = _pair("size", size)
  if padding < 0:
    raise ValueError(f"padding={padding} must not be negative.")

  def crop(image, context):
    tf = tensorflow()
    image = tf.pad(image, [[padding, padding], [padding, padding], [0, 0]])
    room = _room("random_crop", image, size)
    drawn = tf.random.stateless_uniform([2], context.seed, dtype=tf.float64, alg="philox")
    offset = tf.cast(drawn * tf.cast(room + 1, tf.float64), tf.int32)
    return _cut(image, offset, size)

  return _on_image("random_crop", crop)


def central_crop(size: Size) -> Op:
  """Cuts the window of `size` in the middle."""
  size = _pair("size", size)
  crop = lambda image, context: _cut(image, _room("central_crop", image, size) // 2, size)
  return _on_image("central_crop", crop)


def resize(size: Size) -> Op:
  """Resizes to `size`, whatever that does to the aspect ratio."""
  size = _pair("size", size)
  return _on_image("resize", lambda image, context: resized(image, size))


def resize_small(size: int) -> Op:
  """Resizes so that the smaller side becomes `size`; keeps the aspect ratio."""
  if not isinstance(size, int) or size < 1:
    raise ValueError(f"size={size!r} must be a positive int, the length of the smaller side.")

  def scale(image, context):
    tf = tensorflow()
    sides = tf.cast(tf.shape(image)[:2], tf.float64)
    return resized(image, tf.cast(tf.round(sides * size / tf.reduce_min(sides)), tf.int32))

  return _on_image("resize_small", scale)


def expect_size(height: int, width: int, hint: str = "") -> Op:
  """Lets images of this size pass; another is an error, which says both sizes and `hint`."""
  size = _pair("(height, width)", (height, width))

  def check(image, context):
    # In a graph sizes may be unknown. If TensorFlow then finds another, the pipeline applies the op
    # once more, outside of graphs.
    if any(x not in (None, y) for x, y in zip(image.shape[:2], size, strict=True)):
      actual = " x ".join(str(side) for side in image.shape[:2])
      raise ValueError(f"the image is {actual}, not {height} x {width}{hint}")
    return tensorflow().ensure_shape(image, [height, width, image.shape[-1]])

  return _on_image("expect_size", check)


def flip_lr() -> Op:
  """Mirrors every other image, at random."""
  flip = lambda image, context: tensorflow().image.stateless_random_flip_left_right(
    image, context.seed
  )
  return _on_image("flip_lr", flip)


def value_range(low: float, high: float, in_min: float = 0, in_max: float = 255) -> Op:
  """Maps in_min..in_max linearly to low..high."""
  if in_min == in_max:
    raise ValueError(f"in_min={in_min} and in_max={in_max} must differ.")

  def scale(image, context):
    image = tensorflow().cast(image, "float32")
    return (image - in_min) * ((high - low) / (in_max - in_min)) + low

  return _on_image("value_range", scale)


def onehot(num_classes: int, key: str = "label", key_result: str = "labels") -> Op:
  """Adds `key_result`: float32 [num_classes], 1 at the class that `key` holds."""

  def op(example, context):
    return {**example, key_result: tensorflow().one_hot(_item(example, key), num_classes)}

  return op


def no_labels() -> Op:
  """Sets every label to 0: for records without labels (-1 in TFDS), and training that uses none."""
  return lambda example, context: {**example, "label": tensorflow().zeros([], "int32")}


def keep(*names: str) -> Op:
  """Drops all that is not named."""
  return lambda example, context: {name: _item(example, name) for name in names}


def random_view() -> Op:
  """Takes one of the stored views, all of them equally often: [V, h, w, c] -> [h, w, c]."""

  def choose(views, context):
    tf = tensorflow()
    drawn = tf.random.stateless_uniform([], context.seed, dtype=tf.float64, alg="philox")
    return tf.gather(views, tf.cast(drawn * views.shape[0], tf.int32))

  return _on_views("random_view", choose)


def view(number: int) -> Op:
  """Takes the stored view of that number, from 0: [V, h, w, c] -> [h, w, c]."""
  if isinstance(number, bool) or not isinstance(number, int) or number < 0:
    raise ValueError(f"number={number!r} must be an int, 0 or more.")

  def choose(views, context):
    if number >= views.shape[0]:
      raise ValueError(f"there are views 0..{views.shape[0] - 1}, but no view {number}.")
    return views[number]

  return _on_views("view", choose)


OPS: Mapping[str, Callable[..., Op]] = {
  f.__name__: f
  for f in (
    decode,
    decode_jpeg_and_inception_crop,
    inception_crop,
    random_crop,
    central_crop,
    resize,
    resize_small,
    expect_size,
    flip_lr,
    value_range,
    onehot,
    no_labels,
    keep,
    random_view,
    view,
  )
}
FOR_LATENTS = ("random_view", "view", "onehot", "no_labels", "keep")  # The others are for images.


def _pair(name, size) -> tuple[int, int]:
  pair = (size, size) if isinstance(size, int) else tuple(size)
  if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
    raise ValueError(f"{name}={size!r} must be a positive int or (height, width).")
  return pair


def _item(example, name):
  if name not in example:
    raise ValueError(f"there is no {name!r} here, only {sorted(example)}.")
  return example[name]


def _on_image(name, change) -> Op:
  """Returns the op that replaces the decoded image by change(image, context)."""

  def op(example, context):
    image = _item(example, "image")
    if image.dtype == tensorflow().string:
      raise ValueError(f"the image is still encoded: put decode before {name}.")
    return {**example, "image": change(image, context)}

  return op


def _on_views(name, choose) -> Op:
  """Returns the op that replaces stored views by choose(views, context), float32."""

  def op(example, context):
    views = example.get("image")
    if views is None or views.dtype == tensorflow().string or views.shape.rank != 4:
      raise ValueError(
        f"{name} chooses among stored views, and here are none (or no more): it is for data "
        "'latents:DIR', once."
      )
    return {**example, "image": tensorflow().cast(choose(views, context), "float32")}

  return op


def _cut(image, corner, size):
  """Returns the window of that size (height, width) whose upper left corner is at (top, left)."""
  return tensorflow().slice(image, [corner[0], corner[1], 0], [size[0], size[1], image.shape[-1]])


def _room(name, image, size):
  """Returns int32 [2]: by how much the image is higher and wider than `size`."""
  tf = tensorflow()
  message = f"{name}: an image is smaller than {tuple(size)}; put resize_small before it."
  if any(x is not None and x < y for x, y in zip(image.shape[:2], size, strict=True)):
    raise ValueError(message)
  room = tf.shape(image)[:2] - tf.constant(size)
  with tf.control_dependencies([tf.debugging.assert_non_negative(room, message)]):
    return tf.identity(room)

"""Strings of preprocessing ops: parsed, checked on shapes before any data is read, and applied."""

import ast
import difflib

from umd.data.host import tensorflow
from umd.data.ops import FOR_LATENTS, OPS, Example, Op, OpContext

EXAMPLE = "decode|resize_small(64)|central_crop(64)|value_range(-1, 1)"
OPS_AT_MOST = 1024  # Ops of one string: each has its own random numbers.


def parse(pp: str) -> list[tuple[str, Op]]:
  """Returns the ops of a string such as "decode|resize(64)", each with its part of the string.

  Arguments are literals, by position or by name; parentheses may be left out where there are none.

  Raises:
    ValueError: the string, a name or an argument is wrong.
  """
  if not pp.strip():
    return []
  try:
    tree = ast.parse(pp.strip(), mode="eval").body
  except SyntaxError as error:
    raise ValueError(f"pp={pp!r}: {error.msg}. An example: {EXAMPLE!r}.") from None
  nodes = []
  while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
    nodes.append(tree.right)
    tree = tree.left
  nodes.append(tree)
  if len(nodes) > OPS_AT_MOST:
    raise ValueError(f"pp has {len(nodes)} ops; {OPS_AT_MOST} is the most.")
  return [(ast.unparse(node), _build(node, pp)) for node in reversed(nodes)]


def _build(node: ast.expr, pp: str) -> Op:
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  text = ast.unparse(node)
  if not isinstance(call.func, ast.Name):
    raise ValueError(f"pp={pp!r}: {text!r} is no op. An example: {EXAMPLE!r}.")
  name = call.func.id
  if name not in OPS:
    near = difflib.get_close_matches(name, OPS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"pp={pp!r}: there is no op {name!r}.{hint} Known: {', '.join(OPS)}.")
  try:
    args = [ast.literal_eval(arg) for arg in call.args]
    kwargs = {arg.arg: ast.literal_eval(arg.value) for arg in call.keywords}
  except (ValueError, TypeError):
    raise ValueError(
      f"pp={pp!r}: the arguments of {text} must be numbers, strings or tuples."
    ) from None
  try:
    return OPS[name](*args, **kwargs)
  except (ValueError, TypeError) as error:
    raise ValueError(f"pp={pp!r}: {text}: {error} (docs/data.md lists the ops.)") from None


class Preprocess:
  """The ops of a pp string, in order.

  Attributes:
    spec: {key: (shape, dtype)} of what comes out.
    image_size: (H, W, C) of the images that come out.
  """

  def __init__(self, pp: str, dtype: str, shape: tuple[int | None, ...], name: str):
    """Parses the string and traces it on shapes.

    Args:
      pp: the string; "" changes nothing.
      dtype: of the images that come in: "string" if they are encoded, "uint8", "float32".
      shape: (H, W, C) of these images, after decoding where they are encoded; None where it is not
        known. Stored latents have (V, h, w, 2c): V views of moments.
      name: of the data, in messages.

    Raises:
      ValueError: the string is wrong, or what comes out is no float32 [H, W, C] of known size.
    """
    self._ops, self._shape = parse(pp), shape
    if not self._ops and dtype == "float32" and len(shape) == 3 and None not in shape:
      self.spec = {"image": (shape, "float32"), "label": ((), "int32")}  # Without TensorFlow.
    else:
      self.spec = self._trace(dtype, f"data {name!r}, pp={pp!r}")
    self.image_size = self.spec["image"][0]

  def __call__(self, example: Example, seed: int, position) -> Example:
    """Returns the example {image, label, ...} preprocessed.

    All that is drawn is a function of `seed`, `position` (int64, may be a tensor) and the op's
    place in the string.
    """
    tf = tensorflow()
    position = tf.cast(position, tf.int64)
    for i, (_, op) in enumerate(self._ops):
      drawn = tf.stack([tf.constant(seed * OPS_AT_MOST + i, tf.int64), position])
      example = op(example, OpContext(drawn, self._shape))
    casts = {"image": tf.float32, "label": tf.int32}
    example = {k: tf.cast(v, casts.get(k, v.dtype)) for k, v in example.items()}
    return {k: tf.ensure_shape(v, self.spec[k][0]) for k, v in example.items()}

  def _trace(self, dtype: str, where: str) -> dict[str, tuple]:
    """Returns the spec; ValueError, beginning with `where`, if an op or the result does not fit."""
    tf = tensorflow()
    of_latents = len(self._shape) == 4
    with tf.Graph().as_default():
      image = tf.compat.v1.placeholder(dtype, [] if dtype == "string" else self._shape)
      example = {"image": image, "label": tf.compat.v1.placeholder(tf.int32, [])}
      seed = tf.compat.v1.placeholder(tf.int64, [2])
      for text, op in self._ops:
        if of_latents and text.partition("(")[0] not in FOR_LATENTS:
          raise ValueError(
            f"{where}: {text} is for images, but these are latents, made after it. What may stand "
            f"here: {', '.join(FOR_LATENTS)}."
          )
        try:
          example = op(example, OpContext(seed, self._shape))
        except (ValueError, TypeError) as error:
          raise ValueError(f"{where}: {text}: {error}") from None
    for key in ("image", "label"):
      if key not in example:
        raise ValueError(f"{where} drops {key!r}, which is needed: name it in keep.")
    image = example["image"]
    if image.dtype == tf.string:
      raise ValueError(f"{where} leaves images encoded: begin with decode, as in {EXAMPLE!r}.")
    if not image.dtype.is_floating:
      raise ValueError(f"{where} ends with {image.dtype.name} images: add value_range(-1, 1).")
    if of_latents and image.shape.rank == 4:
      raise ValueError(
        f"{where} leaves all {self._shape[0]} views of an image: add random_view (training) or "
        "view(0) (evaluation)."
      )
    if image.shape.rank != 3 or None in tuple(image.shape):
      raise ValueError(
        f"{where} ends with images of size {tuple(image.shape)}, but batches need one known size: "
        "add resize(SIZE), or resize_small(SIZE)|central_crop(SIZE)."
      )
    spec = {k: (tuple(v.shape), v.dtype.name) for k, v in example.items()}
    return {**spec, "image": (tuple(image.shape), "float32")}

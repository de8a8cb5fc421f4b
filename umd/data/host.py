"""TensorFlow as this package uses it: on the host only."""

import functools
import os
import re
from collections.abc import Callable

OK = "_ok"  # What `guarded` adds: whether the function succeeded.


@functools.lru_cache(maxsize=1)
def tensorflow():
  """The module tensorflow, imported at the first call and kept off accelerators: JAX's memory."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # It would announce itself.
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf


def process_count() -> int:
  """Number of JAX processes."""
  import jax

  return jax.process_count()


def in_graph(function):
  """`function` for tf.data, as it is written: autograph would rewrite it, slowly."""
  return tensorflow().autograph.experimental.do_not_convert(function)


def guarded(function: Callable, spec: dict[str, tuple]) -> Callable:
  """`function` of tf.data, which returns zeros where it fails, and tells so in OK.

  A graph cannot catch an error, but a data set may leave out an element that raises one: here each
  has a data set of its own, so that none changes place. That costs some 80 us an example.

  Args:
    function: row -> {key: tensor}.
    spec: {key: (shape, dtype)} of what it returns.
  """
  tf = tensorflow()

  def attempt(row):
    tell = lambda row: {**function(row), OK: True}
    found = tf.data.Dataset.from_tensors(row).map(in_graph(tell)).ignore_errors()
    nothing = {key: tf.zeros(shape, dtype) for key, (shape, dtype) in spec.items()}
    nothing = tf.data.Dataset.from_tensors({**nothing, OK: False})
    return found.concatenate(nothing).take(1).get_single_element()

  return attempt


def first_line(error: Exception) -> str:
  """The first line of an error, without TensorFlow's addresses of it."""
  text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]|name: *$", "", str(error)).strip().split("\n")[0]
  return text.strip().rstrip(".")

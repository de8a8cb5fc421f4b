"""TensorFlow as this package uses it: on the host only, imported when the first image is read."""

import functools
import os
import re
from collections.abc import Callable

# Set when this is imported: JAX sets a lower level, at which each damaged JPEG is a line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

OK = "_ok"  # The key under which `guarded` says whether the function succeeded.


@functools.lru_cache(maxsize=1)
def tensorflow():
  """Returns the module tensorflow; the memory of accelerators is left to JAX."""
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # It would print a line about itself.
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf


def in_graph(function: Callable) -> Callable:
  """Returns `function` for tf.data as it is written: autograph would rewrite it, slowly."""
  return tensorflow().autograph.experimental.do_not_convert(function)


def guarded(function: Callable, spec: dict[str, tuple]) -> Callable:
  """Returns `function` for tf.data, changed so that it gives zeros and OK = False where it fails.

  A graph cannot catch an error, but a data set may leave out an element that raises one. So each
  example becomes a data set of its own, which keeps its place. That costs some 80 us per example.

  Args:
    function: row -> {key: tensor}.
    spec: {key: (shape, dtype)} of what it returns.
  """
  tf = tensorflow()

  def attempt(row):
    success = lambda row: {**function(row), OK: True}
    results = tf.data.Dataset.from_tensors(row).map(in_graph(success)).ignore_errors()
    zeros = {key: tf.zeros(shape, dtype) for key, (shape, dtype) in spec.items()}
    fallback = tf.data.Dataset.from_tensors({**zeros, OK: False})
    return results.concatenate(fallback).take(1).get_single_element()

  return attempt


def first_line(error: Exception) -> str:
  """Returns the first line of an error, without the names of TensorFlow's nodes."""
  text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]|name: *$", "", str(error)).strip().split("\n")[0]
  return text.strip().rstrip(".")

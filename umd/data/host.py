"""TensorFlow as this package uses it: on the host only."""

import functools
import os


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


def process_zero() -> bool:
  """Whether this process is the one that speaks for all."""
  import jax

  return jax.process_index() == 0


def in_graph(function):
  """`function` for tf.data, as it is written: autograph would rewrite it, slowly."""
  return tensorflow().autograph.experimental.do_not_convert(function)

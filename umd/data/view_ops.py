"""Ops that choose one of the views in which latents were stored: see `umd.data.latents`."""

from umd.data.host import tensorflow

FOR_LATENTS = ("random_view", "view", "onehot", "no_labels", "keep")  # Others are for images.


def random_view():
  """One of the stored views at random, all of them equally often: [V, h, w, c] -> [h, w, c]."""

  def choose(views, context):
    tf = tensorflow()
    drawn = tf.random.stateless_uniform([], context.seed, dtype=tf.float64, alg="philox")
    return tf.gather(views, tf.cast(drawn * views.shape[0], tf.int32))

  return _of_views("random_view", choose)


def view(number: int):
  """The stored view of that number, from 0: [V, h, w, c] -> [h, w, c]."""
  if isinstance(number, bool) or not isinstance(number, int) or number < 0:
    raise ValueError(f"number={number!r} must be an int, 0 or more.")

  def choose(views, context):
    del context
    if number >= views.shape[0]:
      raise ValueError(f"there are views 0..{views.shape[0] - 1}, but no view {number}.")
    return views[number]

  return _of_views("view", choose)


def _of_views(name, choose):
  """The op that replaces stored views by choose(views, context), float32."""

  def op(example, context):
    views = example.get("image")
    if views is None or views.dtype == tensorflow().string or views.shape.rank != 4:
      raise ValueError(
        f"{name} chooses among stored views, and here are none (or no more): it is for data "
        "'latents:DIR', once."
      )
    return {**example, "image": tensorflow().cast(choose(views, context), "float32")}

  return op

"""Batches for training, in an order that is a pure function of (seed, epoch), and for evaluation.

The training stream is one endless sequence of examples: epoch after epoch, each a permutation
that depends on the seed and the epoch's number. Step n reads positions n B .. (n + 1) B - 1 of it,
so a run resumes at any step by starting there: no state is kept and nothing is read to get there.
"""

from collections.abc import Iterator

import numpy as np

from umd.data.sources import Source

Batch = dict[str, np.ndarray]
FOREVER = np.iinfo(np.int64).max


def train_batches(
  source: Source,
  batch_size: int,
  *,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Endless batches {image [b, H, W, C], label [b]}: this process's rows of the global batches.

  Args:
    source: where the images come from.
    batch_size: B over all processes; b = B / process_count.
    seed: of the order.
    start_step: the first batch to be returned.
    process_index: this process, in 0..process_count - 1.
    process_count: number of processes; must divide B.
  """
  import tensorflow as tf

  n, local = len(source), batch_size // process_count
  images, labels = tf.constant(source.images), tf.constant(source.labels)

  def read(step):
    position = step * batch_size + process_index * local + tf.range(local, dtype=tf.int64)
    epoch = position // n
    order = tf.stack([tf.fill([local], tf.cast(seed, tf.int64)), epoch, epoch * 0], axis=1)
    # A batch may span two epochs, so each position brings its own order; the public wrapper,
    # tf.random.experimental.index_shuffle, pads such a seed wrongly.
    last = tf.constant(n - 1, tf.int64)
    ids = tf.raw_ops.RandomIndexShuffle(index=position % n, seed=order, max_index=last)
    return {"image": tf.gather(images, ids), "label": tf.gather(labels, ids)}

  dataset = tf.data.Dataset.range(start_step, FOREVER).map(read, num_parallel_calls=2)
  return dataset.prefetch(4).as_numpy_iterator()


def eval_batches(
  source: Source, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
  """Every example once, in the source's order, the last batch filled up.

  Returns {image [b, H, W, C], label [b], index [b], _mask [b]}: `index` is the example's place in
  the source, `_mask` is 1 for examples and 0 for filling, which must not count anywhere.
  """
  local = batch_size // process_count
  for start in range(0, len(source), batch_size):
    index = start + process_index * local + np.arange(local)
    real = index < len(source)
    ids = np.where(real, index, 0)
    blank = lambda x, real=real: x * real.reshape(-1, *[1] * (x.ndim - 1))
    yield {
      "image": blank(source.images[ids]).astype(np.float32),
      "label": blank(source.labels[ids]).astype(np.int32),
      "index": index.astype(np.int32),
      "_mask": real.astype(np.float32),
    }

"""Batches for training, in an order that is a pure function of (seed, epoch), and for evaluation.

The training stream is one endless sequence of examples: epoch after epoch, each a permutation
that depends on the seed and the epoch's number. Step n reads positions n B .. (n + 1) B - 1 of it,
so a run resumes at any step by starting there: no state is kept and nothing is read to get there.
"""

import functools
from collections.abc import Iterator

import numpy as np

from umd.data.sources import Source

Batch = dict[str, np.ndarray]
FOREVER = np.iinfo(np.int64).max


@functools.lru_cache(maxsize=2)  # A batch may span two epochs.
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
  """The order of epoch `epoch`: a uniformly random permutation of 0..n - 1.

  Sorts the raw output of Philox, whose stream NumPy promises never to change. (TensorFlow's
  index_shuffle needs no array, but its orders are visibly regular.)
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
  return np.argsort(bits, kind="stable")


def _check_share(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(
      f"batch_size={batch_size} must be a multiple of the {process_count} processes."
    )
  return batch_size // process_count


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
    seed: of the order, not negative.
    start_step: the first batch to be returned.
    process_index: this process, in 0..process_count - 1.
    process_count: number of processes; must divide B.

  Raises:
    ValueError: process_count does not divide B.
  """
  import tensorflow as tf

  n, local = len(source), _check_share(batch_size, process_count)
  images, labels = tf.constant(source.images), tf.constant(source.labels)

  def ids(step):
    positions = step * batch_size + process_index * local + np.arange(local)
    epochs = np.unique(positions // n)
    parts = [epoch_order(n, seed, int(e))[positions[positions // n == e] % n] for e in epochs]
    return np.concatenate(parts)

  def read(step):
    rows = tf.ensure_shape(tf.numpy_function(ids, [step], tf.int64, stateful=False), [local])
    return {"image": tf.gather(images, rows), "label": tf.gather(labels, rows)}

  dataset = tf.data.Dataset.range(start_step, FOREVER).map(read)
  return dataset.prefetch(4).as_numpy_iterator()


def eval_batches(
  source: Source, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
  """Every example once, in the source's order, the last batch filled up.

  Returns {image [b, H, W, C], label [b], index [b], _mask [b]}: `index` is the example's place in
  the source, `_mask` is 1 for examples and 0 for filling, which must not count anywhere.
  """
  local = _check_share(batch_size, process_count)
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

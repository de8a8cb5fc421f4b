"""Batches for training, in an order that is a pure function of (seed, epoch), and for evaluation.

The training stream is one endless sequence of examples: epoch after epoch, each a permutation
that depends on the seed and on the number of the epoch. Step n reads positions n B .. (n + 1) B - 1
of it, so a run resumes at any step by starting there. What ops draw depends on the position alone.

Where records can be read at random, the sequence is dealt out to the processes. Where they cannot
(TFRecord files), each process has a sequence of its own part of the records, and finds its place
again by skipping the records of at most one epoch, without decoding them.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from umd.data.arrays import Arrays
from umd.data.host import OK, guarded, in_graph, tensorflow
from umd.data.preprocess import Preprocess
from umd.data.records import Records, fetch, rows
from umd.data.unreadable import Batch, Reader, leave_out, replace, resilient
from umd.runs.progress import Clock, say

FOREVER = np.iinfo(np.int64).max
EVALUATION_SEED = 0  # Ops draw from it at the example's index: each evaluation sees the same.


class Source:
  """Images with labels, preprocessed while they are read.

  Attributes:
    name: what the images are called in messages, e.g. "tfds:cifar10:train".
    records: the examples before preprocessing.
    preprocess: what is done to them: a `Preprocess`, or what is called like one and has its `spec`
      and `image_size`.
    pp: the ops as a string, "" where `preprocess` was given.
    image_size: (H, W, C) of the preprocessed images.
    num_classes: number of labels; 0 means that there are none, and every label is 0.
    class_names: names of the labels, or an empty tuple.
    reader: reads single examples and lists the unreadable ones.
    is_plain: whether the images are float32 arrays in memory, and stay as they are.
  """

  def __init__(self, records: Records, pp: str | Callable = "", max_bad: float = 0):
    """Allows `max_bad` examples to be unreadable, or that share of them if it is below 1."""
    self.records, self.name = records, records.name
    self.pp = pp if isinstance(pp, str) else ""
    if isinstance(pp, str):
      pp = pp.strip()
      self.preprocess = Preprocess(pp, records.dtype, records.shape, records.name)
    else:
      self.preprocess = pp
    self.reader = Reader(records, self.preprocess, max_bad)
    self.image_size = self.preprocess.image_size
    self.num_classes, self.class_names = records.num_classes, records.class_names
    self.is_plain = isinstance(records, Arrays) and pp == ""
    self._arrays = None

  def __len__(self) -> int:
    return len(self.records)

  @property
  def labels(self) -> np.ndarray | None:
    """Labels as int32 [n] where they are known without decoding, else None."""
    return self.records.labels

  @property
  def bad(self) -> dict[int, str]:
    """The unreadable examples that this process has met, {index: reason}."""
    return self.reader.bad

  def bad_report(self) -> str:
    """Returns a line for each unreadable example that this process has met, in order."""
    return self.reader.report()

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images float32 [n, H, W, C], labels int32 [n]), preprocessed once and kept.

    Examples that cannot be read are left out.
    """
    if self.is_plain:
      return self.records.images, self.records.labels
    if self._arrays is None:
      images = np.empty((len(self), *self.image_size), np.float32)
      labels = np.empty(len(self), np.int32)
      read = np.zeros(len(self), bool)
      clock = Clock(say, f"[data] {self.name}: reading into memory", len(self))
      for batch in eval_batches(self, min(256, len(self))):
        real = batch["_mask"] > 0
        index = batch["index"][real]
        images[index], labels[index], read[index] = batch["image"][real], batch["label"][real], True
        clock(int(read.sum()))
      self._arrays = (images, labels) if read.all() else (images[read], labels[read])
    return self._arrays


class Share(NamedTuple):
  """Which process this is, and how many there are."""

  index: int
  count: int

  def of_batch(self, batch_size: int) -> int:
    """Returns how many rows of a batch each process has; ValueError if they do not divide it."""
    if batch_size % self.count:
      raise ValueError(f"batch_size={batch_size} must be a multiple of the {self.count} processes.")
    return batch_size // self.count

  def part(self, n: int) -> tuple[int, int]:
    """Returns (low, high): this process's contiguous part of n records."""
    return n * self.index // self.count, n * (self.index + 1) // self.count


def train_batches(
  source: Source,
  batch_size: int,
  *,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Returns endless batches {image [b, H, W, C], label [b]}: this process's rows of each batch.

  A set may be smaller than a batch, which then spans epochs. An example that cannot be read is
  replaced by another one, see `umd.data.unreadable`.

  Args:
    source: where the images come from.
    batch_size: B over all processes; b = B / process_count.
    seed: of the order and of the ops that draw, in 0..2**53 - 1.
    start_step: the first batch to be returned.
    process_index: this process, in 0..process_count - 1.
    process_count: number of processes; must divide B.

  Raises:
    ValueError: the seed is out of range, process_count does not divide B, or a process has no
      records. Later: more records are unreadable than may be, or a label is out of range.
  """
  if not 0 <= seed < 2**53:  # Multiplied by the number of ops, it must still be an int64.
    raise ValueError(f"seed={seed} must be in 0..2**53 - 1.")
  share = Share(process_index, process_count)
  local = share.of_batch(batch_size)
  if source.is_plain:
    return _plain_batches(source, batch_size, seed, start_step, share)
  deal = _dealt if source.records.random_access else _streamed

  def start(n, guard):
    elements = deal(source, batch_size, seed, start_step + n, share)
    return _example_batches(source, elements, seed, local, guard)

  return _training_batches(resilient(start, source.name), source, seed)


@functools.lru_cache(maxsize=2)  # A batch may span two epochs.
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
  """Returns the order of an epoch: a uniformly random permutation of 0..n - 1.

  It sorts the raw output of Philox, whose stream NumPy promises never to change. (TensorFlow's
  index_shuffle needs no array, but its orders are visibly regular.)
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
  return np.argsort(bits, kind="stable")


def _positions(step: int, batch_size: int, share: Share) -> np.ndarray:
  """Returns the places [b] in the training stream of this process's rows of a batch."""
  local = batch_size // share.count
  return step * batch_size + share.index * local + np.arange(local)


def _ids(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
  """Returns which examples are at these places of the training stream."""
  epochs = np.unique(positions // n)
  parts = [epoch_order(n, seed, int(e))[positions[positions // n == e] % n] for e in epochs]
  return np.concatenate(parts)


def _plain_batches(source, batch_size, seed, start_step, share):
  for step in itertools.count(start_step):
    yield source.records.fetch(_ids(_positions(step, batch_size, share), len(source), seed))


def _dealt(source, batch_size, seed, start_step, share):
  """Returns tf.data of this process's rows of the one sequence."""
  tf = tensorflow()
  local = batch_size // share.count

  def ids(step):
    positions = _positions(step, batch_size, share)
    return positions, _ids(positions, len(source), seed)

  def read(step):
    positions, index = (
      tf.ensure_shape(x, [local])
      for x in tf.numpy_function(ids, [step], [tf.int64, tf.int64], stateful=False)
    )
    return {**fetch(source.records, index), "index": index, "position": positions}

  steps = tf.data.Dataset.range(start_step, FOREVER)
  return steps.map(in_graph(read)).prefetch(2).unbatch()


def _streamed(source, batch_size, seed, start_step, share):
  """Returns tf.data of the rows of this process's own part, epoch after epoch."""
  tf = tensorflow()
  local = batch_size // share.count
  low, high = share.part(len(source))
  if low == high:
    raise ValueError(f"data {source.name!r}: {len(source)} records for {share.count} processes.")
  epoch, offset = divmod(start_step * local, high - low)
  epochs = tf.data.Dataset.range(epoch, FOREVER)
  records = epochs.flat_map(in_graph(lambda e: source.records.stream(low, high, seed, e)))
  numbers = tf.data.Dataset.range(start_step * local, FOREVER)

  def with_position(row, i):  # The i-th row of this process, as a place in the batches of all.
    return {**row, "position": i // local * batch_size + share.index * local + i % local}

  return tf.data.Dataset.zip(records.skip(offset), numbers).map(in_graph(with_position))


def _example_batches(source, elements, seed, local, guard):
  """Returns batches of preprocessed examples as NumPy arrays: views of TensorFlow's, not copies.

  They also hold `index`, `position` and, with `guard`, OK.
  """
  tf = tensorflow()

  def prepare(row):
    return source.preprocess(source.records.parse(row), seed, row["position"])

  prepare = guarded(prepare, source.preprocess.spec) if guard else prepare
  example = lambda row: {**prepare(row), "index": row["index"], "position": row["position"]}
  autotune = dict(num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  batches = elements.map(in_graph(example), **autotune).batch(local, **autotune)
  options = tf.data.Options()
  options.experimental_warm_start = True  # It reads while the model is compiled.
  # Many images are worked on at a time: to split the resizing of one takes 12 % more CPU time.
  options.threading.max_intra_op_parallelism = 1
  return batches.prefetch(2).with_options(options).as_numpy_iterator()


def _training_batches(batches, source, seed):
  for batch in batches:
    batch = replace(batch, source.reader, seed)
    _check_labels(batch, source)
    yield {key: batch[key] for key in source.preprocess.spec}


def _check_labels(batch: Batch, source: Source) -> None:
  """Raises ValueError, naming the example, if a label is none of the source's classes."""
  if not source.num_classes:
    return
  labels = batch["label"]
  wrong = np.flatnonzero((labels < 0) | (labels >= source.num_classes))
  if len(wrong):
    index, label = int(batch["index"][wrong[0]]), labels[wrong[0]]
    raise ValueError(
      f"{source.records.describe(index)} has label {label}, but labels must be in "
      f"0..{source.num_classes - 1}. (TFDS writes -1 where there is none.) Choose a split with "
      "labels; or, to train without them, put no_labels into pp."
    )


def eval_batches(
  source: Source, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
  """Yields every example once; each process reads its own part, in as many batches as the others.

  Batches are {image [b, H, W, C], label [b], index [b], _mask [b]}. `index` is the example's place
  in the source. `_mask` is 1 for examples and 0 for what must not count anywhere: filling, whose
  `index` is beyond the source, and examples that cannot be read.
  """
  share = Share(process_index, process_count)
  local = share.of_batch(batch_size)
  low, high = share.part(len(source))
  count = -(-len(source) // batch_size)  # The largest part has ceil(n / process_count) examples.
  return _filled(_evaluation_batches(source, low, high, local), source, local, count)


def _evaluation_batches(source, low, high, local):
  """Returns batches of examples low..high - 1 with their `index`; the last may be smaller."""
  if low == high:
    return iter(())
  if source.is_plain:
    parts = (np.arange(i, min(i + local, high)) for i in range(low, high, local))
    return ({**source.records.fetch(ids), "index": ids} for ids in parts)
  with_position = in_graph(lambda row: {**row, "position": row["index"]})

  def start(n, guard):
    first = min(low + n * local, high)
    if source.records.random_access:
      elements = rows(source.records, first, high)
    else:  # What comes first out of several files is not what has the lowest index.
      elements = rows(source.records, low, high).skip(first - low)
    elements = elements.map(with_position)
    return _example_batches(source, elements, EVALUATION_SEED, local, guard)

  return _checked(resilient(start, source.name), source)


def _checked(batches, source):
  for batch in batches:
    batch = leave_out(batch, source.reader, EVALUATION_SEED)
    _check_labels(batch, source)
    yield batch


def _filled(batches, source, local, count):
  """Yields the batches, the last filled up to `local` rows, and empty ones up to `count`."""
  spec = {**source.preprocess.spec, "index": ((), "int64")}
  empty = {key: np.zeros((0, *shape), dtype) for key, (shape, dtype) in spec.items()}
  for _ in range(count):
    batch = next(batches, empty)
    real = len(batch["index"])
    counts = batch.get(OK, np.ones(real, bool)).astype(np.float32)
    batch = {key: _extended(batch[key], local) for key in spec}
    index = batch["index"].astype(np.int32)
    index[real:] = len(source) + np.arange(local - real)
    yield {**batch, "index": index, "_mask": _extended(counts, local)}


def _extended(x: np.ndarray, rows: int) -> np.ndarray:
  """Returns x [n, ...] with zeros after it, [rows, ...]; x itself if it has that many."""
  if len(x) == rows:
    return x
  return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])

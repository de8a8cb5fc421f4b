"""Batches for training, in an order that is a pure function of (seed, epoch), and for evaluation.

The training stream is one endless sequence of examples: epoch after epoch, each a permutation
that depends on the seed and the epoch's number. Step n reads positions n B .. (n + 1) B - 1 of it,
so a run resumes at any step by starting there; what ops draw depends on the position alone.

Where records can be read at random, this is one sequence, dealt out to the processes. Where they
cannot (TFRecord files), each process has a sequence of its own, of its own part of the records,
and finds its place again by skipping records of one epoch, without decoding them.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from umd.data import bad
from umd.data.host import OK, guarded, in_graph, tensorflow
from umd.data.records import fetch, rows
from umd.data.sources import Source

Batch = dict[str, np.ndarray]
FOREVER = np.iinfo(np.int64).max
EVALUATION_SEED = 0  # Of ops that draw, at the example's index: each evaluation sees the same.


@functools.lru_cache(maxsize=2)  # A batch may span two epochs.
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
  """The order of epoch `epoch`: a uniformly random permutation of 0..n - 1.

  Sorts the raw output of Philox, whose stream NumPy promises never to change. (TensorFlow's
  index_shuffle needs no array, but its orders are visibly regular.)
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
  return np.argsort(bits, kind="stable")


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
    seed: of the order and of the ops that draw, in 0..2**53 - 1.
    start_step: the first batch to be returned.
    process_index: this process, in 0..process_count - 1.
    process_count: number of processes; must divide B.

  Raises:
    ValueError: a wrong seed, process_count does not divide B, or a process has no records. Later:
      more records are unreadable than the source's `max_bad`, or a label is out of range.

  A set may be smaller than a batch, which then spans epochs. An example that cannot be read is
  replaced by another one, see `umd.data.bad`.
  """
  if not 0 <= seed < 2**53:  # Multiplied by the number of ops, it must still be an int64.
    raise ValueError(f"seed={seed} must be in 0..2**53 - 1.")
  local = _check_share(batch_size, process_count)
  place = process_index, process_count
  if source.is_plain:
    return _plain_batches(source, batch_size, seed, start_step, place)
  if source.records.random_access:
    elements = lambda step: _dealt(source, batch_size, seed, step, place)
  else:
    elements = lambda step: _streamed(source, batch_size, seed, step, place)

  def start(n, guard):
    return _example_batches(source, elements(start_step + n), seed, local, guard)

  return _trained(bad.resilient(start, source.name), source, seed)


def eval_batches(
  source: Source, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
  """Every example once; each process reads its own part, and as many batches as the others.

  Returns {image [b, H, W, C], label [b], index [b], _mask [b]}: `index` is the example's place in
  the source, `_mask` is 1 for examples and 0 for what must not count anywhere: filling, whose
  `index` is beyond the source, and examples that cannot be read.
  """
  local = _check_share(batch_size, process_count)
  n = len(source)
  low, high = (n * (process_index + i) // process_count for i in range(2))
  count = -(-n // batch_size)  # The largest part has ceil(n / process_count) examples.
  return _filled(_evaluated(source, low, high, local), source, local, count)


def _check_share(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(
      f"batch_size={batch_size} must be a multiple of the {process_count} processes."
    )
  return batch_size // process_count


def _positions(step: int, batch_size: int, place: tuple[int, int]) -> np.ndarray:
  """Places [b] in the training stream of this process's rows of a batch."""
  index, count = place
  local = batch_size // count
  return step * batch_size + index * local + np.arange(local)


def _ids(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
  """Which examples are at these places of the training stream."""
  epochs = np.unique(positions // n)
  parts = [epoch_order(n, seed, int(e))[positions[positions // n == e] % n] for e in epochs]
  return np.concatenate(parts)


def _plain_batches(source, batch_size, seed, start_step, place):
  for step in itertools.count(start_step):
    yield source.records.fetch(_ids(_positions(step, batch_size, place), len(source), seed))


def _dealt(source, batch_size, seed, start_step, place):
  """tf.data of this process's rows of the one sequence."""
  tf = tensorflow()
  local = batch_size // place[1]

  def ids(step):
    positions = _positions(step, batch_size, place)
    return positions, _ids(positions, len(source), seed)

  def read(step):
    positions, index = (
      tf.ensure_shape(x, [local])
      for x in tf.numpy_function(ids, [step], [tf.int64, tf.int64], stateful=False)
    )
    return {**fetch(source.records, index), "index": index, "position": positions}

  steps = tf.data.Dataset.range(start_step, FOREVER)
  return steps.map(in_graph(read)).prefetch(2).unbatch()


def _streamed(source, batch_size, seed, start_step, place):
  """tf.data of the rows of this process's own part, epoch after epoch."""
  tf = tensorflow()
  index, count = place
  local = batch_size // count
  low, high = (len(source) * (index + i) // count for i in range(2))
  if low == high:
    raise ValueError(f"data {source.name!r}: {len(source)} records for {count} processes.")
  epoch, offset = divmod(start_step * local, high - low)
  epochs = tf.data.Dataset.range(epoch, FOREVER)
  found = epochs.flat_map(in_graph(lambda e: source.records.stream(low, high, seed, e)))
  numbers = tf.data.Dataset.range(start_step * local, FOREVER)

  def with_position(row, i):
    return {**row, "position": i // local * batch_size + index * local + i % local}

  return tf.data.Dataset.zip(found.skip(offset), numbers).map(in_graph(with_position))


def _example_batches(source, elements, seed, local, guard):
  """Batches of preprocessed examples, as NumPy arrays: views of TensorFlow's, not copies.

  They have `index` and `position`, and with `guard` OK.
  """
  tf = tensorflow()

  def prepare(row):
    return source.preprocess(source.records.parse(row), seed, row["position"])

  prepare = guarded(prepare, source.preprocess.spec) if guard else prepare
  example = lambda row: {**prepare(row), "index": row["index"], "position": row["position"]}
  autotune = dict(num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  batches = elements.map(in_graph(example), **autotune).batch(local, **autotune)
  options = tf.data.Options()
  options.experimental_warm_start = True  # Reads while the model is compiled.
  # Many images are worked on at a time: to split the resizing of one takes 12 % more CPU time.
  options.threading.max_intra_op_parallelism = 1
  return batches.prefetch(2).with_options(options).as_numpy_iterator()


def _trained(batches, source, seed):
  for batch in batches:
    batch = bad.replace(batch, source, seed)
    bad.check_labels(batch, source)
    yield {key: batch[key] for key in source.preprocess.spec}


def _evaluated(source, low, high, local):
  """Batches of examples low..high - 1 with their `index`, the last perhaps smaller."""
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

  return _checked(bad.resilient(start, source.name), source)


def _checked(batches, source):
  for batch in batches:
    batch = bad.leave_out(batch, source, EVALUATION_SEED)
    bad.check_labels(batch, source)
    yield batch


def _filled(batches, source, local, count):
  """The batches, the last filled up to `local` rows, and empty ones up to `count` of them."""
  batches = iter(batches)
  spec = {**source.preprocess.spec, "index": ((), "int64")}
  empty = {key: np.zeros((0, *shape), dtype) for key, (shape, dtype) in spec.items()}
  for _ in range(count):
    batch = next(batches, empty)
    real = len(batch["index"])
    counts = batch.get(OK, np.ones(real, bool))
    batch = {key: batch[key] for key in spec}
    if real < local:
      batch = {key: _extended(x, local) for key, x in batch.items()}
      batch["index"][real:] = len(source) + np.arange(local - real)
    mask = _extended(counts.astype(np.float32), local)
    yield {**batch, "index": batch["index"].astype(np.int32), "_mask": mask}


def _extended(x: np.ndarray, rows: int) -> np.ndarray:
  """x [n, ...] with zeros after it: [rows, ...]."""
  return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])

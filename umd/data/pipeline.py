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
from collections.abc import Callable, Iterator

import numpy as np

from umd.data.host import OK, first_line, guarded, in_graph, tensorflow
from umd.data.records import fetch, row, rows
from umd.data.sources import Source
from umd.runs.progress import say

TRIES = 100  # Examples that are tried in the place of one.
LISTED = 5  # Examples that an error lists.
STREAM = 1  # Of Philox: apart from the order of epochs, which has the same keys.


Batch = dict[str, np.ndarray]


def resilient(start: Callable[[int, bool], Iterator], what: str) -> Iterator[Batch]:
  """Batches 0, 1, ... of `start(0, False)`; from one that fails on, those of `start(n, True)`.

  Args:
    start: (n, guard) -> batches n, n + 1, ...; with `guard`, only what cannot be read at all fails.
    what: to call them in messages.

  Raises:
    ValueError: a batch failed in spite of the guard.
  """
  batches = start(0, False)  # Now, not when the first is asked for: they are read ahead.
  return _resilient(batches, start, what)


def _resilient(batches, start, what):
  errors, guard, n = tensorflow().errors, False, 0
  while True:
    try:
      batch = next(batches, None)
    except errors.OpError as error:
      if guard:
        raise ValueError(f"data {what!r} is not readable: {first_line(error)}") from None
      batches = None  # Stops them before others start.
      guard, batches = True, start(n, True)
      continue
    if batch is None:
      return
    yield batch
    n += 1


def replace(batch: Batch, source, seed: int) -> Batch:
  """The batch, in the place of each example that could not be read another one."""
  return _mended(batch, lambda index, position: _substitute(source, seed, index, position))


def leave_out(batch: Batch, source, seed: int) -> Batch:
  """The batch, those examples read again that could not be; OK stays False where it is in vain."""
  return _mended(batch, lambda index, position: _read(source, seed, index, position))


def _mended(batch: Batch, find: Callable[[int, int], Batch | None]) -> Batch:
  if OK not in batch or batch[OK].all():
    return batch
  mended = {key: np.array(values) for key, values in batch.items()}  # TensorFlow's are read-only.
  for i in np.flatnonzero(~batch[OK]):
    if found := find(int(batch["index"][i]), int(batch["position"][i])):
      for key, value in {**found, OK: True}.items():
        mended[key][i] = value
  return mended


def _substitute(source, seed, index, position):
  """The example at `index` after all, or the first readable one in an order that depends on it."""
  key = np.array([seed, index], np.uint64)
  drawn = np.random.Philox(key=key, counter=STREAM << 128).random_raw(TRIES)
  for candidate in [index, *(int(bits) % len(source) for bits in drawn)]:
    if found := _read(source, seed, candidate, position):
      return found
  raise ValueError(
    f"{source.records.describe(index)} is not readable ({source.bad[index]}), nor is any of the "
    f"{TRIES} others of data {source.name!r} that were tried in its place. Look at the data."
  )


def _read(source, seed: int, index: int, position: int) -> Batch | None:
  """The example at `index`, prepared as at `position` of the stream; None if it is unreadable.

  Raises:
    ValueError: the source has more unreadable examples than it may have.
  """
  errors = tensorflow().errors
  try:
    example = source.records.parse(row(source.records, index))
    example = source.preprocess(example, seed, position)
    return {key: value.numpy() for key, value in example.items()}
  except (errors.OpError, ValueError) as error:
    reason = first_line(error)
  is_new = index not in source.bad
  source.bad[index] = reason
  if len(source.bad) > source.max_bad:
    raise ValueError(_too_many(source, index))
  if is_new:
    say(f"[data] skipped {source.records.describe(index)}: {reason}", everywhere=True)
  return None


def _too_many(source, newest: int) -> str:
  bad, describe = source.bad, source.records.describe
  if not source.max_bad:
    return (
      f"{describe(newest)} is not readable: {bad[newest]}. Repair or remove it, or skip such "
      "examples: max_bad is how many of the data may be unreadable, a number or a share."
    )
  first = [newest, *(i for i in bad if i != newest)][:LISTED]
  listed = "; ".join(f"{describe(i)}: {bad[i]}" for i in first)
  more = f"; and {len(bad) - len(first)} more" if len(bad) > len(first) else ""
  return (
    f"data {source.name!r}: {len(bad)} of {len(source)} examples are not readable, and "
    f"max_bad allows {source.max_bad}. Repair or remove them, or set max_bad higher (a number or a "
    f"share). They are {listed}{more}."
  )


def check_labels(batch: Batch, source) -> None:
  """Raises ValueError if a label is none of the source's classes; names the example."""
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
  replaced by another one, see `umd.data.pipeline`.
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

  return _trained(resilient(start, source.name), source, seed)


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
    batch = replace(batch, source, seed)
    check_labels(batch, source)
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

  return _checked(resilient(start, source.name), source)


def _checked(batches, source):
  for batch in batches:
    batch = leave_out(batch, source, EVALUATION_SEED)
    check_labels(batch, source)
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

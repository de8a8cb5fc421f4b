"""Examples that cannot be read: found, named, counted up to a limit, and replaced.

Nothing is remembered but what to report. Which example takes the place of one that cannot be read
is a function of the seed and of the example alone, so that a batch is the same whatever was read
before it, in a run that was resumed, and on any number of processes.
"""

from collections.abc import Callable, Iterator

import numpy as np

from umd.data.host import OK, first_line, tensorflow
from umd.data.records import row
from umd.progress import say

Batch = dict[str, np.ndarray]
TRIES = 100  # Examples that are tried in the place of one.
LISTED = 5  # Examples that an error lists.
STREAM = 1  # Of Philox: apart from the order of epochs, which has the same keys.


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

"""Examples that cannot be read: they are reported, and replaced in training or left out elsewhere.

The pipeline first runs without a guard, where one unreadable example makes its whole batch fail.
From the first such batch on it runs with `host.guarded`, which marks what fails. A marked example
is read once more by itself, which tells the reason; what takes its place depends on the seed and
on the example alone, so that resumed runs and runs of several processes agree.
"""

from collections.abc import Callable, Iterator

import numpy as np

from umd.data.host import OK, first_line, tensorflow
from umd.data.records import Records, row
from umd.runs.progress import say

TRIES = 100  # Other examples that are tried in the place of one.
LISTED = 5  # Examples that an error lists.
STREAM = 1  # Counter of Philox, apart from the order of epochs, which has the same keys.

Batch = dict[str, np.ndarray]


class Reader:
  """Reads single examples outside of the pipeline, and remembers those that cannot be read.

  Attributes:
    limit: how many may be unreadable.
    bad: {index: reason} of those that this process has met.
  """

  def __init__(self, records: Records, preprocess: Callable, max_bad: float):
    """Allows `max_bad` examples, or that share of them, rounded down, if it is below 1."""
    if isinstance(max_bad, bool) or not (0 <= max_bad < 1 or (max_bad >= 1 and max_bad % 1 == 0)):
      raise ValueError(
        f"max_bad={max_bad!r} must be a number of examples (0, 1, 2, ...), a share of them below "
        "1, or -1 for the default."
      )
    self.limit = int(max_bad) if max_bad >= 1 else int(max_bad * len(records))
    self.bad: dict[int, str] = {}
    self._records, self._preprocess = records, preprocess

  def read(self, index: int, seed: int, position: int) -> Batch | None:
    """Returns the example at `index` as it is at `position` of the stream, None if unreadable.

    Raises:
      ValueError: more examples are unreadable than may be.
    """
    try:
      example = self._records.parse(row(self._records, index))
      example = self._preprocess(example, seed, position)
      return {key: value.numpy() for key, value in example.items()}
    except (tensorflow().errors.OpError, ValueError) as error:
      reason = first_line(error)
    is_new = index not in self.bad
    self.bad[index] = reason
    if len(self.bad) > self.limit:
      raise ValueError(self._too_many(index))
    if is_new:
      say(f"[data] skipped {self._records.describe(index)}: {reason}", everywhere=True)
    return None

  def substitute(self, index: int, seed: int, position: int) -> Batch:
    """Returns the example at `index` or, if it is unreadable, the first other one that is not.

    Raises:
      ValueError: none of TRIES others can be read.
    """
    key = np.array([seed, index], np.uint64)
    drawn = np.random.Philox(key=key, counter=STREAM << 128).random_raw(TRIES)
    for candidate in [index, *(int(bits) % len(self._records) for bits in drawn)]:
      if example := self.read(candidate, seed, position):
        return example
    raise ValueError(
      f"{self._records.describe(index)} is not readable ({self.bad[index]}), nor is any of the "
      f"{TRIES} others of data {self._records.name!r} that were tried in its place. Look at the "
      "data."
    )

  def report(self) -> str:
    """Returns a line for each unreadable example that this process met, in order."""
    return "".join(f"{self._records.describe(i)}: {self.bad[i]}\n" for i in sorted(self.bad))

  def _too_many(self, newest: int) -> str:
    describe = self._records.describe
    if not self.limit:
      return (
        f"{describe(newest)} is not readable: {self.bad[newest]}. Repair or remove it, or skip "
        "such examples: max_bad is how many of the data may be unreadable, a number or a share."
      )
    first = [newest, *(i for i in self.bad if i != newest)][:LISTED]
    listed = "; ".join(f"{describe(i)}: {self.bad[i]}" for i in first)
    rest = len(self.bad) - len(first)
    return (
      f"data {self._records.name!r}: {len(self.bad)} of {len(self._records)} examples are not "
      f"readable, and max_bad allows {self.limit}. Repair or remove them, or set max_bad higher (a "
      f"number or a share). They are {listed}{f'; and {rest} more' if rest else ''}."
    )


def replace(batch: Batch, reader: Reader, seed: int) -> Batch:
  """Returns the batch with another example in the place of each that could not be read."""
  return _mended(batch, lambda index, position: reader.substitute(index, seed, position))


def leave_out(batch: Batch, reader: Reader, seed: int) -> Batch:
  """Returns the batch; what cannot be read the second time either keeps OK = False."""
  return _mended(batch, lambda index, position: reader.read(index, seed, position))


def _mended(batch: Batch, find: Callable[[int, int], Batch | None]) -> Batch:
  if OK not in batch or batch[OK].all():
    return batch
  mended = {key: np.array(values) for key, values in batch.items()}  # TensorFlow's are read-only.
  for i in np.flatnonzero(~batch[OK]):
    if example := find(int(batch["index"][i]), int(batch["position"][i])):
      for key, value in {**example, OK: True}.items():
        mended[key][i] = value
  return mended


def resilient(start: Callable[[int, bool], Iterator], what: str) -> Iterator[Batch]:
  """Returns batches 0, 1, ...; from the first that fails on, they are read with a guard.

  Args:
    start: (n, guard) -> batches n, n + 1, ...; with `guard`, only what cannot be read at all fails.
    what: name of the data, in messages.

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
      batches = None  # Ends its threads before others start.
      guard, batches = True, start(n, True)
      continue
    if batch is None:
      return
    yield batch
    n += 1

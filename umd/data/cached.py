"""Records kept in memory."""

import time

import numpy as np

from umd.data.host import first_line, guarded, in_graph, tensorflow
from umd.data.records import Records, rows
from umd.progress import during, say


class Cached(Records):
  """All of another kind's records, undecoded, in this host's memory: read at first use."""

  def __init__(self, records: Records):
    super().__init__(
      records.name, records.dtype, records.shape, records.num_classes, records.class_names
    )
    self._records, self._loaded = records, None

  def __len__(self):
    return len(self._records)

  @property
  def labels(self):
    return self._load()[1]

  def fetch(self, ids):
    _, labels, places = self._load()
    return {"place": places[ids], "label": labels[ids]}

  def parse(self, row):
    return {"image": tensorflow().gather(self._load()[0], row["place"]), "label": row["label"]}

  def fingerprint(self):
    return self._records.fingerprint()

  def describe(self, index):
    return self._records.describe(index)

  def _load(self):
    """(images [n] in the order they came, labels [n], places [n] of the records among these)."""
    if self._loaded is None:
      with tensorflow().init_scope():  # Eagerly, even if a graph is what asks first.
        start = time.time()
        with during(f"[data] {self.name}: reading {len(self)} records into memory"):
          self._loaded = self._read()
        size, seconds = _nbytes(self._loaded[0]) / 1e9, time.time() - start
        say(
          f"[data] {self.name}: {len(self)} records, {size:.3g} GB, read into memory in "
          f"{seconds:.1f} s"
        )
    return self._loaded

  def _read(self):
    errors, parse = tensorflow().errors, self._records.parse
    try:
      found = self._all(parse)
    except errors.OpError as error:
      if self.dtype != "string":
        raise ValueError(f"data {self.name!r} is not readable: {first_line(error)}") from None
      found = self._all_that_opens(parse)
    places = np.argsort(found["index"].numpy())
    return found["image"], found["label"].numpy().astype(np.int32)[places], places

  def _all_that_opens(self, parse):
    """Like `_all`; what cannot be opened has no bytes, which are unreadable when they are used."""
    try:
      return self._all(guarded(parse, {"image": ((), "string"), "label": ((), "int32")}))
    except tensorflow().errors.OpError as error:
      raise ValueError(f"data {self.name!r} is not readable: {first_line(error)}") from None

  def _all(self, parse):
    """{image, label, index} of all records, each a tensor [n]."""
    tf = tensorflow()
    example = lambda row: {**parse(row), "index": row["index"]}
    dataset = rows(self._records, 0, len(self))
    dataset = dataset.map(in_graph(example), num_parallel_calls=tf.data.AUTOTUNE)
    # One tensor, made by TensorFlow: strings are moved into it, not copied.
    return dataset.batch(len(self)).get_single_element()


def _nbytes(images) -> int:
  tf = tensorflow()
  if images.dtype != tf.string:
    return images.dtype.size * int(tf.size(images))
  return int(tf.reduce_sum(tf.cast(tf.strings.length(images), tf.int64)))

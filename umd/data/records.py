"""Records: examples before preprocessing, and how each kind of storage gives them out.

Kinds that can be read at random give the rows of a batch (`fetch`, NumPy, once per batch); kinds
that cannot give a stream of rows (`stream`). `parse` then makes {image, label} of one row, inside
the graph, many at a time.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from umd.data.host import first_line, guarded, in_graph, tensorflow
from umd.runs.progress import during, say


class Records:
  """n examples {image, label}, not yet decoded.

  Attributes:
    name: what they are called in messages.
    dtype: of `image`: "string" where it is encoded.
    shape: (H, W, C) of the images, None where it is not known before decoding.
    num_classes: number of labels; 0: the labels are all 0 and mean nothing.
    class_names: of the labels, or empty.
    random_access: whether there is `fetch`; else there is `stream`.
    bad: {index: reason} of those that this process could not read so far.
  """

  random_access = True

  def __init__(
    self,
    name: str,
    dtype: str,
    shape: Sequence[int | None],
    num_classes: int,
    class_names: Sequence[str] = (),
  ):
    self.name, self.dtype, self.shape = name, dtype, tuple(shape)
    self.num_classes, self.class_names = num_classes, tuple(class_names)
    self.bad: dict[int, str] = {}

  def __len__(self) -> int:
    raise NotImplementedError

  @property
  def labels(self) -> np.ndarray | None:
    """int32 [n], or None where they would have to be read from the files."""
    return None

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The rows at `ids` [b]."""
    raise NotImplementedError

  def stream(self, low: int, high: int, seed: int | None = None, epoch: Any = None):
    """tf.data of rows low..high - 1, each with its `index`; in random order if there is a seed."""
    raise NotImplementedError

  def parse(self, row: dict[str, Any]) -> dict[str, Any]:
    """{image, label} of a row (tensors, in a graph)."""
    return {"image": row["image"], "label": row["label"]}

  def fingerprint(self) -> str:
    """Changes with the examples, as far as can be told without reading all of them."""
    raise NotImplementedError

  def describe(self, index: int) -> str:
    """What to call one record in a message."""
    return f"record {index} of data {self.name!r}"


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


PART = re.compile(r"^(?P<name>[^\[\]]+)(\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?$")


def names(split: str, what: str) -> list[str]:
  """The splits that "a[:1%]+b" names; ValueError if it is written wrongly."""
  return [_match(part, what)["name"] for part in split.split("+")]


def select(split: str, sizes: Mapping[str, int], what: str) -> list[tuple[str, np.ndarray]]:
  """[(name, ids)]: what `split` asks for, of splits of these sizes; `what` is for messages."""
  return [_ids(_match(part, what), sizes, what) for part in split.split("+")]


def _match(part: str, what: str) -> re.Match:
  match = PART.match(part.strip())
  if not match:
    raise ValueError(f"{what}: split {part!r} is not written as NAME, NAME[:90%] or NAME[10:20].")
  return match


def _ids(match, sizes, what):
  name = match["name"]
  if name not in sizes:
    known = ", ".join(f"{k} ({v} images)" for k, v in sizes.items())
    raise ValueError(f"{what} has no split {name!r}; it has {known}.")
  n = sizes[name]
  low, high = (_bound(match[key], n, default) for key, default in (("low", 0), ("high", n)))
  if not 0 <= low < high <= n:
    raise ValueError(f"{what}: {match[0]} holds no images: {name} has {n}.")
  return name, np.arange(low, high)


def _bound(text: str | None, n: int, default: int) -> int:
  if text is None:
    return default
  value = round(n * int(text[:-1]) / 100) if text.endswith("%") else int(text)
  return value + n if text.startswith("-") else value


FETCH = 256  # Rows fetched together where there are no batches yet.


def rows(records: Records, low: int, high: int):
  """tf.data of rows low..high - 1, each with its `index`."""
  if not records.random_access:
    return records.stream(low, high)
  ids = tensorflow().data.Dataset.range(low, high).batch(FETCH)
  return ids.map(in_graph(lambda i: {**fetch(records, i), "index": i})).unbatch()


def row(records: Records, index: int) -> dict[str, Any]:
  """One row with its `index`, outside of graphs."""
  if not records.random_access:
    return next(iter(records.stream(index, index + 1)))
  found = {key: values[0] for key, values in records.fetch(np.array([index])).items()}
  return {**{key: tensorflow().constant(value) for key, value in found.items()}, "index": index}


def fetch(records: Records, ids):
  """Records.fetch inside a graph: tensors of the rows at `ids`."""
  tf = tensorflow()
  example = records.fetch(np.zeros(1, np.int64))
  keys = sorted(example)
  kinds = [tf.string if example[k].dtype == object else example[k].dtype for k in keys]

  def read(ids):
    found = records.fetch(ids)
    return [found[k] for k in keys]

  found = tf.numpy_function(read, [ids], kinds, stateful=False)
  for key, value in zip(keys, found, strict=True):
    value.set_shape([*ids.shape, *example[key].shape[1:]])
  return dict(zip(keys, found, strict=True))

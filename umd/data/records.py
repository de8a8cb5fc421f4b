"""Records: examples before preprocessing, and how each kind of storage hands them out.

Storage that can be read at random gives the rows of a batch (`fetch`, NumPy, once per batch);
storage that cannot gives a stream of rows (`stream`). `parse` then makes {image, label} of one
row, inside the graph, many rows at a time. `split_names` and `select` read what a split is called.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from umd.data.host import first_line, guarded, in_graph, tensorflow
from umd.runs.progress import during, say

FETCH = 256  # Rows that are fetched together where there are no batches yet.


class Records:
  """A list of n examples {image, label} that are not yet decoded.

  Attributes:
    name: what they are called in messages.
    dtype: type of `image`; "string" where it is encoded.
    shape: (H, W, C) of the images, None where it is not known before decoding.
    num_classes: number of labels; 0 means that the labels are all 0 and mean nothing.
    class_names: names of the labels, or an empty tuple.
    random_access: whether there is `fetch`; otherwise there is `stream`.
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

  def __len__(self) -> int:
    raise NotImplementedError

  @property
  def labels(self) -> np.ndarray | None:
    """Labels as int32 [n], or None where they would have to be read from the files."""
    return None

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the rows at `ids` [b]."""
    raise NotImplementedError

  def stream(self, low: int, high: int, seed: int | None = None, epoch: Any = None):
    """Returns tf.data of rows low..high - 1 with their `index`; shuffled if there is a seed."""
    raise NotImplementedError

  def parse(self, row: dict[str, Any]) -> dict[str, Any]:
    """Returns {image, label} of a row (tensors, in a graph)."""
    return {"image": row["image"], "label": row["label"]}

  def fingerprint(self) -> str:
    """Returns a text that changes with the examples, as far as that shows without reading all."""
    raise NotImplementedError

  def describe(self, index: int) -> str:
    """Returns what one record is called in a message."""
    return f"record {index} of data {self.name!r}"


class Cached(Records):
  """All records of another kind, undecoded, in this host's memory; they are read at first use."""

  def __init__(self, records: Records):
    super().__init__(
      records.name, records.dtype, records.shape, records.num_classes, records.class_names
    )
    self._records, self._loaded = records, None
    self.info = getattr(records, "info", None)  # How stored latents were made.
    self.fingerprint, self.describe = records.fingerprint, records.describe

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

  def _load(self):
    """Returns (images [n] in the order they came, labels [n], the images' places [n] there)."""
    if self._loaded is None:
      start = time.time()
      with tensorflow().init_scope():  # Eagerly, even if a graph is what asks first.
        with during(f"[data] {self.name}: reading {len(self)} records into memory"):
          columns = self._read()
        places = np.argsort(columns["index"].numpy())
        images, labels = columns["image"], columns["label"].numpy().astype(np.int32)[places]
        size = _nbytes(images) / 1e9
      self._loaded = images, labels, places
      say(
        f"[data] {self.name}: {len(self)} records, {size:.3g} GB, read into memory in "
        f"{time.time() - start:.1f} s"
      )
    return self._loaded

  def _read(self):
    """Returns {image, label, index}, each a tensor [n]; files that do not open become b""."""
    parse, errors = self._records.parse, tensorflow().errors
    ways = [parse]
    if self.dtype == "string":  # Empty bytes are no image, so they count as one when used.
      ways.append(guarded(parse, {"image": ((), "string"), "label": ((), "int32")}))
    for way in ways:
      try:
        return self._read_by(way)
      except errors.OpError as error:
        failure = error
    raise ValueError(f"data {self.name!r} is not readable: {first_line(failure)}") from None

  def _read_by(self, parse):
    tf = tensorflow()
    example = lambda row: {**parse(row), "index": row["index"]}
    dataset = rows(self._records, 0, len(self))
    dataset = dataset.map(in_graph(example), num_parallel_calls=tf.data.AUTOTUNE)
    # TensorFlow makes one tensor of the whole: strings are moved into it, not copied.
    return dataset.batch(len(self)).get_single_element()


def _nbytes(images) -> int:
  tf = tensorflow()
  if images.dtype != tf.string:
    return images.dtype.size * int(tf.size(images))
  return int(tf.reduce_sum(tf.cast(tf.strings.length(images), tf.int64)))


def rows(records: Records, low: int, high: int):
  """Returns tf.data of rows low..high - 1, each with its `index`."""
  if not records.random_access:
    return records.stream(low, high)
  ids = tensorflow().data.Dataset.range(low, high).batch(FETCH)
  return ids.map(in_graph(lambda i: {**fetch(records, i), "index": i})).unbatch()


def row(records: Records, index: int) -> dict[str, Any]:
  """Returns one row with its `index`, outside of graphs."""
  if not records.random_access:
    return next(iter(records.stream(index, index + 1)))
  columns = records.fetch(np.array([index]))
  return {
    **{key: tensorflow().constant(values[0]) for key, values in columns.items()},
    "index": index,
  }


def fetch(records: Records, ids):
  """Returns the rows at `ids` as tensors: Records.fetch inside a graph."""
  tf = tensorflow()
  example = records.fetch(np.zeros(1, np.int64))
  keys = sorted(example)
  kinds = [tf.string if example[k].dtype == object else example[k].dtype for k in keys]

  def read(ids):
    columns = records.fetch(ids)
    return [columns[k] for k in keys]

  tensors = tf.numpy_function(read, [ids], kinds, stateful=False)
  for key, tensor in zip(keys, tensors, strict=True):
    tensor.set_shape([*ids.shape, *example[key].shape[1:]])
  return dict(zip(keys, tensors, strict=True))


# Splits are written as in TFDS: "train", "train[:99%]", "all[10:20]", "train+test".
PART = re.compile(r"^(?P<name>[^\[\]]+)(\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?$")


def split_names(split: str, what: str) -> list[str]:
  """Returns the names in "a[:1%]+b"; ValueError, beginning with `what`, if it is malformed."""
  return [_match(part, what)["name"] for part in split.split("+")]


def select(split: str, sizes: Mapping[str, int], what: str) -> list[tuple[str, np.ndarray]]:
  """Returns [(name, ids)]: the examples that `split` asks for, of splits of these sizes.

  Raises:
    ValueError: it is malformed, names no split or holds nothing; begins with `what`.
  """
  chosen = []
  for part in split.split("+"):
    match = _match(part, what)
    name = match["name"]
    if name not in sizes:
      known = ", ".join(f"{k} ({v} images)" for k, v in sizes.items())
      raise ValueError(f"{what} has no split {name!r}; it has {known}.")
    n = sizes[name]
    low, high = _bound(match["low"], n, 0), _bound(match["high"], n, n)
    if not 0 <= low < high <= n:
      raise ValueError(f"{what}: {match[0]} holds no images: {name} has {n}.")
    chosen.append((name, np.arange(low, high)))
  return chosen


def _match(part: str, what: str) -> re.Match:
  match = PART.match(part.strip())
  if not match:
    raise ValueError(f"{what}: split {part!r} is not written as NAME, NAME[:90%] or NAME[10:20].")
  return match


def _bound(text: str | None, n: int, default: int) -> int:
  if text is None:
    return default
  value = round(n * int(text[:-1]) / 100) if text.endswith("%") else int(text)
  return value + n if text.startswith("-") else value

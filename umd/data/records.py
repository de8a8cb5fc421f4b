"""Records: examples before preprocessing, and how each kind of storage gives them out.

Kinds that can be read at random give the rows of a batch (`fetch`, NumPy, once per batch); kinds
that cannot give a stream of rows (`stream`). `parse` then makes {image, label} of one row, inside
the graph, many at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from umd.data.host import in_graph, tensorflow

FETCH = 256  # Rows fetched together where there are no batches yet.


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

"""Sources: named sets of images that are preprocessed while they are read."""

import functools
import os

import numpy as np

from umd.data.arrays import Arrays, digits, npz
from umd.data.folder import folder
from umd.data.latents import latents
from umd.data.preprocess import Preprocess
from umd.data.records import Cached, Records
from umd.data.tfds import tfds
from umd.runs.progress import Clock, during, say


class Source:
  """Images with labels, preprocessed while they are read.

  Attributes:
    name: what the images are called in messages, e.g. "tfds:cifar10:train".
    records: the examples before preprocessing.
    pp: the ops, as a string, and
    preprocess: what they do to the records.
    image_size: (H, W, C) of the preprocessed images.
    num_classes: number of labels; 0: there are none, and every label is 0.
    class_names: names of the labels, or an empty tuple.
    max_bad: how many examples may be unreadable.
    bad: {index: reason} of the unreadable ones that this process met so far.
  """

  def __init__(self, records: Records, pp: str = "", max_bad: float = 0):
    """`max_bad`: a number, or a share if it is below 1."""
    self.records, self.name, self.pp = records, records.name, pp
    self.max_bad, self.bad = _at_most(max_bad, len(records)), records.bad
    self.preprocess = Preprocess(pp, records.dtype, records.shape, records.name)
    self.image_size = self.preprocess.image_size
    self.num_classes, self.class_names = records.num_classes, records.class_names
    self._arrays = None

  def __len__(self) -> int:
    return len(self.records)

  @property
  def labels(self) -> np.ndarray | None:
    """int32 [n] where they are known without decoding, else None."""
    return self.records.labels

  @property
  def is_plain(self) -> bool:
    """Whether the images are float32 arrays in memory, and stay as they are."""
    return isinstance(self.records, Arrays) and not self.preprocess

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """(images float32 [n, H, W, C], labels int32 [n]): all, preprocessed once and kept.

    What cannot be read is left out.
    """
    from umd.data.pipeline import eval_batches  # It imports this module.

    if self.is_plain:
      return self.records.images, self.records.labels
    if self._arrays is None:
      images = np.empty((len(self), *self.image_size), np.float32)
      labels, read = np.empty(len(self), np.int32), np.zeros(len(self), bool)
      clock = Clock(say, f"[data] {self.name}: reading into memory", len(self))
      for batch in eval_batches(self, min(256, len(self))):
        real = batch["_mask"] > 0
        images[batch["index"][real]] = batch["image"][real]
        labels[batch["index"][real]] = batch["label"][real]
        read[batch["index"][real]] = True
        clock(int(read.sum()))
      self._arrays = (images, labels) if read.all() else (images[read], labels[read])
    return self._arrays

  def bad_report(self) -> str:
    """A line for each unreadable example that this process met so far, in the source's order."""
    describe = self.records.describe
    return "".join(f"{describe(i)}: {self.bad[i]}\n" for i in sorted(self.bad))


BY_KIND = -1.0  # Of `max_bad`: what follows for the kind of data.
MAX_BAD = {"folder": 0.001}  # Prepared data sets were read once already: 0.

KINDS = {
  "digits": lambda rest, split, data_dir, buffer: digits(split),
  "tfds": tfds,
  "folder": lambda rest, split, data_dir, buffer: folder(rest, split),
  "npz": lambda rest, split, data_dir, buffer: npz(rest, split),
  "latents": lambda rest, split, data_dir, buffer: latents(rest, split),
}


def load(
  name: str,
  split: str,
  pp: str = "",
  *,
  data_dir: str = "",
  cache: bool = False,
  shuffle_buffer: int = 50_000,
  max_bad: float = BY_KIND,
) -> Source:
  """The source of that name; the same arguments return the same object.

  Args:
    name: "digits", "tfds:NAME" (with config and version as TFDS writes them), "folder:PATH",
      "npz:FILE" or "latents:DIR" (moments of latents, for image_size (h, w, 2c)).
    split: e.g. "train", "train[:99%]", "all[90%:]".
    pp: preprocessing ops, e.g. "decode|resize(64)|value_range(-1, 1)"; "" for none.
    data_dir: where TFDS keeps its data; by default $TFDS_DATA_DIR, else TFDS's own default.
    cache: keep the undecoded records in memory.
    shuffle_buffer: records to shuffle among, where the storage cannot be read at random.
    max_bad: how many images may be unreadable: a number, a share if it is below 1, or -1 for .001
      of a folder and none of other data. They are skipped and reported, see `umd.data.pipeline`.

  Raises:
    ValueError, FileNotFoundError: no such data, split or op; the message lists the known ones.
  """
  data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "")
  if max_bad == BY_KIND:
    max_bad = MAX_BAD.get(name.partition(":")[0], 0)
  return _load(name, split, pp, data_dir, cache, shuffle_buffer, max_bad)


@functools.cache
def _load(name, split, pp, data_dir, cache, shuffle_buffer, max_bad):
  return Source(_records(name, split, data_dir, cache, shuffle_buffer), pp, max_bad)


@functools.cache  # Sources that differ in pp only share what is read.
def _records(name, split, data_dir, cache, shuffle_buffer) -> Records:
  kind, _, rest = name.partition(":")
  if kind not in KINDS or bool(rest) == (kind == "digits"):
    raise ValueError(
      f"data.name={name!r} is not one of ['digits', 'tfds:NAME', 'folder:PATH', 'npz:FILE', "
      "'latents:DIR']."
    )
  with during(f"[data] opening {name}, split {split!r}"):
    records = KINDS[kind](rest, split, data_dir, shuffle_buffer)
  if not cache or isinstance(records, Arrays):
    return records
  cached = Cached(records)
  cached.info = getattr(records, "info", None)  # How latents were made.
  return cached


def _at_most(max_bad: float, n: int) -> int:
  """How many of n examples `max_bad` stands for: a share is rounded down."""
  if isinstance(max_bad, bool) or not (0 <= max_bad < 1 or (max_bad >= 1 and max_bad % 1 == 0)):
    raise ValueError(
      f"max_bad={max_bad!r} must be a number of examples (0, 1, 2, ...), a share of them below 1, "
      f"or {BY_KIND:g} for the default."
    )
  return int(max_bad) if max_bad >= 1 else int(max_bad * n)


def from_arrays(
  name: str,
  images: np.ndarray,
  labels: np.ndarray | None,
  num_classes: int,
  pp: str = "",
  class_names: tuple[str, ...] = (),
) -> Source:
  """A source of images in memory, uint8 or float32 [n, H, W, C], and int labels [n] or None."""
  return Source(Arrays(name, images, labels, num_classes, class_names), pp)

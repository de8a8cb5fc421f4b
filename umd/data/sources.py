"""Sources by name: `load` as configs name data, `open_images` as command lines name sets of images.

On a command line a set is tfds:NAME:SPLIT, folder:PATH[:SPLIT], npz:FILE[:SPLIT], or just the path
of a folder or of an npz file.
"""

import functools
import os
import re

import numpy as np

from umd.data.arrays import Arrays, digits, npz
from umd.data.folder import folder
from umd.data.host import tensorflow
from umd.data.latents import latents
from umd.data.ops import OpContext, decode
from umd.data.pipeline import Source, eval_batches
from umd.data.records import Cached, Records, rows
from umd.data.tfds import tfds
from umd.runs.progress import during

BY_KIND = -1.0  # The `max_bad` that stands for what is usual for the kind of data.
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
  """Returns the source of that name; the same arguments return the same object.

  Args:
    name: "digits", "tfds:NAME" (with config and version as TFDS writes them), "folder:PATH",
      "npz:FILE" or "latents:DIR" (moments of latents, for image_size (h, w, 2c)).
    split: e.g. "train", "train[:99%]", "all[90%:]".
    pp: preprocessing ops, e.g. "decode|resize(64)|value_range(-1, 1)"; "" for none.
    data_dir: where TFDS keeps its data; by default $TFDS_DATA_DIR, else TFDS's own default.
    cache: whether to keep the undecoded records in memory.
    shuffle_buffer: records to shuffle among, where the storage cannot be read at random.
    max_bad: how many images may be unreadable: a number, a share if it is below 1, or -1 for .001
      of a folder and none of other data. They are skipped, see `umd.data.unreadable`.

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
  return Cached(records) if cache and not isinstance(records, Arrays) else records


def from_arrays(
  name: str,
  images: np.ndarray,
  labels: np.ndarray | None,
  num_classes: int,
  pp: str = "",
  class_names: tuple[str, ...] = (),
) -> Source:
  """Returns a source of uint8 or float32 images [n, H, W, C] in memory, int labels [n] or None."""
  return Source(Arrays(name, images, labels, num_classes, class_names), pp)


PART = r"[^:/\[\]+]+(?:\[[-\d%]*:[-\d%]*\])?"
SPLIT = re.compile(rf"(.+?):({PART}(?:\+{PART})*)")  # "cifar10:3.0.2:train[:10%]+test"


def locate(data: str) -> tuple[str, str]:
  """Returns (name, split), as `load` takes them, of a set that a command line names.

  Raises:
    FileNotFoundError, ValueError: it is no path that is there, and not written as above.
  """
  kind, colon, rest = data.partition(":")
  match = SPLIT.fullmatch(rest)
  if colon and kind == "tfds":
    if not match:
      raise ValueError(f"{data!r} names no split: write tfds:NAME:SPLIT, e.g. tfds:cifar10:train.")
    return f"tfds:{match[1]}", match[2]
  if colon and kind in ("folder", "npz"):
    if match and not _exists(rest):
      return f"{kind}:{match[1]}", match[2]
    return data, "all"
  if not _exists(data):
    raise FileNotFoundError(
      f"{data!r}: there is no such file or folder. Give the path of a folder of images or of an "
      "npz file, or tfds:NAME:SPLIT."
    )
  return ("folder:" if os.path.isdir(os.path.expanduser(data)) else "npz:") + data, "all"


def _exists(path: str) -> bool:
  return os.path.exists(os.path.expanduser(path))


def open_images(data: str, size: int | None = None, data_dir: str = "") -> Source:
  """Returns a set of images in [-1, 1] and of one size; reads the first of them at most.

  Args:
    data: name of the set, see above.
    size: side of the square to which they are brought, the largest in the middle; None: they have
      one size already.
    data_dir: where TFDS keeps its data, as for `load`.

  Raises:
    FileNotFoundError, ValueError: no such set, or none of 8-bit images. While it is read: an image
      of another size than the first.
  """
  name, split = locate(data)
  settings = dict(data_dir=data_dir, max_bad=0)  # Each of them counts.
  small = load(name, split, "decode|resize(1)|value_range(-1, 1)", **settings)
  records = small.records
  if records.dtype not in ("string", "uint8"):
    raise ValueError(
      f"{data!r} holds {records.dtype} images, whose range is not known. Store uint8, 0 to 255."
    )
  if size is not None:
    pp = f"decode|resize_small({size})|central_crop({size})|value_range(-1, 1)"
  elif None not in records.shape:
    pp = "decode|value_range(-1, 1)"
  else:
    height, width = _first_size(small)
    hint = f" as {records.describe(0)} is; give --size N to bring all to one size"
    pp = f"decode|expect_size({height}, {width}, {hint!r})|value_range(-1, 1)"
  return load(name, split, pp, **settings)


def _first_size(source: Source) -> tuple[int, int]:
  """Returns height and width of the first image of a source, before its preprocessing."""
  tf, records = tensorflow(), source.records
  row = next(iter(rows(records, 0, 1)))
  try:
    image = decode()(records.parse(row), OpContext(None, records.shape))["image"]
  except tf.errors.OpError:
    next(eval_batches(source, 1))  # Raises an error that names the file.
    raise
  return image.shape[0], image.shape[1]

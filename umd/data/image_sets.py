"""Sets of images that are to be measured as they are, named as on a command line.

A name is tfds:NAME:SPLIT, folder:PATH[:SPLIT], npz:FILE[:SPLIT], or just the path of a folder or of
an npz file.
"""

import os
import re

from umd.data.host import tensorflow
from umd.data.ops import Context, decode
from umd.data.pipeline import eval_batches
from umd.data.records import rows
from umd.data.sources import Source, load

PART = r"[^:/\[\]+]+(?:\[[-\d%]*:[-\d%]*\])?"
SPLIT = re.compile(rf"(.+?):({PART}(?:\+{PART})*)")  # "cifar10:3.0.2:train[:10%]+test"


def locate(data: str) -> tuple[str, str]:
  """(name, split), as `umd.data.load` takes them, of what a command line names.

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
    return f"{kind}:{rest}", "all"
  if not _exists(data):
    raise FileNotFoundError(
      f"{data!r}: there is no such file or folder. Give the path of a folder of images or of an "
      "npz file, or tfds:NAME:SPLIT."
    )
  return ("folder:" if os.path.isdir(os.path.expanduser(data)) else "npz:") + data, "all"


def open_images(data: str, size: int | None = None, data_dir: str = "") -> Source:
  """The images of a set, in [-1, 1] and of one size; reads the first at most.

  Args:
    data: name of the set, see above.
    size: side of the square to which they are brought, the largest in the middle; None: they have
      one size already.
    data_dir: see `umd.data.load`.

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


def _exists(path: str) -> bool:
  return os.path.exists(os.path.expanduser(path))


def _first_size(source: Source) -> tuple[int, int]:
  """Height and width of the first image of a source, before its preprocessing."""
  tf, records = tensorflow(), source.records
  row = next(iter(rows(records, 0, 1)))
  try:
    image = decode()(records.parse(row), Context(None, records.shape))["image"]
  except tf.errors.OpError:
    next(eval_batches(source, 1))  # Raises an error that names the file.
    raise
  return image.shape[0], image.shape[1]

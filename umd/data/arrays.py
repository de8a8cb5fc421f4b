"""Data that is in memory, decoded: arrays, npz files, scikit-learn's digits."""

import hashlib
import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from umd.data.records import Records, select

NPZ_KEYS = ("images", "labels", "arr_0", "arr_1")


class Arrays(Records):
  """Images in memory, or in a file that is mapped into it: uint8 or float32 [n, H, W, C]."""

  def __init__(
    self,
    name: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    num_classes: int,
    class_names: Sequence[str] = (),
  ):
    """Raises ValueError if the arrays are no images and labels, or do not fit each other."""
    images = np.asarray(images)
    if images.ndim != 4 or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
      raise ValueError(
        f"data {name!r}: images are {images.dtype} {list(images.shape)}, but must be uint8 or "
        "float [n, H, W, C]."
      )
    if not images.size:
      raise ValueError(f"data {name!r} holds no images.")
    if images.dtype != np.uint8:
      images = images.astype(np.float32, copy=False)
    if labels is None or not num_classes:
      labels, num_classes, class_names = np.zeros(len(images), np.int32), 0, ()
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
      raise ValueError(
        f"data {name!r}: labels are {labels.dtype} {list(labels.shape)}, but must be ints "
        f"[{len(images)}], one for each image."
      )
    if num_classes and (labels.min() < 0 or labels.max() >= num_classes):
      raise ValueError(
        f"data {name!r}: labels go from {labels.min()} to {labels.max()}, but must be in "
        f"0..{num_classes - 1} (num_classes={num_classes})."
      )
    super().__init__(name, images.dtype.name, images.shape[1:], num_classes, class_names)
    self.images, self._labels = images, labels.astype(np.int32)

  def __len__(self):
    return len(self.images)

  @property
  def labels(self):
    return self._labels

  def fetch(self, ids):
    return {"image": self.images[ids], "label": self._labels[ids]}

  def fingerprint(self):
    digest = hashlib.sha256(f"{self.images.dtype} {self.images.shape}".encode())
    for part in (*self.images, self._labels):  # An image at a time: they may be mapped from a file.
      digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


def digits(split: str) -> Arrays:
  """Returns the handwritten digits of scikit-learn: 1,797 real 8x8 images of 10 classes.

  They are UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), float32 in
  [-1, 1]. The splits are fixed and stratified: of each class, in the order of the file, every
  fifth image is in "test".
  """
  from sklearn.datasets import load_digits  # Only this source needs scikit-learn.

  bunch = load_digits()
  rank = np.zeros(len(bunch.target), np.int64)  # Of an image within its class.
  for c in range(10):
    (of_class,) = np.nonzero(bunch.target == c)
    rank[of_class] = np.arange(len(of_class))
  (train,), (test,) = np.nonzero(rank % 5 != 4), np.nonzero(rank % 5 == 4)
  members = {"train": train, "test": test}
  sizes = {name: len(ids) for name, ids in members.items()}
  parts = select(split, sizes, "data 'digits'")
  ids = np.concatenate([members[name][i] for name, i in parts])
  images = (bunch.images[ids] / 8.0 - 1.0).astype(np.float32)[..., None]
  return Arrays(f"digits:{split}", images, bunch.target[ids], 10, [str(c) for c in range(10)])


def npz(file: str, split: str) -> Arrays:
  """Returns the images of an npz file: `images` and `labels`, or arr_0 and arr_1 as ADM writes.

  The one split is "all", in the file's order. Labels may be missing; classes are 0..the largest.
  Images that are stored uncompressed, as np.savez does, stay in the file and are read when their
  turn comes: the file must not be changed meanwhile.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no npz file, holds no images, or they and the labels do not fit.
  """
  what, path = f"data 'npz:{file}'", Path(file).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"{what}: there is no such file.")
  try:
    with np.load(path, allow_pickle=False) as arrays:
      names = list(arrays)
      members = {key: _member(path, arrays, key) for key in NPZ_KEYS if key in names}
  except (ValueError, OSError, EOFError, TypeError, struct.error, zipfile.BadZipFile) as error:
    raise ValueError(f"{what} is not readable as npz: {error}") from None
  images = members.get("images", members.get("arr_0"))
  if images is None:
    raise ValueError(f"{what} holds {names}, but neither 'images' nor 'arr_0'.")
  labels = members.get("labels", members.get("arr_1"))
  num_classes = 0 if labels is None or not labels.size else int(labels.max()) + 1
  Arrays(f"npz:{file}", images, labels, num_classes)  # The whole file must fit, not just a slice.
  ids = np.concatenate([ids for _, ids in select(split, {"all": len(images)}, what)])
  # Rows that follow one another are a view; others are copied.
  rows = slice(ids[0], ids[-1] + 1) if (np.diff(ids) == 1).all() else ids
  labels = None if labels is None else labels[rows]
  return Arrays(f"npz:{file}:{split}", images[rows], labels, num_classes)


def _member(path: Path, arrays, key: str) -> np.ndarray:
  """Returns an array of an open npz file: mapped into memory if that can be done, else read.

  Raises:
    ValueError: where the zip says that the array is, there is none, or one of another size.
  """
  member = next((m for m in arrays.zip.infolist() if m.filename == f"{key}.npy"), None)
  if member is None or member.compress_type != zipfile.ZIP_STORED:
    return arrays[key]
  with path.open("rb") as f:
    f.seek(member.header_offset + 26)  # Of the local header, 30 bytes and two texts of these sizes.
    begin = member.header_offset + 30 + sum(struct.unpack("<HH", f.read(4)))
    f.seek(begin)
    if np.lib.format.read_magic(f) != (1, 0):  # Of names that are not ASCII, or thousands of them.
      return arrays[key]
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
    offset = f.tell()
  if dtype.hasobject or not math.prod(shape):
    return arrays[key]
  if offset + math.prod(shape) * dtype.itemsize != begin + member.file_size:
    raise ValueError(f"{key} is {dtype} {list(shape)}, but the file has another number of bytes")
  return np.memmap(path, dtype, "r", offset, shape, order="F" if fortran else "C")

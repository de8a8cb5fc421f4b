"""Data that is in memory, decoded: arrays, npz files, scikit-learn's digits."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from umd.data import splits
from umd.data.records import Records

NPZ_KEYS = ("images", "labels", "arr_0", "arr_1")


class Arrays(Records):
  """Images in memory: uint8 or float32 [n, H, W, C]."""

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
    super().__init__(name, images.dtype.name, images.shape[1:], num_classes, class_names)
    self.images = images
    self._labels = self._checked(labels)

  def _checked(self, labels: np.ndarray | None) -> np.ndarray:
    if labels is None or not self.num_classes:
      self.num_classes, self.class_names = 0, ()
      return np.zeros(len(self), np.int32)
    labels = np.asarray(labels)
    if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
      raise ValueError(
        f"data {self.name!r}: labels are {labels.dtype} {list(labels.shape)}, but must be ints "
        f"[{len(self)}], one for each image."
      )
    if labels.min() < 0 or labels.max() >= self.num_classes:
      raise ValueError(
        f"data {self.name!r}: labels go from {labels.min()} to {labels.max()}, but must be in "
        f"0..{self.num_classes - 1} (num_classes={self.num_classes})."
      )
    return labels.astype(np.int32)

  def __len__(self):
    return len(self.images)

  @property
  def labels(self):
    return self._labels

  def fetch(self, ids):
    return {"image": self.images[ids], "label": self._labels[ids]}


def digits(split: str) -> Arrays:
  """Handwritten digits that come with scikit-learn: 1,797 real 8x8 images of 10 classes.

  UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), float32 in [-1, 1].
  The split is fixed and stratified: of each class, in the order of the file, every fifth image is
  for testing.
  """
  from sklearn.datasets import load_digits  # Only this source needs scikit-learn.

  bunch = load_digits()
  rank = np.zeros(len(bunch.target), np.int64)  # Of an image within its class.
  for c in range(10):
    (of_class,) = np.nonzero(bunch.target == c)
    rank[of_class] = np.arange(len(of_class))
  is_test = rank % 5 == 4
  ids = _select(split, {"train": ~is_test, "test": is_test}, "data 'digits'")
  images = (bunch.images[ids] / 8.0 - 1.0).astype(np.float32)[..., None]
  return Arrays(f"digits:{split}", images, bunch.target[ids], 10, [str(c) for c in range(10)])


def npz(file: str, split: str) -> Arrays:
  """Images of an npz file: `images` and `labels`, or arr_0 and arr_1 as ADM writes them.

  The one split is "all", in the file's order. Labels may be missing; classes are 0..the largest.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no npz file, holds no images, or they and the labels do not fit.
  """
  what, path = f"data 'npz:{file}'", Path(file).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"{what}: there is no such file.")
  try:
    with np.load(path, allow_pickle=False) as arrays:
      known = list(arrays)
      found = {key: arrays[key] for key in NPZ_KEYS if key in known}
  except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
    raise ValueError(f"{what} is not readable as npz: {error}") from None
  images = found.get("images", found.get("arr_0"))
  if images is None:
    raise ValueError(f"{what} holds {known}, but neither 'images' nor 'arr_0'.")
  labels = found.get("labels", found.get("arr_1"))
  num_classes = 0 if labels is None or not labels.size else int(labels.max()) + 1
  Arrays(f"npz:{file}", images, labels, num_classes)  # The whole file must fit, not just a slice.
  ids = _select(split, {"all": np.ones(len(images), bool)}, what)
  labels = None if labels is None else labels[ids]
  return Arrays(f"npz:{file}:{split}", images[ids], labels, num_classes)


def _select(split: str, members: Mapping[str, np.ndarray], what: str) -> np.ndarray:
  """Ids of a split; `members` says of each known one which examples are in it."""
  ids = {name: np.nonzero(of)[0] for name, of in members.items()}
  sizes = {name: len(of) for name, of in ids.items()}
  return np.concatenate([ids[name][i] for name, i in splits.select(split, sizes, what)])

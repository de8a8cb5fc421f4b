"""Sources: named sets of images that can be read at any position."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Images in memory.

  Attributes:
    name: what the images are called in messages, e.g. "digits:train".
    images: float32 [n, H, W, C] in [-1, 1].
    labels: int32 [n] in 0..num_classes - 1.
    num_classes: number of labels.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  num_classes: int

  def __post_init__(self):
    if not len(self.images):
      raise ValueError(f"data {self.name!r} holds no images.")

  def __len__(self) -> int:
    return len(self.images)

  @property
  def image_size(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return self.images.shape[1:]


def digits(split: str) -> Source:
  """Handwritten digits that come with scikit-learn: 1,797 real 8x8 images of 10 classes.

  UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998). The split is fixed
  and stratified: of each class, in the order of the file, every fifth image is for testing.
  """
  from sklearn.datasets import load_digits  # Only this source needs scikit-learn.

  bunch = load_digits()
  rank = np.zeros(len(bunch.target), np.int64)  # Of an image within its class.
  for c in range(10):
    (of_class,) = np.nonzero(bunch.target == c)
    rank[of_class] = np.arange(len(of_class))
  is_test = rank % 5 == 4
  splits = {"train": ~is_test, "test": is_test}
  if split not in splits:
    raise ValueError(f"data 'digits' has no split {split!r}; it has {list(splits)}.")
  images = (bunch.images[splits[split]] / 8.0 - 1.0).astype(np.float32)[..., None]
  labels = bunch.target[splits[split]].astype(np.int32)
  return Source(f"digits:{split}", images, labels, 10)


SOURCES: Mapping[str, Callable[[str], Source]] = {"digits": digits}


def load(name: str, split: str) -> Source:
  """The source `name`, e.g. load("digits", "train"); ValueError lists the known ones."""
  if name not in SOURCES:
    raise ValueError(f"data.name={name!r} is not one of {sorted(SOURCES)}.")
  return SOURCES[name](split)

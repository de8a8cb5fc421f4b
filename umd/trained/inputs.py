"""Checks images, masks and labels that users give a trained model, before anything is computed."""

import difflib
from collections.abc import Sequence

import numpy as np

ALL = "all"
SHOWN = 20  # The names of classes that a message lists.

Size = tuple[int, int, int]
Labels = int | str | Sequence[int | str] | None


def as_images(images, size: Size) -> np.ndarray:
  """Returns images [n, H, W, C], or one [H, W, C], as uint8 or float32 [n, H, W, C].

  Args:
    images: arrays of NumPy or JAX; uint8, or floats in [-1, 1].
    size: (H, W, C) of the model's images.

  Raises:
    ValueError: they have another size, type or range; nothing is resized in silence.
  """
  x = np.asarray(images)
  x = x[None] if x.ndim == 3 else x
  if x.ndim != 4 or x.shape[1:] != tuple(size) or not len(x):
    wanted = " x ".join(map(str, size))
    raise ValueError(
      f"images of shape {np.shape(images)}: the model takes [n, H, W, C] with images of {wanted}. "
      "Crop and resize them first."
    )
  if x.dtype == np.uint8:
    return x
  x = x.astype(np.float32) if np.issubdtype(x.dtype, np.floating) or x.dtype == "bfloat16" else x
  if x.dtype != np.float32:
    raise ValueError(f"images of type {x.dtype}: give uint8, or floats in [-1, 1].")
  if not (np.abs(x) <= 1 + 1e-3).all():  # Not finite ones, too.
    raise ValueError(
      f"float images must be in [-1, 1], these are in [{x.min():g}, {x.max():g}]. Scale them, or "
      "give uint8 images in 0..255."
    )
  return x


def as_mask(mask, size: Size, n: int) -> np.ndarray:
  """Returns the pixels to be filled in, of n images or of one mask for all, as bool [n, H, W].

  Raises:
    ValueError: a mask has another shape, values that are neither 0 nor 1, or nothing to fill.
  """
  x, (height, width, _) = np.asarray(mask), size
  x = x[..., 0] if x.ndim > 2 and x.shape[-1] == 1 and x.shape[-3:-1] == (height, width) else x
  x = x[None] if x.ndim == 2 else x
  if x.ndim != 3 or x.shape[1:] != (height, width) or len(x) not in (1, n):
    raise ValueError(
      f"a mask of shape {np.shape(mask)}: give [{height}, {width}] for all images, or [{n}, "
      f"{height}, {width}]."
    )
  if x.dtype != bool and not np.isin(x, (0, 1)).all():
    raise ValueError(
      f"the mask holds {x.min():g} to {x.max():g}: give True (or 1) where the image is to be "
      "filled in, and False (or 0) where it is known."
    )
  if not (x := x.astype(bool)).any(axis=(1, 2)).all():
    raise ValueError("the mask marks no pixel of an image, so there is nothing to fill in.")
  return np.broadcast_to(x, (n, height, width))


def tiles(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Returns bool [n, rows, columns]: which tiles of a grid over a mask [n, H, W] it touches."""
  (n, height, width), (rows, columns) = mask.shape, grid
  return mask.reshape(n, rows, height // rows, columns, width // columns).any(axis=(2, 4))


def _label(label: int | str, names: Sequence[str], num_classes: int) -> int:
  if isinstance(label, str) and label in names:
    return names.index(label)
  if isinstance(label, str):
    if not label.lstrip("-").isdigit():
      near = difflib.get_close_matches(label.lower(), {n.lower(): n for n in names}, 3)
      near = [n for n in names if n.lower() in near]
      hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
      if not names:
        known = "the data that it was trained on has no names"
      else:
        known = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
      raise ValueError(
        f"label {label!r} is no class of the model.{hint} Give numbers, 0..{num_classes - 1}, or "
        f"names ({known})."
      )
    label = int(label)
  is_whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
  if not is_whole or not 0 <= label < num_classes:
    raise ValueError(f"label {label!r} must be in 0..{num_classes - 1}, or the name of a class.")
  return int(label)


def label_ids(labels: Labels, names: Sequence[str], num_classes: int) -> np.ndarray | None:
  """Returns the classes int32 [L], or None for no labels.

  Args:
    labels: one label or several, as numbers or names; "all" for every class once; None for none.
    names: the names of the classes, () if they are not known. "3" is class 3 unless it is a name.
    num_classes: the number of the model's classes.

  Raises:
    ValueError: there is no such class, or the model has no labels.
  """
  if labels is None:
    return None
  if not num_classes:
    raise ValueError(f"labels={labels!r}: the model was trained without labels. Leave them out.")
  if isinstance(labels, str) and labels == ALL:
    return np.arange(num_classes, dtype=np.int32)
  one = isinstance(labels, (int, str, np.integer))
  several = [labels] if one else np.asarray(labels).ravel().tolist()
  if not several:
    raise ValueError("labels=[] names no class. Give one, 'all', or None for samples without.")
  return np.asarray([_label(label, list(names), num_classes) for label in several], np.int32)

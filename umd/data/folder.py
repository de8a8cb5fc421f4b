"""Folders of image files: ROOT/CLASS/FILE, ROOT/SPLIT/CLASS/FILE, or unlabelled files."""

import hashlib
import os
from pathlib import Path

import numpy as np

from umd.data.host import tensorflow
from umd.data.records import Records, select, split_names

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
ALL = "all"  # The split of a folder that has none.
USUAL_SPLITS = ("train", "val", "valid", "validation", "test")


class Files(Records):
  """Image files, each of which is read when its turn comes."""

  def __init__(self, name: str, paths: list[str], labels: list[int], class_names: list[str]):
    super().__init__(name, "string", (None, None, None), len(class_names), class_names)
    self._paths = np.array([os.fsencode(path) for path in paths], object)
    self._labels = np.array(labels, np.int32)

  def __len__(self):
    return len(self._paths)

  @property
  def labels(self):
    return self._labels

  def fetch(self, ids):
    return {"path": self._paths[ids], "label": self._labels[ids]}

  def parse(self, row):
    return {"image": tensorflow().io.read_file(row["path"]), "label": row["label"]}

  def fingerprint(self):
    """Returns a hash of the files' names, sizes, dates and labels."""
    digest = hashlib.sha256(self._labels.tobytes())
    for path in self._paths:
      stat = os.stat(path)
      digest.update(path + f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()

  def describe(self, index):
    return f"file {os.fsdecode(self._paths[index])!r}"


def folder(root: str, split: str) -> Files:
  """Returns the images below ROOT/SPLIT if there is such a folder; all if `split` is "all".

  Folders there are classes, numbered by name (the classes of all splits together), however deep
  the files in them lie; images without folders have no labels. The order is that of a hash of the
  files' names, which mixes classes: slices such as "all[:90%]" are fair samples.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: no such split, no images, an empty class, or images beside classes.
  """
  what = f"data 'folder:{root}'"
  top = Path(root).expanduser()
  if not top.is_dir():
    raise FileNotFoundError(f"{what}: there is no such folder.")
  places = {name: _place(top, name, what) for name in split_names(split, what)}
  files = {name: _images(place, what) for name, place in places.items()}
  flat = [name for name, images in files.items() if len(images[0].parts) == 1]
  if 0 < len(flat) < len(files):
    raise ValueError(f"{what}: no folders of classes in {flat[0]!r}, but in the other splits.")
  classes = _classes(top, places, files)
  number = {c: i for i, c in enumerate(classes)}
  paths, labels = [], []
  sizes = {name: len(images) for name, images in files.items()}
  for name, ids in select(split, sizes, what):
    chosen = [files[name][i] for i in ids]
    paths += [str(places[name] / file) for file in chosen]
    labels += [number[file.parts[0]] if classes else 0 for file in chosen]
  return Files(f"folder:{root}:{split}", paths, labels, classes)


def _place(top: Path, name: str, what: str) -> Path:
  """Returns the folder that holds a split."""
  subfolders = _folders(top)
  if name in subfolders:
    return top / name
  usual = [folder for folder in subfolders if folder in USUAL_SPLITS]
  if name == ALL and not (usual and len(usual) == len(subfolders)):
    return top
  known = ", ".join(subfolders if usual else [ALL, *subfolders[:8]])
  raise ValueError(f"{what} has no split {name!r}; it has {known}.")


def _images(place: Path, what: str) -> list[Path]:
  """Returns the image files below a folder, relative to it, in the order of a hash of their names.

  Raises:
    ValueError: there are none, a class is empty, or images lie beside folders of classes.
  """
  images, visited = [], set()
  for base, folders, files in os.walk(place, followlinks=True):
    real = os.path.realpath(base)
    if real in visited:  # A link back to a folder above.
      folders.clear()
      continue
    visited.add(real)
    folders[:] = [folder for folder in folders if not folder.startswith(".")]
    below = Path(base).relative_to(place)
    images += [
      below / file
      for file in files
      if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
    ]
  if not images:
    raise ValueError(f"{what}: no images ({', '.join(EXTENSIONS)}) in {str(place)!r}.")
  labelled = {file.parts[0] for file in images if len(file.parts) > 1}
  beside = [file for file in images if len(file.parts) == 1]
  if labelled and beside:
    raise ValueError(
      f"{what}: {str(place)!r} holds both images ({beside[0].name!r}) and folders of images "
      f"({min(labelled)!r}): sort the images into the folders, or remove one or the other."
    )
  empty = sorted(set(_folders(place)) - labelled)
  if labelled and empty:
    raise ValueError(f"{what}: no images of class {empty[0]!r} in {str(place / empty[0])!r}.")
  key = lambda file: hashlib.blake2b(os.fsencode(file.as_posix()), digest_size=8).digest()
  return sorted(images, key=key)


def _classes(top: Path, places: dict[str, Path], files: dict[str, list[Path]]) -> list[str]:
  """Returns sorted names of classes: those of these splits, and those that share their numbers."""
  classes = {file.parts[0] for images in files.values() for file in images if len(file.parts) > 1}
  if not classes or top in places.values():
    return sorted(classes)
  for other in _folders(top):
    of_other = set(_folders(top / other))
    if other in USUAL_SPLITS or of_other & classes:
      classes |= of_other
  return sorted(classes)


def _folders(place: Path) -> list[str]:
  return sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))

"""The images that a page shows: examples that were not trained on, and those that were."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from umd import workdir
from umd.data import Source, load, train_batches
from umd.data.image_sets import open_images
from umd.description import CONFIG, FORMAT

HELD_OUT, TRAINED_ON = ("test", "data"), ("train", "reference")  # Settings of evaluators.
BATCH, SHUFFLED, SEED = 64, 4096, 0

Size = tuple[int, int, int]
Tell = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images [n, H, W, C], uint8, and their labels.

  Attributes:
    name: of the data.
    images: in no order.
    labels: int32 [n], or None for data without.
    class_names: of the labels; () if the data has none.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray | None
  class_names: tuple[str, ...]

  def label(self, i: int) -> str:
    """What image i shows, in words; "" where nobody knows."""
    if self.labels is None:
      return ""
    label = int(self.labels[i])
    return self.class_names[label] if self.class_names else f"class {label}"


def draw(source: Source, num: int, tell: Tell = lambda done, total: None) -> ImageSet:
  """`num` images of a source, or all if there are no more, spread at random over it."""
  num = min(num, len(source))
  size, images, labels = min(BATCH, num), [], []
  for batch in train_batches(source, size, seed=SEED):
    images.append(np.round((np.clip(batch["image"], -1, 1) + 1) * 127.5).astype(np.uint8))
    labels.append(np.array(batch["label"]))  # The batch may be a view of memory that is reused.
    tell(min(len(images) * size, num), num)
    if len(images) * size >= num:
      break
  labels = np.concatenate(labels)[:num] if source.num_classes else None
  return ImageSet(source.name, np.concatenate(images)[:num], labels, source.class_names)


def config_of(folder: str) -> Mapping | None:
  """The config of the run in a folder; None for an exported model, which has none."""
  config = workdir.read_json(workdir.join(folder, CONFIG)) or {}
  return None if FORMAT in config else config


def _specs(config: Mapping, names: Sequence[str]) -> Iterator[Mapping]:
  """Data of the run's evaluators under settings of these names; its own data set comes first."""
  settings = config["evals"].values()
  found = [s[n] for s in settings for n in names if isinstance(s.get(n), Mapping)]
  own = config["data"]["name"]
  yield from sorted(found, key=lambda spec: spec["name"] != own)


def _first(specs: Iterator[Mapping], size: Size) -> Source:
  """The first source of images of that size.

  Raises:
    ValueError: there is none; says why.
  """
  reasons = []
  for spec in specs:
    try:
      source = load(**{**spec, "cache": False, "shuffle_buffer": SHUFFLED})
    except (ValueError, OSError) as error:
      reasons.append(str(error))
      continue
    if tuple(source.image_size) == tuple(size):
      return source
    wanted, is_ = (" x ".join(map(str, s)) for s in (size, source.image_size))
    reasons.append(f"{source.name} has images of {is_}, the model takes {wanted}")
  raise ValueError(reasons[0] if reasons else "the run names no such data")


def held_out(config: Mapping, size: Size) -> Source:
  """Images that the run was evaluated on and not trained on; ValueError if there are none here."""
  own = config["data"]["name"], config["data"]["split"]
  differs = lambda spec: (spec["name"], spec["split"]) != own
  return _first(filter(differs, _specs(config, HELD_OUT)), size)


def trained_on(config: Mapping, size: Size) -> Source:
  """Images that the run was trained on, if it can be without augmentation; ValueError if none."""

  def specs():
    own = config["data"]["name"]
    for spec in _specs(config, TRAINED_ON):
      if spec["name"] == own or own.startswith("latents:"):
        yield spec
    yield config["data"]

  return _first(specs(), size)


def named(data: str, size: Size, data_dir: str = "") -> Source:
  """The images that a command line names, see `umd.data.image_sets`.

  Raises:
    FileNotFoundError, ValueError: there are none, or not of the model's size.
  """
  source = open_images(data, size[0], data_dir)
  if tuple(source.image_size) != tuple(size):
    wanted, found = (" x ".join(map(str, s)) for s in (size, source.image_size))
    raise ValueError(f"--data={data!r} gives images of {found}, but the model takes {wanted}.")
  return source

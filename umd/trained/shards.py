"""Samples on disk, written shard by shard, so that a killed run goes on where it was.

  shards/00000.npy    uint8 [n, H, W, C], and so on
  samples.npz         all of them in ADM's format: arr_0 [n, H, W, 3], arr_1 labels
  png/000000.png      each of them
  grid.png            some of them
  progress/           what they are samples of and what is there, see `umd.runs.sharded`

Sample i is the same whatever else is drawn with it, so shards may be drawn by any process, in any
batch.
"""

import concurrent.futures
import dataclasses
import os
import time
import zipfile
from collections.abc import Callable

import numpy as np

from umd.runs import progress, sharded
from umd.trained import pictures
from umd.trained.model import Pretrained

LARGEST, SMALLEST, NUMBER = 256, 16, 64  # Images in a shard, at most and at least; shards.
ROWS, COLUMNS = 20, 16  # Of the grid, at most.


@dataclasses.dataclass(frozen=True)
class SamplePlan(sharded.Plan):
  """What is to be drawn; `settings` hold num, labels, seed, image_size, sampling and quantize."""

  name: str = "samples"

  @property
  def num(self) -> int:
    """Number of samples."""
    return self.settings["num"]

  @property
  def labels(self) -> list[int] | None:
    """The labels: sample i has labels[i mod L]. None without."""
    return self.settings["labels"]

  @property
  def shape(self) -> tuple[int, int, int]:
    """(H, W, C) of a sample."""
    return tuple(self.settings["image_size"])

  @property
  def shard_size(self) -> int:
    """Images in a shard, but for the last: it follows from their number alone."""
    return min(LARGEST, max(SMALLEST, -(-self.num // NUMBER)))

  @property
  def shards(self) -> int:
    """Number of files."""
    return -(-self.num // self.shard_size)

  def rows(self, shard: int) -> range:
    """Returns which samples are in a shard."""
    return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num))

  def path(self, *names: str) -> str:
    """Returns the path of something in the folder."""
    return os.path.join(self.folder, *names)

  def file(self, shard: int) -> str:
    return self.path("shards", f"{shard:05d}.npy")


def begin(plan: SamplePlan, is_main: bool = True) -> None:
  """Writes the settings down, or compares them; checks that what is missing fits on the disk."""
  sharded.begin(plan, is_main)
  left = sum(len(plan.rows(shard)) for shard in sharded.missing(plan))
  sharded.check_space(plan, left, int(np.prod(plan.shape)))


def draw(
  plan: SamplePlan, model: Pretrained, batch_size: int, place: tuple[int, int] = (0, 1)
) -> tuple[int, float]:
  """Draws what is missing of the shards of process `place` (its index, of how many).

  Returns:
    (how many samples were drawn, in how many seconds).
  """
  todo = [shard for shard in sharded.missing(plan) if shard % place[1] == place[0]]
  if not todo:
    return 0, 0.0
  index, start = np.concatenate([plan.rows(shard) for shard in todo]), time.monotonic()
  clock = progress.Clock(progress.say, "samples drawn here", len(index))
  batches = model.draw(
    index,
    plan.labels,
    batch_size=batch_size,
    seed=plan.settings["seed"],
    quantize=plan.settings["quantize"],
    **plan.settings["sampling"],
  )
  pending, images = iter(todo), np.zeros((0, *plan.shape), np.uint8)
  shard = next(pending)
  for rows, batch in batches:
    images = np.concatenate([images, batch])
    while shard is not None and len(images) >= len(plan.rows(shard)):
      count = len(plan.rows(shard))
      _write_shard(plan, shard, images[:count])
      images, shard = images[count:], next(pending, None)
    clock(rows.stop)
  return len(index), time.monotonic() - start


def _write_shard(plan: SamplePlan, shard: int, images: np.ndarray) -> None:
  def write(path):
    with open(path, "wb") as file:
      np.save(file, images)

  sharded.write_shard(plan, shard, write)


def load(plan: SamplePlan, index) -> np.ndarray:
  """Returns uint8 [n, H, W, C]: the samples of that index, in that order."""
  one = lambda i: np.load(plan.file(i // plan.shard_size), mmap_mode="r")[i % plan.shard_size]
  return np.stack([one(int(i)) for i in index])


def labels_of(plan: SamplePlan) -> np.ndarray | None:
  """Returns the samples' labels as int64 [num], None without labels."""
  if plan.labels is None:
    return None
  return np.asarray(plan.labels, np.int64)[np.arange(plan.num) % len(plan.labels)]


def write_npz(plan: SamplePlan) -> str:
  """Writes all samples in ADM's format, a shard in memory at a time; grey ones become RGB."""
  path, (height, width, channels) = plan.path("samples.npz"), plan.shape
  shape = (plan.num, height, width, 3 if channels == 1 else channels)
  header = {"descr": "|u1", "fortran_order": False, "shape": shape}
  with zipfile.ZipFile(f"{path}.tmp", "w", zipfile.ZIP_STORED) as archive:
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
      np.lib.format.write_array_header_1_0(file, header)
      for shard in range(plan.shards):
        images = np.load(plan.file(shard))
        wide = np.broadcast_to(images, (*images.shape[:3], shape[3]))
        file.write(np.ascontiguousarray(wide).data)
    if (labels := labels_of(plan)) is not None:
      with archive.open("arr_1.npy", "w") as file:
        np.lib.format.write_array(file, labels)
  os.replace(f"{path}.tmp", path)
  return path


def write_pngs(plan: SamplePlan) -> str:
  """Writes a PNG file of each sample that has none yet."""
  folder = plan.path("png")
  os.makedirs(folder, exist_ok=True)
  existing = set(os.listdir(folder))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for shard in range(plan.shards):
      if todo := [i for i in plan.rows(shard) if f"{i:06d}.png" not in existing]:
        write = lambda i, image: pictures.write_png(os.path.join(folder, f"{i:06d}.png"), image)
        list(pool.map(write, todo, load(plan, todo)))
  return folder


def write_grid(plan: SamplePlan) -> str:
  """Writes a picture of some samples: of up to 20 labels a row each, else in order."""
  several = len(plan.labels or ())
  if 1 < several <= min(ROWS, plan.num):
    columns = min(COLUMNS, plan.num // several)
    index = [row + several * column for row in range(several) for column in range(columns)]
  else:
    index = range(min(plan.num, ROWS * COLUMNS))
    columns = min(COLUMNS, int(np.ceil(np.sqrt(len(index)))))
  path = plan.path("grid.png")
  pictures.write_png(path, pictures.grid(load(plan, index), columns))
  return path


OUTPUTS: dict[str, Callable[[SamplePlan], str]] = {
  "grid": write_grid,
  "png": write_pngs,
  "npz": write_npz,
}

"""Samples on disk, written as they come, so that a killed run goes on where it was.

  settings.json       what they are samples of, first
  shards/00000.npy    uint8 [n, H, W, C], and so on
  samples.npz         all of them in ADM's format: arr_0 [n, H, W, 3], arr_1 labels
  png/000000.png      each of them
  grid.png            some of them

Sample i is the same whatever else is drawn with it, so shards may be drawn by any process, in any
batch. Each is written under another name and renamed.
"""

import concurrent.futures
import dataclasses
import io
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from umd.runs import progress, workdir
from umd.trained import pictures
from umd.trained.model import Pretrained

SETTINGS, SHARDS, NPZ, PNG, GRID = "settings.json", "shards", "samples.npz", "png", "grid.png"
LARGEST, SMALLEST, NUMBER = 256, 16, 64  # Images in a shard, at most and at least; shards.
PATIENCE = 60.0  # Seconds until what one process writes is seen by all.
ROWS, COLUMNS = 20, 16  # Of the grid, at most.


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be drawn.

  Attributes:
    folder: where it goes.
    settings: all that the samples depend on; JSON.
    command: that draws them.
  """

  folder: str
  settings: dict
  command: str

  @property
  def num(self) -> int:
    """Number of samples."""
    return self.settings["num"]

  @property
  def labels(self) -> list[int] | None:
    """Sample i has the label labels[i mod L]; None without."""
    return self.settings["labels"]

  @property
  def shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
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
    """The samples in a shard."""
    return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num))

  def path(self, *names: str) -> str:
    """Of something in the folder."""
    return os.path.join(self.folder, *names)

  def file(self, shard: int) -> str:
    """Of a shard."""
    return self.path(SHARDS, f"{shard:05d}.npy")


def begin(plan: Plan, is_main: bool = True) -> None:
  """Writes the settings down, or compares them with those that are there.

  Raises:
    ValueError: the folder holds other samples (lists the differences) or something else, cannot be
      written, or there is no room.
  """
  path = plan.path(SETTINGS)
  known = workdir.read_json(path)
  if known is not None:
    differ = workdir.differences(known["settings"], plan.settings)
    if differ:
      lines = "\n".join(f"  {k}: there {old!r}, now {new!r}" for k, (old, new) in differ.items())
      raise ValueError(
        f"--out={plan.folder!r} holds samples with other settings:\n{lines}\nChoose another "
        f"folder, or give the old settings; the command was: {known['command']}"
      )
  elif is_main:
    if os.path.isfile(plan.folder) or (os.path.isdir(plan.folder) and os.listdir(plan.folder)):
      raise ValueError(f"--out={plan.folder!r} holds something else. Choose another folder.")
    try:
      os.makedirs(plan.path(SHARDS))
      workdir.write_json(path, {"settings": plan.settings, "command": plan.command})
    except OSError as error:
      raise ValueError(f"--out={plan.folder!r} cannot be written: {error}.") from None
  until = time.monotonic() + PATIENCE
  while not os.path.exists(path):
    if time.monotonic() > until:
      raise ValueError(
        f"--out={plan.folder!r}: what process 0 writes there is not seen by all processes. Choose "
        "a folder on a file system that all machines share."
      )
    time.sleep(0.2)
  check_space(plan)


def check_space(plan: Plan) -> None:
  """Raises ValueError if the samples that are missing will not fit on the disk."""
  left = sum(len(plan.rows(shard)) for shard in missing(plan))
  needed, free = left * int(np.prod(plan.shape)), shutil.disk_usage(plan.folder).free
  if needed > free:
    raise ValueError(
      f"--out={plan.folder!r}: {left} samples need {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB "
      "are free. Choose another disk."
    )


def missing(plan: Plan) -> list[int]:
  """Shards that are not there yet, or not whole."""

  def whole(shard: int) -> bool:
    try:
      found = np.load(plan.file(shard), mmap_mode="r")
    except (OSError, ValueError):
      return False
    return found.dtype == np.uint8 and found.shape == (len(plan.rows(shard)), *plan.shape)

  return [shard for shard in range(plan.shards) if not whole(shard)]


def draw(
  plan: Plan, model: Pretrained, batch_size: int, place: tuple[int, int] = (0, 1)
) -> tuple[int, float]:
  """Draws what is missing of the shards of process `place` (its index, of how many).

  Returns (how many samples were drawn, in how many seconds).
  """
  todo = [shard for shard in missing(plan) if shard % place[1] == place[0]]
  if not todo:
    return 0, 0.0
  index, start = np.concatenate([plan.rows(shard) for shard in todo]), time.monotonic()
  clock = progress.Clock(progress.say, "samples drawn here", len(index))
  how = dict(seed=plan.settings["seed"], quantize=plan.settings["quantize"])
  drawn = model.draw(index, plan.labels, batch_size=batch_size, **how, **plan.settings["sampling"])
  images, waiting = np.zeros((0, *plan.shape), np.uint8), iter(todo)
  shard = next(waiting)
  for rows, found in drawn:
    images = np.concatenate([images, found])
    while shard is not None and len(images) >= len(plan.rows(shard)):
      count = len(plan.rows(shard))
      _write_array(plan.file(shard), images[:count])
      images, shard = images[count:], next(waiting, None)
    clock(rows.stop)
  return len(index), time.monotonic() - start


def _write_array(path: str, array: np.ndarray) -> None:
  file = io.BytesIO()
  np.save(file, array)
  workdir.write_bytes(path, file.getvalue())


def wait(plan: Plan, tell: progress.Tell, pause: float = 2.0) -> None:
  """Returns when all shards are there: other processes may be drawing some."""
  told = None
  while left := len(missing(plan)):
    if left != told:
      tell(f"waiting for {left} of {plan.shards} shards, which other processes draw")
    told = left
    time.sleep(pause)


def load(plan: Plan, index) -> np.ndarray:
  """uint8 [n, H, W, C]: the samples of that index, in that order."""
  one = lambda i: np.load(plan.file(i // plan.shard_size), mmap_mode="r")[i % plan.shard_size]
  return np.stack([one(int(i)) for i in index])


def _each_shard(plan: Plan) -> Iterator[np.ndarray]:
  return (np.load(plan.file(shard)) for shard in range(plan.shards))


def labels_of(plan: Plan) -> np.ndarray | None:
  """int64 [num], None without labels."""
  if plan.labels is None:
    return None
  return np.asarray(plan.labels, np.int64)[np.arange(plan.num) % len(plan.labels)]


def write_npz(plan: Plan) -> str:
  """All samples in ADM's format, a shard in memory at a time; grey ones become RGB."""
  path, (height, width, channels) = plan.path(NPZ), plan.shape
  shape = (plan.num, height, width, 3 if channels == 1 else channels)
  header = {"descr": "|u1", "fortran_order": False, "shape": shape}
  with zipfile.ZipFile(path + ".tmp", "w", zipfile.ZIP_STORED) as archive:
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
      np.lib.format.write_array_header_1_0(file, header)
      for images in _each_shard(plan):
        wide = np.broadcast_to(images, (*images.shape[:3], shape[3]))
        file.write(np.ascontiguousarray(wide).data)
    if (labels := labels_of(plan)) is not None:
      with archive.open("arr_1.npy", "w") as file:
        np.lib.format.write_array(file, labels)
  os.replace(path + ".tmp", path)
  return path


def write_pngs(plan: Plan) -> str:
  """A PNG file of each sample that has none yet."""
  os.makedirs(plan.path(PNG), exist_ok=True)
  there = set(os.listdir(plan.path(PNG)))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for shard in range(plan.shards):
      names = {i: f"{i:06d}.png" for i in plan.rows(shard)}
      if todo := [i for i in names if names[i] not in there]:
        write = lambda i, image: pictures.write_png(plan.path(PNG, f"{i:06d}.png"), image)
        list(pool.map(write, todo, load(plan, todo)))
  return plan.path(PNG)


def write_grid(plan: Plan) -> str:
  """A picture of some samples: of up to 20 labels a row each, else in order."""
  several = len(plan.labels or ())
  if 1 < several <= min(ROWS, plan.num):
    columns = min(COLUMNS, plan.num // several)
    index = [row + several * column for row in range(several) for column in range(columns)]
  else:
    index = range(min(plan.num, ROWS * COLUMNS))
    columns = min(COLUMNS, int(np.ceil(np.sqrt(len(index)))))
  pictures.write_png(plan.path(GRID), pictures.grid(load(plan, index), columns))
  return plan.path(GRID)


OUTPUTS: dict[str, Callable[[Plan], str]] = {
  "grid": write_grid,
  "png": write_pngs,
  "npz": write_npz,
}

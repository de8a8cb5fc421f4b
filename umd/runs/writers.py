"""Where numbers and pictures go: JSON lines, PNG files, TensorBoard and Weights & Biases."""

import dataclasses
import io
import json
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from umd.runs import workdir as folder

REWRITE_SECONDS = 60.0  # Object stores cannot append: metrics.jsonl is rewritten so often there.


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """A picture to be logged: uint8 [H, W, 1 or 3]."""

  pixels: UInt8[np.ndarray, "h w c"]


def numbers(values: dict) -> dict[str, float]:
  """Returns the numbers among values of all types."""
  return {k: float(v) for k, v in values.items() if not isinstance(v, (str, Images))}


def to_grid(images: np.ndarray, columns: int, scale: int = 1, gap: int = 1) -> Images:
  """Tiles images [n, H, W, C] in [-1, 1] into rows of `columns`, each pixel drawn `scale` x `scale`.

  Pixels are rounded to the nearest of 256 levels; gaps are mid-grey.
  """
  n, h, w, c = images.shape
  rows = -(-n // columns)
  pixels = np.round((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
  pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  h, w = h * scale + gap, w * scale + gap
  grid = np.full((rows * h + gap, columns * w + gap, c), 128, np.uint8)
  for i, image in enumerate(pixels):
    y, x = (i // columns) * h + gap, (i % columns) * w + gap
    grid[y : y + h - gap, x : x + w - gap] = image
  return Images(grid)


def read_jsonl(path: str) -> list[dict]:
  """Returns the records of a JSON-lines file, without a last line that a killed writer left torn."""
  records = []
  for line in (folder.read_bytes(path) or b"").splitlines():
    try:
      records.append(json.loads(line))
    except ValueError:
      break
  return records


class Sink:
  """A place where values go. A sink overrides what it has a use for."""

  def values(self, step: int, values: dict[str, float | str]) -> None:
    """Takes the numbers and words of a step."""

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    """Takes a picture, uint8 [H, W, 1 or 3]."""

  def flush(self) -> None:
    """Returns when everything written is safe on disk, as far as the sink can tell."""

  def close(self) -> None:
    """Ends the writing."""


class JsonLines(Sink):
  """Writes `metrics.jsonl`: one record per call, {"step": n, name: value, ...}.

  In a folder of this machine a record is there at once; at an address within a minute, or at
  `flush`.
  """

  def __init__(self, workdir: str, start_step: int):
    """Drops the records after `start_step`, which a resumed run writes again."""
    self._path = folder.join(workdir, "metrics.jsonl")
    self.earlier = [r for r in read_jsonl(self._path) if r["step"] <= start_step]
    self._lines = [json.dumps(r) + "\n" for r in self.earlier]
    self._rewrite()
    self._file = None
    if not folder.scheme(workdir):
      self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

  def _rewrite(self) -> None:
    folder.write_bytes(self._path, "".join(self._lines).encode())
    self._written = len(self._lines)
    self._time = time.monotonic()

  def values(self, step: int, values: dict[str, float | str]) -> None:
    line = json.dumps({"step": step, **values}) + "\n"
    if self._file:
      self._file.write(line)
      self._file.flush()
      return
    self._lines.append(line)
    if time.monotonic() - self._time >= REWRITE_SECONDS:
      self._rewrite()

  def flush(self) -> None:
    if self._file:
      os.fsync(self._file.fileno())
    elif self._written < len(self._lines):
      self._rewrite()

  def close(self) -> None:
    if self._file:
      self._file.close()
    else:
      self.flush()


class PngFolder(Sink):
  """Writes `images/<name>_<step>.png`."""

  def __init__(self, workdir: str):
    self._folder = folder.join(workdir, "images")

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "png")
    folder.write_bytes(folder.join(self._folder, f"{name}_{step:08d}.png"), buffer.getvalue())


class TensorBoard(Sink):
  """Writes event files in `tensorboard/`, by clu on a thread of its own."""

  def __init__(self, workdir: str):
    from clu import metric_writers

    logdir = folder.join(workdir, "tensorboard")
    self._writer = metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(logdir)])

  def values(self, step: int, values: dict[str, float | str]) -> None:
    texts = {k: v for k, v in values.items() if isinstance(v, str)}
    if numbers := {k: v for k, v in values.items() if k not in texts}:
      self._writer.write_scalars(step, numbers)
    if texts:
      self._writer.write_texts(step, texts)

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    self._writer.write_images(step, {name: pixels[None]})

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class Wandb(Sink):
  """Logs to Weights & Biases. Whatever goes wrong there is a warning, never the end of a run."""

  def __init__(self, workdir: str, config: dict, key: str | None, **settings):
    """Starts the run, or continues the one that `wandb_id` in the workdir names.

    Args:
      workdir: also where offline data goes (a temporary folder if the workdir is an address).
      config: shown beside the curves.
      key: API key, None to use the login of the machine.
      **settings: mode ("online" or "offline"), project, entity, name.
    """
    self._run = self._attempt(self._start, workdir, config, key, settings)

  def _start(self, workdir, config, key, settings):
    import wandb

    if key and settings["mode"] == "online":
      wandb.login(key=key)
    id_file = folder.join(workdir, "wandb_id")
    if not folder.read_bytes(id_file):
      folder.write_bytes(id_file, secrets.token_hex(4).encode())
    run_id = folder.read_bytes(id_file).decode()
    # Its own files must be on this machine.
    local = tempfile.mkdtemp(prefix="wandb_") if folder.scheme(workdir) else workdir
    return wandb.init(dir=local, config=config, id=run_id, resume="allow", **settings)

  def _log_image(self, step, name, pixels):
    import wandb

    self._run.log({name: wandb.Image(pixels)}, step=step)

  def _attempt(self, call, *args, **kwargs):
    try:
      return call(*args, **kwargs)
    except Exception as error:  # Any failure of a remote service: the run goes on without it.
      warnings.warn(f"wandb: {error}. The run goes on; metrics.jsonl has everything.", stacklevel=2)
      return None

  def values(self, step: int, values: dict[str, float | str]) -> None:
    if self._run:
      self._attempt(self._run.log, values, step=step)

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    if self._run:
      self._attempt(self._log_image, step, name, pixels)

  def close(self) -> None:
    if self._run:
      self._attempt(self._run.finish)


class Writer:
  """Sends every value to every sink by its type: numbers and words as values, `Images` as pictures.

  Attributes:
    latest: the newest value of every number.
  """

  def __init__(self, sinks: list[Sink], earlier: Sequence[dict] = ()):
    """Writes to `sinks`; `earlier` are the records of the run before this start."""
    self._sinks = sinks
    self.latest = {}
    for record in earlier:
      self.latest.update(numbers({k: v for k, v in record.items() if k != "step"}))

  def write(self, step: int, values: dict[str, float | str | Images]) -> None:
    plain = {k: v for k, v in values.items() if not isinstance(v, Images)}
    plain = {k: v if isinstance(v, str) else float(v) for k, v in plain.items()}
    self.latest.update(numbers(plain))
    for sink in self._sinks:
      if plain:
        sink.values(step, plain)
      for name, value in values.items():
        if isinstance(value, Images):
          sink.image(step, name, value.pixels)

  def flush(self) -> None:
    """Returns when everything written is safe on disk, as far as the sinks can tell."""
    for sink in self._sinks:
      sink.flush()

  def close(self) -> None:
    for sink in self._sinks:
      sink.close()


@dataclasses.dataclass(frozen=True)
class Work:
  """The arithmetic that a step asks of each device.

  Attributes:
    flops: floating-point operations of a step on one device, 0 if they are not counted.
    peak: FLOP/s that the device can do at most, None if not known.
  """

  flops: float = 0.0
  peak: float | None = None


class Progress:
  """Measures the speed and the remaining time of a loop of `steps` steps; pauses do not count."""

  def __init__(self, steps: int, start_step: int, batch_size: int, work: Work = Work()):
    self._steps = steps
    self._batch_size = batch_size
    self._work = work
    self._seconds = 0.0
    self._done = 0
    self._compiled = False
    self.resume(start_step)

  def resume(self, step: int) -> None:
    """Starts the clock (again) before step `step`."""
    self._step, self._time = step, time.perf_counter()

  def tick(self, step: int) -> dict[str, float]:
    """Returns {images_per_second, eta_seconds} at `step`, over the time since the last call.

    Where the work of a step is known, {teraflops_per_second} of a device is added, and where the
    peak of the device is known, {mfu}, the share of it (model FLOPs utilisation).
    """
    now = time.perf_counter()
    seconds, done = now - self._time, step - self._step
    self._step, self._time = step, now
    if self._compiled:
      self._seconds, self._done = self._seconds + seconds, self._done + done
    # The first stretch holds the compilation: it is forgotten once there is a second.
    total, count = (self._seconds, self._done) if self._compiled else (seconds, done)
    self._compiled = True
    eta = total / max(count, 1) * (self._steps - step)
    rate = done / max(seconds, 1e-9)
    pace = {"images_per_second": rate * self._batch_size, "eta_seconds": eta}
    if self._work.flops:
      pace["teraflops_per_second"] = rate * self._work.flops / 1e12
      if self._work.peak:
        pace["mfu"] = rate * self._work.flops / self._work.peak
    return pace

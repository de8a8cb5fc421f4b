"""What a checkpoint costs: seconds that a save holds training up, and those of a restart.

python -m benchmarks.checkpoint --variant S/4 --size 64 --repeats 5 --out checkpoint.jsonl

The trainer's state (parameters, their average, the optimiser's moments) with random numbers, saved
and restored by the trainer's own functions, over and over in one process.

  blocking    until the arrays are copied and training may go on
  background  from there until the checkpoint, checksums and all, is complete
  verify      reading all files and comparing their checksums, as a start does first
  restore     reading the arrays and placing them on the devices

What was just written is read from memory where the system keeps it there, not from the disk.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks import harness
from benchmarks.harness import Column
from configs import ae_i1k
from tools.command_line import positive
from trainers import diffusion, optim
from trainers.config.check import read_stage
from trainers.config.records import to_dict
from umd.devices.mesh import make_mesh
from umd.models.network import init_params
from umd.runs.checkpoint import FOLDER, Checkpoints
from umd.runs.integrity import find_newest
from umd.state import TrainState, init_state

COLUMNS = (
  Column("", "kind"),
  Column("state MB", "state_mb", "{:.1f}"),
  Column("disk MB", "disk_mb", "{:.1f}"),
  Column("seconds", "seconds", "{:.3f}"),
  Column("min", "seconds_min", "{:.3f}"),
  Column("max", "seconds_max", "{:.3f}"),
  Column("first", "first", "{:.3f}"),
  Column("MB/s", "mb_per_second", "{:.0f}"),
)
KINDS = ("blocking", "background", "verify", "restore")


def make_state(variant: str, size: int) -> TrainState:
  """Returns the state of a run of that config, with random numbers: zeros compress too well."""
  config = read_stage(ae_i1k.get_config(f"variant={variant},size={size}").pretrain)
  model = diffusion.make_model(config, (size, size, 3), num_classes=1000)
  settings = to_dict(config.optim)
  schedule = optim.make_schedule(settings.pop("lr"), 1000, settings.pop("warmup"))
  tx = optim.make_optimizer(schedule, **settings)
  init = functools.partial(init_params, model)
  state = init_state(init, tx, jax.random.key(0), make_mesh())
  rng = np.random.default_rng(0)

  def fill(leaf):
    if leaf.ndim == 0:
      return leaf
    values = rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)
    return jax.device_put(values, leaf.sharding)

  return jax.tree.map(fill, state)


def measure(state: TrainState, workdir: str, repeats: int) -> dict[str, list[float]]:
  """Returns {kind: seconds of each repeat}; every repeat saves another step and restores it.

  Raises:
    OSError: a checkpoint could not be written.
    ValueError: what was restored is not what was saved.
  """
  seconds = {kind: [] for kind in KINDS}

  def measured(kind: str, work: Callable):
    start = time.perf_counter()
    result = jax.block_until_ready(work())
    seconds[kind].append(time.perf_counter() - start)
    return result

  with Checkpoints(workdir, keep=1) as checkpoints:
    for step in range(1, repeats + 1):
      measured("blocking", functools.partial(checkpoints.save, state, step, {"position": step}))
      if not measured("background", checkpoints.wait):
        raise OSError(f"the checkpoint in {workdir} could not be written, see above.")
      measured("verify", lambda: find_newest(os.path.join(workdir, FOLDER)))
      restored, _ = measured("restore", functools.partial(checkpoints.restore, state, step))
      for saved, read in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        if not np.array_equal(saved, read):
          raise ValueError(f"step {step}: what was restored is not what was saved.")
  return seconds


def folder_bytes(path: str) -> int:
  """Returns the size in bytes of all files below a folder."""
  return sum(
    os.path.getsize(os.path.join(where, name))
    for where, _, names in os.walk(path)
    for name in names
  )


def rows(args: argparse.Namespace) -> Iterator[dict]:
  """Yields a row for each kind of work, over all saves but the first."""
  if args.folder:
    os.makedirs(args.folder, exist_ok=True)
  state = make_state(args.variant, args.size)
  nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  with tempfile.TemporaryDirectory(dir=args.folder) as workdir:
    seconds = measure(state, workdir, args.repeats)
    written = folder_bytes(os.path.join(workdir, FOLDER))
  for kind, (first, *rest) in seconds.items():
    values = rest or [first]
    yield {
      "kind": kind,
      "state_mb": nbytes / 1e6,
      "disk_mb": written / 1e6,
      "seconds": statistics.median(values),
      "seconds_min": min(values),
      "seconds_max": max(values),
      "first": first,
      "mb_per_second": nbytes / 1e6 / statistics.median(values),
    }


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("checkpoint", __doc__)
  parser.add_argument("--variant", default="S/4", help="of the model, see ae_i1k.py")
  parser.add_argument("--size", type=positive, default=64, help="side of the images in pixels")
  parser.add_argument("--folder", help="on the disk to be measured; by default the system's own")
  harness.main(parser, COLUMNS, rows, argv)


if __name__ == "__main__":
  main()

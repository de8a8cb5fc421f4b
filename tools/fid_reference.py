"""Makes the file of statistics that FID, sFID, precision, recall and KID compare samples with.

bash run.sh tools.fid_reference --data tfds:imagenet2012:train --size 64 --out imagenet64.npz

DATA is tfds:NAME:SPLIT, folder:PATH[:SPLIT], npz:FILE[:SPLIT], or just the path of a folder of
images or of an npz file with `images` or `arr_0` (uint8 [n, H, W, 3]). The file has the keys of
ADM's evaluator. If DATA is a file of statistics itself, ADM's or pytorch-fid's, the tool tells what
is in it, and with --out adds the features of the images in it, if it has any.
"""

import argparse
import dataclasses
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tools.command_line import add_processes, natural, positive, run
from umd.data import Source
from umd.data.host import in_graph, tensorflow
from umd.data.pipeline import EVALUATION_SEED
from umd.data.records import rows
from umd.data.sources import locate, open_images
from umd.devices import distributed
from umd.devices.mesh import each_process, make_mesh
from umd.metrics import features, statistics
from umd.metrics.quantize import quantize
from umd.runs.progress import Clock, format_seconds, say

TOGETHER = 64  # Images at a time where memory counts; a multiple of 4 (see `each_process`).


def statistics_file(data: str) -> str | None:
  """Returns the path of the npz file that DATA names, if it holds statistics."""
  kind, _, path = locate(data)[0].partition(":")
  return path if kind == "npz" and statistics.is_statistics(path) else None


def images_in(file: str) -> bool:
  """Says whether a file of statistics holds images, too."""
  with np.load(os.path.expanduser(file), allow_pickle=False) as arrays:
    return "arr_0" in arrays.files


def pick(source: Source, num: int) -> np.ndarray:
  """Picks images of a source, spread evenly, as Inception sees them: uint8 [num, H, W, 3].

  They are those whose features `umd.metrics.features.describe` keeps. Of several processes each
  reads its part, and all return the whole.
  """
  tf = tensorflow()
  num = min(num, len(source))
  ids = np.arange(num, dtype=np.int64) * len(source) // max(num, 1)
  images = np.zeros((-(-num // 4) * 4, *source.image_size[:2], 3), np.uint8)
  wanted = np.isin(np.arange(len(source)), ids)
  low, high = (len(source) * (jax.process_index() + i) // jax.process_count() for i in range(2))

  def image(row):
    example = source.preprocess(source.records.parse(row), EVALUATION_SEED, row["index"])
    return row["index"], example["image"]

  if wanted[low:high].any():  # What is not wanted is read, but not decoded.
    chosen = rows(source.records, low, high).filter(
      in_graph(lambda row: tf.gather(wanted, row["index"]))
    )
    batches = chosen.map(in_graph(image), num_parallel_calls=tf.data.AUTOTUNE).batch(TOGETHER)
    clock, done = Clock(say, f"picking images of {source.name}", int(wanted[low:high].sum())), 0
    for index, seen in batches.as_numpy_iterator():
      images[np.searchsorted(ids, index)] = quantize(jnp.asarray(seen), "round")
      clock(done := done + len(index))
  for i in range(0, len(images) if jax.process_count() > 1 else 0, TOGETHER):
    sent = each_process([images[i : i + TOGETHER]])
    images[i : i + TOGETHER] = sum(part for (part,) in sent)  # Zero but in one process.
  return images[:num]


def fitting(batch_size: int, num: int, mesh: Mesh) -> int:
  """Limits the batch size to the number of images, rounded up to a multiple of the devices."""
  return -(-max(1, min(batch_size, num)) // mesh.size) * mesh.size


def check_out(out: str) -> None:
  """Raises ValueError unless a file can be written there: before the work, not after it."""
  folder = os.path.dirname(os.path.abspath(os.path.expanduser(out)))
  if os.path.isdir(os.path.expanduser(out)):
    raise ValueError(f"--out={out!r} is a folder. Give the name of a file.")
  os.makedirs(folder, exist_ok=True)
  if not os.access(folder, os.W_OK):
    raise ValueError(f"--out={out!r}: {folder!r} cannot be written. Choose another folder.")


def make(args: argparse.Namespace) -> None:
  """Measures the images and writes the file."""
  start = time.monotonic()
  source, mesh = open_images(args.data, args.size, args.data_dir), make_mesh()
  height, width, channels = source.image_size
  say(f"{source.name}: {len(source)} images, {height} x {width} x {channels}")
  network = features.load_network(features.find_network(args.weights), mesh)
  batch_size = fitting(args.batch_size, len(source), mesh)
  measured = features.describe(source, network, mesh, batch_size, keep=args.images)
  images = pick(source, args.images) if args.images else None
  if distributed.is_main():
    statistics.write(args.out, measured, images)
  count = 0 if images is None else len(images)
  say(
    f"{args.out}: moments of {measured.count} images, {height} x {width}, and {count} of them with "
    f"their features; Inception {network.sha256[:12]}; {format_seconds(time.monotonic() - start)}"
  )
  if measured.count < statistics.FEW:
    say(
      f"warning: {measured.count} images are fewer than Inception's {statistics.FEW} features. The "
      "covariance is singular; an FID against it says little."
    )


def tell(file: str, measured: statistics.Statistics, source: Source | None) -> None:
  """Prints what a file of statistics holds, and which metrics it serves."""
  size = " x ".join(str(side) for side in source.image_size) if source else ""
  lines = {
    "count": f"{measured.count} images" if measured.count else "the file does not say",
    "mu, sigma": f"{len(measured.pool.mu)} pool features, for FID",
    "mu_s, sigma_s": (
      f"{len(measured.spatial.mu)} spatial features, for sFID"
      if measured.spatial
      else "none: no sFID"
    ),
    "arr_0": f"{len(source)} images, uint8, {size}" if source else "no images",
    "features": "none" if measured.features is None else f"of {len(measured.features)} images",
    "Inception": measured.inception[:12] or "the file does not say",
  }
  say(f"{file}: statistics {measured.name!r}")
  for key, line in lines.items():
    say(f"  {key:13s}  {line}")
  serves = statistics.possible(measured)
  if source and measured.features is None:
    say(f"  {'serves':13s}  {', '.join(statistics.METRICS)} (some need features of arr_0)")
  else:
    say(f"  {'serves':13s}  {', '.join(serves)}")
  if not (measured.spatial or source or measured.count or measured.inception):
    say(NOTHING_ELSE)


NOTHING_ELSE = (
  "note: a file with mu and sigma only does not tell who made it. pytorch-fid resizes images in "
  "another way than ADM's evaluator and this one: values differ by up to .08."
)


def complete(args: argparse.Namespace, file: str) -> None:
  """Tells what is in a file of statistics and, with --out, adds the features of its images."""
  if args.size is not None:
    raise ValueError(f"--size={args.size}: {file!r} holds statistics, which have no size. Drop it.")
  stored = statistics.read(file)
  source = open_images(f"npz:{file}") if images_in(file) else None
  tell(file, stored, source)
  if not args.out:
    return
  if stored.features is not None or source is None:
    why = (
      "it has features" if stored.features is not None else "it has no images to get features of"
    )
    say(f"nothing to add: {why}; {args.out} is not written")
    return
  mesh = make_mesh()
  network = features.load_network(features.find_network(args.weights), mesh)
  statistics.check_weights(stored, network.sha256)
  batch_size = fitting(args.batch_size, len(source), mesh)
  seen = features.describe(source, network, mesh, batch_size, keep=len(source))
  if distributed.is_main():
    whole = dataclasses.replace(stored, features=seen.features)
    statistics.write(args.out, whole, source.records.images)
  say(f"{args.out}: the same, with pool features of {len(source)} images")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that both tools take."""
  parser.add_argument("--size", type=positive, metavar="N", help="resize images to N x N")
  parser.add_argument("--batch_size", type=positive, default=64, help="over all devices (64)")
  parser.add_argument("--weights", default="", metavar="FILE", help="Inception's; else downloaded")
  parser.add_argument("--data_dir", default="", help="of TFDS; else $TFDS_DATA_DIR")
  add_processes(parser)


def main(argv: list[str]) -> None:
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("tools.fid_reference", None, __doc__, formatter_class=text)
  parser.add_argument("--data", required=True, help="what to measure, see above")
  parser.add_argument("--out", metavar="FILE", help="npz file to be written")
  parser.add_argument(
    "--images", type=natural, default=10_000, metavar="K", help="of which images and features go in"
  )
  add_arguments(parser)
  args = parser.parse_args(argv)

  def work():
    file = statistics_file(args.data)
    if not args.out and file is None:
      parser.error(f"--out is needed: the file for the statistics of {args.data}")
    if args.out:
      check_out(args.out)
    complete(args, file) if file else make(args)

  run(work, args)


if __name__ == "__main__":
  main(sys.argv[1:])

"""Stores the latents of a set of images once, for training and evaluation to read.

bash run.sh tools.encode_latents --data tfds:imagenet2012:train --size 256 --views 4 --out DIR
bash run.sh tools.encode_latents --data tfds:imagenet2012:validation --size 256 --views 4 --out DIR

DATA is tfds:NAME:SPLIT, folder:PATH[:SPLIT], npz:FILE[:SPLIT], or the path of a folder or of an npz
file. DIR becomes a TFDS data set, which `umd.data` reads as latents:DIR; each command adds a split.
View 0 of an image is the one for evaluation, view 1 its mirror image, the others are crops as in
training. Started again with the same settings, the tool goes on where it was stopped, whatever the
batch size and the number of processes and devices.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.

import jax
import numpy as np

from tools.command_line import add_processes, natural, positive, run
from umd.codecs import latent_files, vae_files
from umd.codecs.codec import Latents
from umd.codecs.latent_files import LatentPlan
from umd.data import Source, eval_batches
from umd.data.host import tensorflow
from umd.data.latents import TOOL
from umd.data.preprocess import Preprocess
from umd.data.records import Records, split_names
from umd.data.sources import locate, open_images
from umd.devices import distributed
from umd.devices.mesh import batch_sharding, local_rows, make_mesh
from umd.runs import sharded
from umd.runs.progress import Clock, say

MOST_VIEWS = 256  # Of an image.
SEEDS = 2**53 // MOST_VIEWS  # Each view has its own seed, below 2**53 as all of them.
CHUNK = 8  # Rows that a device encodes at a time: always so many, so that no result depends on it.
AHEAD = 2  # Batches on the devices while one is being taken from them.


class Views:
  """Makes several views of an image; stands where a source has its `Preprocess`.

  View 0 is the square in the middle of an image, as for evaluation; view 1 is the same, mirrored.
  Each other view is a random crop, as in training: a function of the seed, the view's number and
  the image's place in the source.

  Attributes:
    strings: what is done for each view.
    spec: {image: float32 [V, H, W, C] in [-1, 1], label}.
    image_size: (H, W, C).
  """

  def __init__(self, records: Records, size: int, views: int, area_min: float = 80, seed: int = 0):
    """Makes `views` of size x size px; crops have `area_min` to 100 percent of an image's area.

    Raises:
      ValueError: `views`, `seed` or `area_min` is out of its range.
    """
    if not 1 <= views <= MOST_VIEWS or not 0 <= seed < SEEDS:
      raise ValueError(
        f"views={views} must be in 1..{MOST_VIEWS}, and seed={seed} in 0..{SEEDS - 1}."
      )
    middle = f"decode|resize_small({size})|central_crop({size})|value_range(-1, 1)"
    crop = f"decode_jpeg_and_inception_crop({size}, area_min={area_min:g}, scaled=0)"
    crop = f"{crop}|flip_lr|value_range(-1, 1)"
    self._middle = Preprocess(middle, records.dtype, records.shape, records.name)
    self._crop = Preprocess(crop, records.dtype, records.shape, records.name)
    self._seed = seed
    self.strings = (middle, f"{middle}, mirrored", *[crop] * (views - 2))[:views]
    self.image_size = self._middle.image_size
    self.spec = {"image": ((views, *self.image_size), "float32"), "label": ((), "int32")}

  def __call__(self, example, seed, index):
    """Returns the example {image, label} at `index` with all views; the seed is not used."""
    tf = tensorflow()
    first = self._middle(example, 0, index)
    images = [first["image"], tf.reverse(first["image"], [1])][: len(self.strings)]
    for view in range(2, len(self.strings)):
      images.append(self._crop(example, self._seed * MOST_VIEWS + view, index)["image"])
    return {"image": tf.stack(images), "label": first["label"]}


def split_name(data: str, name: str) -> str:
  """Returns the split's name in the folder: `name`, or the name in the data; "train" for "all"."""
  names = list(dict.fromkeys(split_names(locate(data)[1], data)))
  if not name and len(names) > 1:
    raise ValueError(
      f"{data!r} names the splits {', '.join(names)}. Give --split NAME to join them."
    )
  name = name or {"all": "train"}.get(names[0], names[0])
  if not name.isidentifier() or not name.isascii() or name == "all":  # TFDS: all splits.
    raise ValueError(f"--split={name!r} must be letters, digits and _, and not 'all'.")
  return name


def make_plan(
  args: argparse.Namespace, source: Source, weights: vae_files.VaeWeights
) -> LatentPlan:
  """Returns what is to be written; raises ValueError if the images do not fit the VAE."""
  architecture, (height, width, channels) = weights.architecture, source.image_size
  factor = architecture.factor
  if args.size % factor:
    nearest = max(1, round(args.size / factor)) * factor
    raise ValueError(
      f"--size={args.size} must be a multiple of {factor}, the pixels per latent pixel of the VAE "
      f"{weights.name!r}. Set it to {nearest}."
    )
  if channels != architecture.in_channels:
    raise ValueError(
      f"{source.name} has images of {channels} channels, but the VAE {weights.name!r} takes "
      f"{architecture.in_channels}. Give other images or another VAE."
    )
  shape = (args.views, height // factor, width // factor, 2 * architecture.latent_channels)
  names = "\n".join(source.class_names).encode()
  encoding = {
    "vae": weights.name,
    "sha256": weights.sha256,
    "scaling": architecture.scaling_factor,
    "shift": architecture.shift_factor,
    "factor": factor,
    "vae_dtype": args.vae_dtype,
    "dtype": args.dtype,
    "pixel_size": list(source.image_size),
    "shape": list(shape),
    "views": list(source.preprocess.strings),
    "seed": args.seed,
    "num_classes": source.num_classes,
    "class_names": hashlib.sha256(names).hexdigest()[:16] if names else "",
  }
  shards = args.shards or math.ceil(len(source) * record_bytes(encoding) / (args.shard_mb * 1e6))
  settings = {
    "encoding": encoding,
    "data": source.name,
    "fingerprint": source.records.fingerprint(),
    "num_images": len(source),
    "shards": min(shards, len(source)),
  }
  command = f"{TOOL} {shlex.join(args.argv)}"
  return LatentPlan(
    args.out, settings, command, split_name(args.data, args.split), source.class_names
  )


def record_bytes(encoding: dict) -> int:
  """Returns the bytes of one image's moments."""
  return math.prod(encoding["shape"]) * np.dtype(encoding["dtype"]).itemsize


@functools.cache
def compiled(codec: Latents, dtype: str) -> Callable:
  """Returns `(params, images) -> moments` in the type in which they are stored."""
  return jax.jit(lambda params, images: codec.moments(params, images).astype(dtype))


def encoded(
  codec: Latents, source: Source, plan: LatentPlan, todo: Sequence[int], batch_size: int, mesh
) -> Iterator[tuple[int, bool, dict]]:
  """Yields (shard, whether it is the shard's last batch, batch) for these shards.

  Batches hold moments [b, V, h, w, 2c] in the place of images. Which rows make a chunk follows from
  the shard alone: batches hold whole chunks of each device, and each shard begins with a new one.
  """
  views, *shape = plan.settings["encoding"]["shape"]
  chunks = CHUNK * mesh.size // math.gcd(CHUNK * mesh.size, views)
  batch_size = -(-batch_size // chunks) * chunks
  moments = compiled(codec, plan.settings["encoding"]["dtype"])
  last = -(-len(source) // (batch_size * plan.shards)) - 1
  pending = []

  def take():
    shard, is_last, batch, rows = pending.pop(0)
    return shard, is_last, {**batch, "moments": local_rows(rows).reshape(-1, views, *shape)}

  for shard in todo:
    share = dict(process_index=shard, process_count=plan.shards)
    for i, batch in enumerate(eval_batches(source, batch_size * plan.shards, **share)):
      images = batch.pop("image").reshape(-1, *source.image_size)
      rows = moments(codec.params, jax.device_put(images, batch_sharding(mesh)))
      pending.append((shard, i == last, batch, rows))
      if len(pending) > AHEAD:
        yield take()
  while pending:
    yield take()


def totals(moments: np.ndarray, encoding: dict) -> np.ndarray:
  """Sums mean and square of scaled latents over moments [V, h, w, 2c]: float64 [2, c]."""
  mean, logvar = np.split(moments.astype(np.float64), 2, axis=-1)
  mean, variance = mean - encoding["shift"], np.exp(logvar)
  scaled = [mean * encoding["scaling"], (mean**2 + variance) * encoding["scaling"] ** 2]
  return np.stack([x.reshape(-1, x.shape[-1]).sum(axis=0) for x in scaled])


def write(plan: LatentPlan, shard: int, batches: Sequence[dict], source: Source) -> None:
  """Writes a shard whose images came in these batches, in the order of the source."""
  encoding, features = plan.settings["encoding"], latent_files.features(plan)
  examples = {}
  for batch in batches:
    for i in np.flatnonzero(batch["_mask"]):
      index, moments = int(batch["index"][i]), batch["moments"][i]
      if not np.isfinite(moments).all():
        raise ValueError(
          f"{source.records.describe(index)}: its moments are not finite in {encoding['dtype']}. "
          "Try --vae_dtype float32 or --dtype float32, in a new folder."
        )
      label = {"label": int(batch["label"][i])} if source.num_classes else {}
      examples[index] = {"moments": moments, "index": index, **label}
  order = sorted(examples)
  # Image by image, for a sum should not depend on the size of batches.
  zeros = np.zeros((2, encoding["shape"][-1] // 2))
  mean, square = sum((totals(examples[i]["moments"], encoding) for i in order), zeros)
  records = [latent_files.serialize(features, examples[i]) for i in order]
  low, high = (plan.settings["num_images"] * (shard + i) // plan.shards for i in range(2))
  if missing := set(range(low, high)) - examples.keys() - source.bad.keys():
    first = source.records.describe(min(missing))
    raise ValueError(f"{first} was not read, nor {len(missing) - 1} others. Start again.")
  report = {"sum": mean.tolist(), "square": square.tolist()}
  latent_files.write_shard(plan, shard, records, report)


def summarize(reports: Sequence[dict], encoding: dict) -> dict:
  """Returns {mean, std} per channel of the scaled latents of a split."""
  views, height, width, _ = encoding["shape"]
  places = sum(r["count"] for r in reports) * views * height * width
  mean, square = (np.sum([r[k] for r in reports], axis=0) / places for k in ("sum", "square"))
  return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def encode(
  codec: Latents,
  source: Source,
  plan: LatentPlan,
  batch_size: int,
  mesh,
  place: tuple[int, int] = (0, 1),
) -> None:
  """Writes those shards of process `place` (its index, of how many) that are not there yet."""
  todo = [shard for shard in sharded.missing(plan) if shard % place[1] == place[0]]
  edges = [len(source) * shard // plan.shards for shard in range(plan.shards + 1)]
  total = sum(edges[shard + 1] - edges[shard] for shard in todo)
  seen, start = 0, time.monotonic()
  rate = lambda: seen / max(time.monotonic() - start, 1e-9)
  tell = lambda line: say(f"{line}, {rate():.1f} images/s")
  clock = Clock(tell, f"images of {plan.name!r} encoded here", total)
  batches, writing = [], None
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    for shard, is_last, batch in encoded(codec, source, plan, todo, batch_size, mesh):
      batches.append(batch)
      seen += int((batch["index"] < len(source)).sum())
      clock(seen)
      if is_last:
        if writing:
          writing.result()  # One shard at most waits in memory; and an error of it ends the work.
        writing, batches = pool.submit(write, plan, shard, batches, source), []
    if writing:
      writing.result()


def make(args: argparse.Namespace) -> None:
  """Encodes what is not there yet, and writes the metadata when all is."""
  start = time.monotonic()
  records = open_images(args.data, args.size, args.data_dir).records
  views = Views(records, args.size, args.views, args.area_min, args.seed)
  source = Source(records, views, args.max_bad)
  weights = vae_files.load(args.vae)
  plan = make_plan(args, source, weights)
  encoding = plan.settings["encoding"]
  latent_files.begin(plan, distributed.is_main())
  done = sharded.done(plan)
  left = len(source) - sum(report["count"] for report in done.values())
  remedy = ", fewer --views, or --dtype float16"
  sharded.check_space(plan, left, record_bytes(encoding), remedy)
  shape = " x ".join(map(str, encoding["shape"]))
  say(
    f"{source.name}: {len(source)} images, moments {shape} ({args.dtype}) of {weights.name!r} "
    f"({weights.sha256[:12]}); {len(done)} of {plan.shards} shards are there"
  )
  mesh = make_mesh(jax.local_devices())
  codec = Latents(weights, mesh, args.vae_dtype, CHUNK)
  place = jax.process_index(), jax.process_count()
  encode(codec, source, plan, args.batch_size, mesh, place)
  sharded.wait(plan, say)
  if not distributed.is_main():
    return
  about = latent_files.finish(plan, summarize)
  seconds = time.monotonic() - start
  say(
    f"{args.out}: split {plan.name!r} with {about['count']} images, {about['bytes']} bytes "
    f"({about['bytes'] / about['count'] * 1e6 / 1e9:.4g} GB per million images), {seconds:.1f} s"
  )
  if source.bad:
    say(f"{len(source.bad)} images were left out:\n{source.bad_report()}".rstrip())


def parse(argv: list[str]) -> argparse.Namespace:
  """Returns the command line's arguments; argparse ends the process if it is wrong."""
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("tools.encode_latents", None, __doc__, formatter_class=text)
  add = parser.add_argument
  add("--data", required=True, help="the images, see above")
  add("--out", required=True, metavar="DIR", help="where the latents go")
  add("--size", required=True, type=positive, metavar="N", help="images become N x N pixels")
  add("--views", type=positive, default=4, help="of each image (4)")
  add("--vae", default="sd-vae-ft-mse", metavar="NAME_OR_FOLDER", help="(sd-vae-ft-mse)")
  add("--split", default="", help="its name in DIR; else that of the data's split")
  add("--area_min", type=float, default=80, help="smallest crop, percent of the image (80)")
  add("--dtype", choices=("float16", "float32"), default="float16", help="as stored (float16)")
  add("--vae_dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
  add("--batch_size", type=positive, default=64, help="images at a time in each process (64)")
  add("--shard_mb", type=positive, default=256, metavar="MB", help="size of a file (256)")
  add("--shards", type=positive, help="number of files, instead")
  add("--seed", type=natural, default=0, help="of the crops (0)")
  add("--max_bad", type=float, default=0, help="how many images may be unreadable (0)")
  add("--data_dir", default="", help="of TFDS; else $TFDS_DATA_DIR")
  add_processes(parser)
  args = parser.parse_args(argv)
  args.argv, args.out = argv, os.path.expanduser(args.out)
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  run(lambda: make(args), args)


if __name__ == "__main__":
  main(sys.argv[1:])

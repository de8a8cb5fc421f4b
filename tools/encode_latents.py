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

import jax
import numpy as np

from tools.command_line import add_processes, natural, positive, run
from umd.codecs import latent_files, vae_files
from umd.codecs.codec import Latents
from umd.codecs.latent_files import Plan
from umd.data import eval_batches
from umd.data import records as splits
from umd.data.host import tensorflow
from umd.data.image_sets import locate, open_images
from umd.data.latents import TOOL
from umd.data.preprocess import Preprocess
from umd.data.records import Records
from umd.data.sources import Source
from umd.devices import distributed
from umd.devices.mesh import batch_sharding, local_rows, make_mesh
from umd.runs import progress
from umd.runs.progress import say

AT_MOST = 256  # Views of an image.
SEEDS = 2**53 // AT_MOST  # Each view has its own seed, below 2**53 as all of them.


class Views(Source):
  """Images in several views: `image` is float32 [V, H, W, C] in [-1, 1], `image_size` (H, W, C).

  View 0 is the square in the middle of an image, as for evaluation; view 1 the same, mirrored; each
  other view a random crop, as in training: a function of the seed, the view's number and the
  image's place in the source.

  Attributes, apart from those of all sources:
    strings: what is done for each view.
  """

  def __init__(
    self,
    records: Records,
    size: int,
    views: int,
    *,
    area_min: float = 80,
    seed: int = 0,
    max_bad: float = 0,
  ):
    """V = `views` of size x size px; crops have `area_min` to 100 percent of an image's area.

    Raises:
      ValueError: `views`, `seed` or `area_min` is out of its range.
    """
    if not 1 <= views <= AT_MOST or not 0 <= seed < SEEDS:
      raise ValueError(f"views={views} must be in 1..{AT_MOST}, and seed={seed} in 0..{SEEDS - 1}.")
    middle = f"decode|resize_small({size})|central_crop({size})|value_range(-1, 1)"
    crop = f"decode_jpeg_and_inception_crop({size}, area_min={area_min:g}, scaled=0)"
    crop = f"{crop}|flip_lr|value_range(-1, 1)"
    super().__init__(records, middle, max_bad)
    self._middle, self._seed = self.preprocess, seed
    self._crop = Preprocess(crop, records.dtype, records.shape, records.name)
    self.strings = (middle, f"{middle}, mirrored", *[crop] * (views - 2))[:views]
    self.preprocess = self  # The pipeline calls it, and asks for its spec.
    self.spec = {"image": ((views, *self.image_size), "float32"), "label": ((), "int32")}

  def __call__(self, example, seed, index):
    """All views of the example {image, label} at `index`; the pipeline's own seed has no say."""
    del seed
    tf = tensorflow()
    first = self._middle(example, 0, index)
    images = [first["image"], tf.reverse(first["image"], [1])][: len(self.strings)]
    for view in range(2, len(self.strings)):
      images.append(self._crop(example, self._seed * AT_MOST + view, index)["image"])
    return {"image": tf.stack(images), "label": first["label"]}


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.

CHUNK = 8  # Rows that a device encodes at a time: always so many, so that no result depends on it.
AHEAD = 2  # Batches on the devices while one is being taken from them.


def split_name(data: str, name: str) -> str:
  """The split's name in the folder: `name`, else that of the data's split; "train" for "all"."""
  own = list(dict.fromkeys(splits.names(locate(data)[1], data)))
  if not name and len(own) > 1:
    raise ValueError(f"{data!r} names the splits {', '.join(own)}. Give --split NAME to join them.")
  name = name or {"all": "train"}.get(own[0], own[0])
  if not name.isidentifier() or not name.isascii() or name == "all":  # TFDS: all splits.
    raise ValueError(f"--split={name!r} must be letters, digits and _, and not 'all'.")
  return name


def make_plan(args: argparse.Namespace, source: Views, weights: vae_files.Weights) -> Plan:
  """What is to be written; raises ValueError if the images do not fit the VAE."""
  arch, (height, width, channels) = weights.architecture, source.image_size
  if args.size % arch.factor:
    nearest = max(1, round(args.size / arch.factor)) * arch.factor
    raise ValueError(
      f"--size={args.size} must be a multiple of {arch.factor}, the pixels per latent pixel of the "
      f"VAE {weights.name!r}. Set it to {nearest}."
    )
  if channels != arch.in_channels:
    raise ValueError(
      f"{source.name} has images of {channels} channels, but the VAE {weights.name!r} takes "
      f"{arch.in_channels}. Give other images or another VAE."
    )
  shape = (args.views, height // arch.factor, width // arch.factor, 2 * arch.latent_channels)
  record_bytes = math.prod(shape) * np.dtype(args.dtype).itemsize
  names = "\n".join(source.class_names).encode()
  encoding = {
    "vae": weights.name,
    "sha256": weights.sha256,
    "scaling": arch.scaling_factor,
    "shift": arch.shift_factor,
    "factor": arch.factor,
    "vae_dtype": args.vae_dtype,
    "dtype": args.dtype,
    "pixel_size": list(source.image_size),
    "shape": list(shape),
    "views": list(source.strings),
    "seed": args.seed,
    "num_classes": source.num_classes,
    "class_names": hashlib.sha256(names).hexdigest()[:16] if names else "",
  }
  shards = args.shards or math.ceil(len(source) * record_bytes / (args.shard_mb * 1e6))
  settings = {
    "encoding": encoding,
    "data": source.name,
    "fingerprint": source.records.fingerprint(),
    "num_images": len(source),
    "shards": min(shards, len(source)),
  }
  command = f"{TOOL} {shlex.join(args.argv)}"
  split = split_name(args.data, args.split)
  return Plan(args.out, split, settings, command, source.class_names)


def batches(
  source: Views, shards: int, todo: Sequence[int], batch_size: int
) -> Iterator[tuple[int, bool, dict]]:
  """(shard, whether it is the shard's last batch, batch) of these shards of all."""
  count = -(-len(source) // (batch_size * shards))
  for shard in todo:
    share = dict(process_index=shard, process_count=shards)
    for i, batch in enumerate(eval_batches(source, batch_size * shards, **share)):
      yield shard, i == count - 1, batch


@functools.cache
def compiled(codec: Latents, dtype: str) -> Callable:
  """`(params, images) -> moments` in the type in which they are stored."""
  return jax.jit(lambda params, images: codec.moments(params, images).astype(dtype))


def encoded(
  codec: Latents, source: Views, plan: Plan, todo: Sequence[int], batch_size: int, mesh
) -> Iterator[tuple[int, bool, dict]]:
  """The same, with moments [b, V, h, w, 2c] in the place of images.

  Which rows make a chunk follows from the shard alone: batches hold whole chunks of each device,
  and each shard begins with a new one.
  """
  _, *shape = plan.settings["encoding"]["shape"]
  views, dtype = len(source.strings), plan.settings["encoding"]["dtype"]
  together = CHUNK * mesh.size // math.gcd(CHUNK * mesh.size, views)
  batch_size = -(-batch_size // together) * together
  moments, pending = compiled(codec, dtype), []

  def take():
    shard, last, batch, rows = pending.pop(0)
    return shard, last, {**batch, "moments": local_rows(rows).reshape(-1, views, *shape)}

  for shard, last, batch in batches(source, plan.shards, todo, batch_size):
    images = batch.pop("image").reshape(-1, *source.image_size)
    rows = moments(codec.params, jax.device_put(images, batch_sharding(mesh)))
    pending.append((shard, last, batch, rows))
    if len(pending) > AHEAD:
      yield take()
  while pending:
    yield take()


def totals(moments: np.ndarray, encoding: dict) -> np.ndarray:
  """float64 [2, c]: sums over moments [V, h, w, 2c] of a scaled latent's mean and mean square."""
  mean, logvar = np.split(moments.astype(np.float64), 2, axis=-1)
  mean, variance = mean - encoding["shift"], np.exp(logvar)
  scaled = [mean * encoding["scaling"], (mean**2 + variance) * encoding["scaling"] ** 2]
  return np.stack([x.reshape(-1, x.shape[-1]).sum(axis=0) for x in scaled])


def write(plan: Plan, shard: int, parts: Sequence[dict], source: Views) -> None:
  """Writes a shard whose images came in these batches, in the order of the source."""
  encoding, features = plan.settings["encoding"], latent_files.features(plan)
  found = {}
  for part in parts:
    for i in np.flatnonzero(part["_mask"]):
      index, moments = int(part["index"][i]), part["moments"][i]
      if not np.isfinite(moments).all():
        raise ValueError(
          f"{source.records.describe(index)}: its moments are not finite in {encoding['dtype']}. "
          "Try --vae_dtype float32 or --dtype float32, in a new folder."
        )
      label = {"label": int(part["label"][i])} if source.num_classes else {}
      found[index] = {"moments": moments, "index": index, **label}
  # Image by image, for a sum should not depend on the size of batches.
  zeros = np.zeros((2, encoding["shape"][-1] // 2))
  mean, square = sum((totals(found[i]["moments"], encoding) for i in sorted(found)), zeros)
  records = [latent_files.serialize(features, found[i]) for i in sorted(found)]
  low, high = (plan.settings["num_images"] * (shard + i) // plan.shards for i in range(2))
  if missing := set(range(low, high)) - found.keys() - source.bad.keys():
    first = source.records.describe(min(missing))
    raise ValueError(f"{first} was not read, nor {len(missing) - 1} others. Start again.")
  report = {"sum": mean.tolist(), "square": square.tolist()}
  latent_files.write_shard(plan, shard, records, report)


def summarize(reports: Sequence[dict], encoding: dict) -> dict:
  """{mean, std} per channel of the scaled latents of a split."""
  views, height, width, _ = encoding["shape"]
  places = sum(r["count"] for r in reports) * views * height * width
  mean, square = (np.sum([r[k] for r in reports], axis=0) / places for k in ("sum", "square"))
  return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def encode(
  codec: Latents,
  source: Views,
  plan: Plan,
  batch_size: int,
  mesh,
  place: tuple[int, int] = (0, 1),
) -> None:
  """Writes those shards of process `place` (its index, of how many) that are not there yet."""
  whole = latent_files.done(plan)
  todo = [shard for shard in range(place[0], plan.shards, place[1]) if shard not in whole]
  edges = [len(source) * shard // plan.shards for shard in range(plan.shards + 1)]
  total, seen, start = sum(edges[s + 1] - edges[s] for s in todo), 0, time.monotonic()
  rate = lambda: seen / max(time.monotonic() - start, 1e-9)
  tell = lambda line: say(f"{line}, {rate():.1f} images/s")
  clock = progress.Clock(tell, f"images of {plan.split!r} encoded here", total)
  parts, writing = [], None
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    for shard, last, batch in encoded(codec, source, plan, todo, batch_size, mesh):
      parts.append(batch)
      seen += int((batch["index"] < len(source)).sum())
      clock(seen)
      if last:
        if writing:
          writing.result()  # One shard at most waits in memory; and an error of it ends the work.
        writing, parts = pool.submit(write, plan, shard, parts, source), []
    if writing:
      writing.result()


def make(args: argparse.Namespace) -> None:
  """Encodes what is not there yet, and writes the metadata when all is."""
  start = time.monotonic()
  if os.path.isfile(args.out):  # Before anything is loaded.
    latent_files.check_out(args.out)
  records = open_images(args.data, args.size, args.data_dir).records
  crops = dict(area_min=args.area_min, seed=args.seed)
  source = Views(records, args.size, args.views, **crops, max_bad=args.max_bad)
  weights = vae_files.load(args.vae)
  plan = make_plan(args, source, weights)
  encoding = plan.settings["encoding"]
  latent_files.check_out(args.out)
  latent_files.begin(plan, distributed.is_main())
  record_bytes = math.prod(encoding["shape"]) * np.dtype(args.dtype).itemsize
  latent_files.check_space(plan, record_bytes)
  mesh = make_mesh(jax.local_devices())
  shape = " x ".join(map(str, encoding["shape"]))
  say(
    f"{source.name}: {len(source)} images, moments {shape} ({args.dtype}) of {weights.name!r} "
    f"({weights.sha256[:12]}); {len(latent_files.done(plan))} of {plan.shards} shards are there"
  )
  place = jax.process_index(), jax.process_count()
  codec = Latents(weights, mesh, args.vae_dtype, CHUNK)
  encode(codec, source, plan, args.batch_size, mesh, place)
  latent_files.wait(plan, distributed.is_main(), say)
  if not distributed.is_main():
    return
  about = latent_files.finish(plan, summarize)
  seconds = time.monotonic() - start
  say(
    f"{args.out}: split {plan.split!r} with {about['count']} images, {about['bytes']} bytes "
    f"({about['bytes'] / about['count'] * 1e6 / 1e9:.4g} GB per million images), {seconds:.1f} s"
  )
  if source.bad:
    say(f"{len(source.bad)} images were left out:\n{source.bad_report()}".rstrip())


def parse(argv: list[str]) -> argparse.Namespace:
  """The command line; argparse ends the process if it is wrong."""
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
  if args.views > AT_MOST:
    parser.error(f"argument --views: {args.views} is more than {AT_MOST}")
  if args.seed >= SEEDS:
    parser.error(f"argument --seed: {args.seed} must be less than {SEEDS}")
  args.argv, args.out = argv, os.path.expanduser(args.out)
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  run(lambda: make(args), args)


if __name__ == "__main__":
  main(sys.argv[1:])

"""Draws images with a trained model, fills in parts of images, and shows how samples come about.

bash run.sh sample --workdir runs/quickstart --labels 3,7
bash run.sh sample --workdir runs/quickstart --num 50000 --npz
bash run.sh sample --workdir runs/quickstart --inpaint digit.png --mask box:0,0,4,8 --labels 3
bash run.sh sample --workdir runs/quickstart --reconstruct digit.png --mask_ratio 0.75
bash run.sh sample --workdir runs/quickstart --trajectory --labels 3,7 --out digits.webp

DIR is a run's workdir (with stages: its last one is taken) or a folder that tools.export wrote.
Sample i is a function of the seed, i, its label, the settings and the weights, whatever the batch
size and the number of processes and devices. Started again with the same settings, the tool goes on
where it was stopped. Settings of sampling that are not given are the run's own.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.

import jax
import numpy as np

from tools.command_line import add_processes, natural, positive, run
from umd.devices import distributed
from umd.metrics.quantize import QUANTIZERS
from umd.runs import sharded, workdir
from umd.runs.progress import format_seconds, say
from umd.samplers import Sampling
from umd.trained import pictures, shards
from umd.trained.inputs import ALL
from umd.trained.model import BATCH, RESAMPLING, Pretrained, load

NONE = "none"
CLASSES, EACH, MANY = 10, 8, 64  # Unless it is said: so many classes, of each, without classes.


def choose_labels(model: Pretrained, text: str | None, num: int | None) -> tuple:
  """(labels as int32 [L] or None, number of samples) of --labels and --num."""
  if text is None and not model.num_classes:
    text = NONE
  if text == NONE:
    return None, num or MANY
  if text is None and num is None:  # Some classes, spread over all.
    spread = np.linspace(0, model.num_classes - 1, min(CLASSES, model.num_classes))
    ids = np.unique(spread.astype(np.int32))
  elif text in (None, ALL):
    ids = model.label_ids(ALL)
  else:
    ids = model.label_ids([part.strip() for part in text.split(",")])
  return ids, num or len(ids) * (EACH if len(ids) <= CLASSES else 1)


def settings_of(args: argparse.Namespace) -> dict:
  """The settings of sampling; None stands for the run's own."""
  return {field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)}


def output_folder(args: argparse.Namespace, settings: dict) -> str:
  """--out, or a folder of the workdir that is named after the settings."""
  if args.out:
    return os.path.expanduser(args.out)
  name = "step{step}_{weights}_seed{seed}".format(**settings)
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
  return os.path.join(default_folder(args), f"{name}_{digest[:8]}")


def default_folder(args: argparse.Namespace) -> str:
  """Where samples go if nothing is said."""
  if workdir.scheme(args.workdir):
    raise ValueError(f"--workdir={args.workdir!r} is no folder of this machine: give --out too.")
  return os.path.join(os.path.expanduser(args.workdir), "samples")


def draw(args: argparse.Namespace, model: Pretrained) -> None:
  """Many samples, into a folder that can be gone on with."""
  ids, num = choose_labels(model, args.labels, args.num)
  sampling = model.check_sampling(None if ids is None else ids[:1], **settings_of(args))
  used = dataclasses.asdict(sampling)
  settings = {
    **{"weights": model.weights, "step": model.step, "parameters": model.sha256[:16]},
    **{"num": num, "labels": None if ids is None else ids.tolist(), "seed": args.seed},
    **{"sampling": used, "quantize": args.quantize, "image_size": list(model.image_size)},
    **({"dtype": args.dtype} if args.dtype else {}),
  }
  folder = output_folder(args, settings)
  plan = shards.SamplePlan(folder, settings, f"sample {shlex.join(args.argv)}")
  shards.begin(plan, distributed.is_main())
  there = plan.shards - len(sharded.missing(plan))
  how = ", ".join(f"{key}={value}" for key, value in used.items())
  say(f"{model}\n{num} samples, {how}; {there} of {plan.shards} shards are there")
  place = jax.process_index(), jax.process_count()
  drawn, seconds = shards.draw(plan, model, args.batch_size, place)
  if drawn:
    rate = drawn / max(seconds, 1e-9)
    say(f"{drawn} samples drawn here in {format_seconds(seconds)}, {rate:.1f} images/s")
  sharded.wait(plan, say)
  if not distributed.is_main():
    return
  for kind, write in shards.OUTPUTS.items():
    if getattr(args, kind):
      say(write(plan))


def file_to_write(args: argparse.Namespace, name: str, kinds: tuple[str, ...]) -> str:
  """The file of --out, which must end in one of `kinds`, or that of the default folder."""
  path = os.path.expanduser(args.out) if args.out else os.path.join(default_folder(args), name)
  if not path.endswith(kinds) or os.path.isdir(path):
    raise ValueError(f"--out={args.out!r} must be a file whose name ends in {' or '.join(kinds)}.")
  folder = os.path.dirname(os.path.abspath(path))
  while not os.path.exists(folder):
    folder = os.path.dirname(folder)
  if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
    raise ValueError(f"--out={path!r}: {folder!r} cannot be written. Choose another folder.")
  return os.path.abspath(path)


def inpaint(args: argparse.Namespace, model: Pretrained) -> None:
  """A picture: the image, what is known of it, and several ways to fill it in."""
  path = file_to_write(args, "inpaint.png", (".png",))
  image = pictures.read_image(args.inpaint, model.image_size)
  mask = pictures.read_mask(args.mask, model.image_size, args.inpaint)
  # Without --labels the model is not told what it is that it fills in.
  ids = None if args.labels in (None, NONE) else choose_labels(model, args.labels, None)[0]
  num = args.num or (EACH if ids is None or len(ids) == 1 else len(ids))
  given = dict(num=num, seed=args.seed, batch_size=args.batch_size, quantize=args.quantize)
  given |= dict(resampling=args.resampling, **settings_of(args))
  made = model.inpaint(image, mask, None if ids is None else np.resize(ids, num), **given)
  hidden = np.where(mask[..., None], np.uint8(128), image)
  pictures.write_png(path, pictures.grid(np.stack([image, hidden, *made]), 2 + min(num, EACH)))
  say(f"{os.path.relpath(path)}: the image, what is known of it, and {num} ways to fill it in")


def reconstruct(args: argparse.Namespace, model: Pretrained) -> None:
  """A picture: a row of image | masked | filled in for each image."""
  path = file_to_write(args, "reconstruct.png", (".png",))
  images = np.stack([pictures.read_image(file, model.image_size) for file in args.reconstruct])
  given = dict(seed=args.seed, batch_size=args.batch_size, quantize=args.quantize)
  if args.mask:
    given["mask"] = pictures.read_mask(args.mask, model.image_size, args.reconstruct[0])
  filled, masks = model.reconstruct(images, args.mask_ratio, **given)
  hidden = np.where(masks[..., None], np.uint8(128), images)
  cells = np.stack([images, hidden, filled], axis=1).reshape(-1, *images.shape[1:])
  pictures.write_png(path, pictures.grid(cells, 3))
  say(f"{os.path.relpath(path)}: image, what the encoder sees, filled in")


def animate(args: argparse.Namespace, model: Pretrained) -> None:
  """An animation: what is denoised on the left, what the model takes it for on the right."""
  path = file_to_write(args, "trajectory.webp", pictures.ANIMATIONS)
  ids, num = choose_labels(model, args.labels, args.num)
  num = args.num or min(num, CLASSES if ids is None else len(ids))
  given = dict(seed=args.seed, quantize=args.quantize, **settings_of(args))
  found = model.trajectory(ids, num, **given)
  columns = int(np.ceil(np.sqrt(num)))
  # The last frame shows the samples on both sides.
  pairs = zip(found.x_t, [*found.x0, found.x_t[-1]], strict=True)
  side = lambda images: pictures.grid(images, columns)
  frames = [np.concatenate([side(x_t), side(x0)], axis=1) for x_t, x0 in pairs]
  pictures.write_animation(path, frames)
  shown = f"{num} samples in {len(frames)} frames; left x_t, right the model's x0"
  say(f"{os.path.relpath(path)}: {shown}")


def interval(text: str) -> tuple[float, float]:
  """Reads "0.1,0.8" for argparse."""
  low, high = map(float, text.split(","))
  return low, high


def checkpoint(text: str) -> int | str:
  """A step for argparse."""
  return int(text) if text.isdigit() else text


def boolean(text: str) -> bool:
  """Reads true or false for argparse."""
  if text.lower() not in ("true", "false"):
    raise ValueError
  return text.lower() == "true"


def add_sampling(parser: argparse.ArgumentParser) -> None:
  """Adds a flag for each setting of sampling."""
  group = parser.add_argument_group("settings of sampling", "Those left out are the run's own.")
  kinds = {bool: boolean, tuple[float, float]: interval}
  for field in dataclasses.fields(Sampling):
    within = field.metadata["within"]
    group.add_argument(
      f"--{field.name}",
      type=kinds.get(field.type, field.type),
      choices=within if isinstance(within, tuple) else None,
      help=field.metadata["help"],
    )


def parse(argv: list[str]) -> argparse.Namespace:
  """The command line; argparse ends the process if it is wrong."""
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("sample", None, __doc__, formatter_class=text)
  add = parser.add_argument
  add("--workdir", required=True, metavar="DIR", help="of the trained model, see above")
  add("--weights", choices=("ema", "raw"), default="", help="(ema)")
  add("--step", type=checkpoint, default="newest", help="a number, newest or best (newest)")
  add("--dtype", choices=("float32", "bfloat16"), default="", help="(as trained)")
  add("--labels", help="numbers or names, e.g. 3,7; all; none (some classes, or all with --num)")
  add("--num", type=positive, metavar="N", help="how many; the labels come in turn")
  add("--seed", type=natural, default=0, help="(0)")
  add("--batch_size", type=positive, default=BATCH, help=f"in each process ({BATCH})")
  add("--out", metavar="PATH", help="(a folder or file in DIR/samples)")
  add_sampling(parser)
  how = [name for name in QUANTIZERS if name != "none"]
  add("--quantize", choices=how, default="round", help="to 256 levels (round)")
  add("--grid", action="store_true", help="write a picture of some (unless --png or --npz)")
  add("--png", action="store_true", help="write a folder of PNG files")
  add("--npz", action="store_true", help="write samples.npz, as tools.evaluate_samples reads it")
  modes = parser.add_mutually_exclusive_group()
  modes.add_argument("--inpaint", metavar="IMAGE", help="fill in the mask by diffusion")
  modes.add_argument("--reconstruct", nargs="+", metavar="IMAGE", help="fill in as a MAE does")
  modes.add_argument("--trajectory", action="store_true", help="animate how samples come about")
  add("--mask", metavar="MASK", help="image, white where to fill in; box:TOP,LEFT,HEIGHT,WIDTH")
  add("--mask_ratio", type=float, default=0.75, help="of --reconstruct (0.75)")
  add("--resampling", type=positive, default=RESAMPLING, help=f"of --inpaint ({RESAMPLING})")
  add_processes(parser)
  args = parser.parse_args(argv)
  if bool(args.inpaint) > bool(args.mask):
    parser.error("--inpaint needs --mask")
  args.argv, args.grid = argv, args.grid or not (args.png or args.npz)
  return args


def work(args: argparse.Namespace) -> None:
  """Opens the model and does what was asked for."""
  model = load(args.workdir, weights=args.weights, step=args.step, dtype=args.dtype)
  single = {"inpaint": inpaint, "reconstruct": reconstruct, "trajectory": animate}
  for name, make in single.items():
    if getattr(args, name):
      if jax.process_count() > 1:
        raise ValueError(f"--{name} is for one process: leave --num_processes out.")
      return make(args, model)
  draw(args, model)


def main(argv: list[str]) -> None:
  args = parse(argv)
  run(lambda: work(args), args)


if __name__ == "__main__":
  main(sys.argv[1:])

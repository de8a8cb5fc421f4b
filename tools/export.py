"""Writes a trained model as a folder to be shared: weights, settings and a model card.

bash run.sh tools.export --workdir runs/quickstart --out digits

DIR is a run's workdir (with stages: its last one is taken). The folder holds model.safetensors,
config.json, README.md for the Hugging Face hub and, if the model sees latents of a VAE that has no
public name, that VAE. `umd.load` opens it, and so does python -m sample.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.

import numpy as np

from tools import model_card
from tools.command_line import run
from umd import description, hub, saved_weights, tensors, vae_weights, workdir
from umd.description import CONFIG, Place
from umd.progress import say
from umd.saved_weights import NEWEST, TENSORS

CARD, VAE = "README.md", "vae"


def check_out(out: str, place: Place) -> None:
  """Raises ValueError unless the folder is new, empty, or an earlier export of the same model."""
  if os.path.isfile(out):
    raise ValueError(f"--out={out!r} is a file. Give the name of a folder.")
  there = os.listdir(out) if os.path.isdir(out) else []
  if there:
    old = workdir.read_json(os.path.join(out, CONFIG)) if CONFIG in there else {}
    if not isinstance(old, dict) or description.FORMAT not in old:
      raise ValueError(f"--out={out!r} holds something else ({sorted(there)[0]}). Choose another.")
    new = description.to_json(place.description, {})
    of = lambda config: {
      key: config.get(key) for key in ("model", "path", "streams", "class_names")
    }
    if differ := workdir.differences(of(old), of(new)):
      raise ValueError(
        f"--out={out!r} holds another model, which differs in {', '.join(differ)}. Choose another "
        "folder."
      )
  probe = os.path.join(out, ".writable")
  try:
    workdir.write_bytes(probe, b"")
    os.remove(probe)
  except OSError as error:
    raise ValueError(f"--out={out!r} cannot be written: {error}. Choose another.") from None


def is_public(vae: str) -> bool:
  """Whether others find the VAE by its name."""
  return vae in vae_weights.PUBLISHED or vae.startswith(hub.SCHEME)


def copy_vae(out: str, vae: str) -> str:
  """Copies the folder of a VAE; returns its name in config.json."""
  folder = vae_weights.find(vae)
  for name in (vae_weights.TENSORS, vae_weights.CONFIG):
    workdir.write_bytes(
      os.path.join(out, VAE, name), workdir.read_bytes(workdir.join(folder, name))
    )
  return f"./{VAE}"


def export(args: argparse.Namespace) -> None:
  """Reads the run and writes the folder; config.json comes last, so what has one is whole."""
  out = os.path.expanduser(args.out)
  place = description.find(args.workdir)
  if place.weights is not None:
    raise ValueError(f"--workdir={args.workdir!r} was exported already. Give the run's workdir.")
  check_out(out, place)
  params, which, step = saved_weights.read(place, args.weights, args.step)
  about = description.to_json(place.description, {})
  if (vae := place.description.latents.get("vae")) and not is_public(vae):
    about["latents"]["vae"] = copy_vae(out, vae)
  if os.path.exists(config := os.path.join(out, CONFIG)):
    os.remove(config)
  sha256 = tensors.write(os.path.join(out, TENSORS), params, args.dtype)
  about["weights"] = {"which": which, "step": step, "dtype": args.dtype, "sha256": sha256}
  count = sum(np.size(x) for x in tensors.flatten(params).values())
  card = model_card.write(place, about, count, args.name or os.path.basename(os.path.abspath(out)))
  workdir.write_bytes(os.path.join(out, CARD), card.encode())
  workdir.write_json(config, about)
  size = os.path.getsize(os.path.join(out, TENSORS)) / 1e6
  say(
    f"{out}: {count / 1e6:.2f}M parameters ({size:.1f} MB, {args.dtype}), {which} weights of step "
    f"{step} of {place.folder}\nBefore you share it: read {CARD}, and fill in its licence."
  )


def main(argv: list[str]) -> None:
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("tools.export", None, __doc__, formatter_class=text)
  add = parser.add_argument
  add("--workdir", required=True, metavar="DIR", help="of the run")
  add("--out", required=True, metavar="DIR2", help="folder to be written")
  add("--weights", choices=("ema", "raw"), default="", help="(ema)")
  add("--step", default=NEWEST, help="a number, newest or best (newest)")
  add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the file (float32)")
  add("--name", default="", help="of the model, in its card (the folder's)")
  args = parser.parse_args(argv)
  args.step = int(args.step) if args.step.isdigit() else args.step
  run(lambda: export(args))


if __name__ == "__main__":
  main(sys.argv[1:])

"""Writes a trained model as a folder to be shared: weights, settings and a model card.

bash run.sh tools.export --workdir runs/quickstart --out digits

DIR is a run's workdir (with stages: its last one is taken). The folder holds model.safetensors,
config.json, README.md for the Hugging Face hub and, if the model sees latents of a VAE that has no
public name, that VAE. `umd.load` opens it, and so does python -m sample.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping

import numpy as np

from tools.command_line import run
from umd.codecs import vae_files
from umd.runs import workdir
from umd.runs.progress import say
from umd.runs.writers import read_jsonl
from umd.trained import saved
from umd.trained.saved import ABOUT, CONFIG, ENVIRONMENT, NEWEST, TENSORS, Place
from umd.weights import download, safetensors

PACKAGES = ("jax", "flax", "optax", "numpy")

HEADER = """---
library_name: umd
license: other # TODO: choose a licence
tags:
- masked-autoencoder
- diffusion
- jax
- flax
{datasets}---
"""

TEXT = """
# {name}

A masked-diffusion auto-encoder of images of {height} x {width} px, {classes}.
{count:.2f}M parameters; the {which} weights of step {step}, stored as {dtype}.
The method is that of UMD ([arXiv:2406.17688](https://arxiv.org/abs/2406.17688)).

## Use

```python
from umd import load

model = load("{folder}")  # this folder
{usage}
```

## What it is

| | |
|---|---|
{facts}

{classes_list}## Numbers

{metrics}

## Training

{training}

## Licence

TODO: say under which licence this may be used, and that of the data.
"""


def _command(environment: Mapping) -> str:
  """The newest command of the training; "" if nobody knows."""
  arguments = environment.get("command", ())[2:]
  return f"python -m train {shlex.join(arguments)}" if arguments else ""


def _metrics(folder: str) -> str:
  """A table of the run's summary or, of an unfinished run, of its newest numbers."""
  summary, found = workdir.finished(folder), {}
  if summary:
    names = [n for n in summary["headline"] if n in summary["metrics"]]
    found = {name: summary["metrics"][name] for name in names or sorted(summary["metrics"])}
  else:
    for record in read_jsonl(workdir.join(folder, "metrics.jsonl")):
      found |= {k: v for k, v in record.items() if "/" in k}
  shown = {k: f"{v:.4g}" if isinstance(v, (int, float)) else _cell(v) for k, v in found.items()}
  if not shown:
    return "None were measured."
  rows = "\n".join(f"| `{_cell(name)}` | {value} |" for name, value in shown.items())
  how = "" if summary else "The training was not finished.\n\n"
  return f"{how}| metric | value |\n|---|---|\n{rows}"


def _cell(value) -> str:
  """Text that does not end a cell of a table."""
  return str(value).replace("|", "\\|").replace("\n", " ").replace("`", "'")


def _facts(place: Place, config: Mapping) -> str:
  about, data = place.description, config["data"]
  shown = {
    "network": json.dumps(dict(about.model)),
    "noise path": json.dumps(dict(about.path)),
    "streams": json.dumps(dict(about.streams)),
    "sees": f"latents of the VAE {about.latents['vae']!r}" if about.latents else "pixels",
    "data": f"{data['name']}, split {data['split']}, {data['pp'] or 'as it is'}",
    "samples": json.dumps(dataclasses.asdict(about.sampling)),
  }
  return "\n".join(f"| {key} | `{_cell(value)}` |" for key, value in shown.items())


def _training(config: Mapping, environment: Mapping) -> str:
  lines = []
  if command := _command(environment):
    lines.append(f"```sh\n{command}\n```\n")
  versions = environment.get("versions", {})
  used = [f"{name} {versions[name]}" for name in PACKAGES if name in versions]
  kind, devices = environment.get("device_kind"), environment.get("devices", ())
  lines.append(", ".join([*used, *([f"{len(devices)} x {kind}"] if kind else [])]))
  told = {key: value for key, value in config.items() if key != "wandb"}
  settings = json.dumps(told, indent=1, sort_keys=True)
  lines.append(
    f"<details><summary>All settings</summary>\n\n```json\n{settings}\n```\n\n</details>"
  )
  return "\n".join(lines)


def write(place: Place, about: Mapping, count: int, name: str) -> str:
  """The card's text.

  Args:
    place: of the run.
    about: what config.json holds.
    count: of parameters.
    name: of the model.
  """
  config = workdir.read_json(workdir.join(place.folder, "config.json"))
  environment = workdir.read_json(workdir.join(place.folder, ENVIRONMENT)) or {}
  model, held = place.description.model, about["weights"]
  seen = workdir.read_json(workdir.join(place.folder, ABOUT)) or {}
  height, width = (side * seen.get("pixels_per_place", 1) for side in model["image_size"][:2])
  usage = []
  if not place.description.lacks("sample"):
    which = 'labels="all"' if model["num_classes"] else "num=16"
    usage.append(f"images = model.sample({which})")
  if not place.description.lacks("reconstruct"):
    usage.append("filled, masks = model.reconstruct(images, mask_ratio=0.75)")
  usage.append("features = model.represent(images)  # [n, D]")
  names = place.description.class_names
  listed = f"Classes, in order: {', '.join(map(_cell, names))}.\n\n" if names else ""
  public = config["data"]["name"].partition(":")
  dataset = public[2].split("/")[0] if public[0] == "tfds" else ""
  datasets = f"datasets:\n- {dataset}\n" if dataset else ""
  return HEADER.format(datasets=datasets) + TEXT.format(
    name=name,
    height=height,
    width=width,
    classes=f"{model['num_classes']} classes" if model["num_classes"] else "without labels",
    count=count / 1e6,
    **{key: held[key] for key in ("which", "step", "dtype")},
    folder=name,
    usage="\n".join(usage),
    facts=_facts(place, config),
    classes_list=listed,
    metrics=_metrics(place.folder),
    training=_training(config, environment),
  )


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.

CARD, VAE = "README.md", "vae"


def check_out(out: str, place: Place) -> None:
  """Raises ValueError unless the folder is new, empty, or an earlier export of the same model."""
  if os.path.isfile(out):
    raise ValueError(f"--out={out!r} is a file. Give the name of a folder.")
  there = os.listdir(out) if os.path.isdir(out) else []
  if there:
    old = workdir.read_json(os.path.join(out, CONFIG)) if CONFIG in there else {}
    if not isinstance(old, dict) or saved.FORMAT not in old:
      raise ValueError(f"--out={out!r} holds something else ({sorted(there)[0]}). Choose another.")
    new = saved.to_json(place.description, {})
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
  return vae in vae_files.PUBLISHED or vae.startswith(download.SCHEME)


def copy_vae(out: str, vae: str) -> str:
  """Copies the folder of a VAE; returns its name in config.json."""
  folder = vae_files.find(vae)
  for name in (vae_files.TENSORS, vae_files.CONFIG):
    workdir.write_bytes(
      os.path.join(out, VAE, name), workdir.read_bytes(workdir.join(folder, name))
    )
  return f"./{VAE}"


def export(args: argparse.Namespace) -> None:
  """Reads the run and writes the folder; config.json comes last, so what has one is whole."""
  out = os.path.expanduser(args.out)
  place = saved.find(args.workdir)
  if place.weights is not None:
    raise ValueError(f"--workdir={args.workdir!r} was exported already. Give the run's workdir.")
  check_out(out, place)
  params, which, step = saved.read(place, args.weights, args.step)
  about = saved.to_json(place.description, {})
  if (vae := place.description.latents.get("vae")) and not is_public(vae):
    about["latents"]["vae"] = copy_vae(out, vae)
  if os.path.exists(config := os.path.join(out, CONFIG)):
    os.remove(config)
  sha256 = safetensors.write(os.path.join(out, TENSORS), params, args.dtype)
  about["weights"] = {"which": which, "step": step, "dtype": args.dtype, "sha256": sha256}
  count = sum(np.size(x) for x in safetensors.flatten(params).values())
  card = write(place, about, count, args.name or os.path.basename(os.path.abspath(out)))
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

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
from umd.trained.saved import CONFIG, ENVIRONMENT, FORMAT, NEWEST, TENSORS, TrainedRun, open_run
from umd.weights import download, safetensors

CARD, VAE = "README.md", "vae"
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


def export(args: argparse.Namespace) -> None:
  """Reads the run and writes the folder; config.json comes last, so what has one is whole."""
  out = os.path.expanduser(args.out)
  trained = open_run(args.workdir)
  if trained.exported is not None:
    raise ValueError(f"--workdir={args.workdir!r} was exported already. Give the run's workdir.")
  check_out(out, trained)
  params, which, step = trained.params(args.weights, args.step)
  settings = trained.description.to_json({})
  vae = trained.description.latents.get("vae")
  if vae and not is_public(vae):
    settings["latents"]["vae"] = copy_vae(out, vae)
  config = os.path.join(out, CONFIG)
  if os.path.exists(config):
    os.remove(config)
  sha256 = safetensors.write(os.path.join(out, TENSORS), params, args.dtype)
  settings["weights"] = {"which": which, "step": step, "dtype": args.dtype, "sha256": sha256}
  count = sum(np.size(x) for x in safetensors.flatten(params).values())
  name = args.name or os.path.basename(os.path.abspath(out))
  card = make_card(trained, settings["weights"], count, name)
  workdir.write_bytes(os.path.join(out, CARD), card.encode())
  workdir.write_json(config, settings)
  size = os.path.getsize(os.path.join(out, TENSORS)) / 1e6
  say(
    f"{out}: {count / 1e6:.2f}M parameters ({size:.1f} MB, {args.dtype}), {which} weights of step "
    f"{step} of {trained.folder}\nBefore you share it: read {CARD}, and fill in its licence."
  )


def check_out(out: str, trained: TrainedRun) -> None:
  """Raises ValueError unless the folder is new, empty, or an earlier export of the same model."""
  if os.path.isfile(out):
    raise ValueError(f"--out={out!r} is a file. Give the name of a folder.")
  names = os.listdir(out) if os.path.isdir(out) else []
  if names:
    old = workdir.read_json(os.path.join(out, CONFIG)) if CONFIG in names else {}
    if not isinstance(old, dict) or FORMAT not in old:
      raise ValueError(f"--out={out!r} holds something else ({sorted(names)[0]}). Choose another.")
    new = trained.description.to_json({})
    keys = ("model", "path", "streams", "class_names")
    pick = lambda settings: {key: settings.get(key) for key in keys}
    if differ := workdir.differences(pick(old), pick(new)):
      raise ValueError(
        f"--out={out!r} holds another model, which differs in {', '.join(differ)}. Choose another "
        "folder."
      )
  try:
    os.makedirs(out, exist_ok=True)
  except OSError as error:
    raise ValueError(f"--out={out!r} cannot be written: {error}. Choose another.") from None


def is_public(vae: str) -> bool:
  """Says whether others find the VAE by its name."""
  return vae in vae_files.PUBLISHED or vae.startswith(download.SCHEME)


def copy_vae(out: str, vae: str) -> str:
  """Copies the folder of a VAE, and returns its name in config.json."""
  folder = vae_files.find(vae)
  for name in (vae_files.TENSORS, vae_files.CONFIG):
    contents = workdir.read_bytes(workdir.join(folder, name))
    workdir.write_bytes(os.path.join(out, VAE, name), contents)
  return f"./{VAE}"


def make_card(trained: TrainedRun, held: Mapping, count: int, name: str) -> str:
  """Writes the text of the model card.

  Args:
    trained: the run.
    held: what the file of weights holds: {which, step, dtype, ...}.
    count: the number of parameters.
    name: the name of the model.
  """
  config, about = trained.config, trained.description
  environment = workdir.read_json(workdir.join(trained.folder, ENVIRONMENT)) or {}
  classes = about.model["num_classes"]
  height, width = (side * about.pixels_per_place for side in about.model["image_size"][:2])
  usage = []
  if not about.lacks("sample"):
    which = 'labels="all"' if classes else "num=16"
    usage.append(f"images = model.sample({which})")
  if not about.lacks("reconstruct"):
    usage.append("filled, masks = model.reconstruct(images, mask_ratio=0.75)")
  usage.append("features = model.represent(images)  # [n, D]")
  class_names = ", ".join(map(_cell, about.class_names))
  kind, _, dataset = config["data"]["name"].partition(":")
  datasets = f"datasets:\n- {dataset.split('/')[0]}\n" if kind == "tfds" else ""
  return HEADER.format(datasets=datasets) + TEXT.format(
    name=name,
    folder=name,
    height=height,
    width=width,
    classes=f"{classes} classes" if classes else "without labels",
    count=count / 1e6,
    which=held["which"],
    step=held["step"],
    dtype=held["dtype"],
    usage="\n".join(usage),
    facts=_facts(trained),
    classes_list=f"Classes, in order: {class_names}.\n\n" if class_names else "",
    metrics=_metrics(trained.folder),
    training=_training(config, environment),
  )


def _cell(value) -> str:
  """Makes text that does not end the cell of a table."""
  return str(value).replace("|", "\\|").replace("\n", " ").replace("`", "'")


def _facts(trained: TrainedRun) -> str:
  about, data = trained.description, trained.config["data"]
  facts = {
    "network": json.dumps(dict(about.model)),
    "noise path": json.dumps(dict(about.path)),
    "streams": json.dumps(dict(about.streams)),
    "sees": f"latents of the VAE {about.latents['vae']!r}" if about.latents else "pixels",
    "data": f"{data['name']}, split {data['split']}, {data['pp'] or 'as it is'}",
    "samples": json.dumps(dataclasses.asdict(about.sampling)),
  }
  return "\n".join(f"| {key} | `{_cell(value)}` |" for key, value in facts.items())


def _metrics(folder: str) -> str:
  """Makes a table of the run's summary or, of an unfinished run, of its newest numbers."""
  summary, metrics = workdir.finished(folder), {}
  if summary:
    names = [name for name in summary["headline"] if name in summary["metrics"]]
    metrics = {name: summary["metrics"][name] for name in names or sorted(summary["metrics"])}
  else:
    for record in read_jsonl(workdir.join(folder, "metrics.jsonl")):
      metrics |= {name: value for name, value in record.items() if "/" in name}
  if not metrics:
    return "None were measured."
  show = lambda value: f"{value:.4g}" if isinstance(value, (int, float)) else _cell(value)
  rows = "\n".join(f"| `{_cell(name)}` | {show(value)} |" for name, value in metrics.items())
  note = "" if summary else "The training was not finished.\n\n"
  return f"{note}| metric | value |\n|---|---|\n{rows}"


def _training(config: Mapping, environment: Mapping) -> str:
  """Tells the newest command of the training, on what it ran, and all settings."""
  lines = []
  if arguments := environment.get("command", ())[2:]:
    lines.append(f"```sh\npython -m train {shlex.join(arguments)}\n```\n")
  versions = environment.get("versions", {})
  ran_on = [f"{name} {versions[name]}" for name in PACKAGES if name in versions]
  if kind := environment.get("device_kind"):
    ran_on.append(f"{len(environment.get('devices', ()))} x {kind}")
  lines.append(", ".join(ran_on))
  public = {key: value for key, value in config.items() if key != "wandb"}
  settings = json.dumps(public, indent=1, sort_keys=True)
  lines.append(
    f"<details><summary>All settings</summary>\n\n```json\n{settings}\n```\n\n</details>"
  )
  return "\n".join(lines)


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

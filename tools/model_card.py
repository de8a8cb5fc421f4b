"""The README.md of an exported model, as the Hugging Face hub shows it."""

import json
import shlex
from collections.abc import Mapping

from umd import workdir
from umd.description import ABOUT, ENVIRONMENT, Place
from umd.metrics import read_jsonl

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
    "samples": json.dumps(dict(about.sampling)),
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

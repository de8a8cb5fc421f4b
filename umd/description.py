"""What a trained model is, but for its weights: read from a run's folder or an exported one."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from umd import recovery, workdir
from umd.checkpoint import FOLDER
from umd.inference import SAMPLING, Inference
from umd.models.autoencoder import AutoEncoder
from umd.paths import Path, make_path

CONFIG, ABOUT, ENVIRONMENT = "config.json", "model.json", "environment.json"
FORMAT, VERSION = "umd_format", 1  # The key that only an exported config.json has.
HEADS = ("eps", "v", "x0")  # In the order in which samplers prefer them.
STEPS = 50


@dataclasses.dataclass(frozen=True)
class Description:
  """A trained model without its weights; all of it can be written as JSON.

  Attributes:
    model: arguments of `AutoEncoder`.
    path: arguments of `make_path`.
    streams: what it was trained on, as in a config.
    latents: arguments of `umd.codec.make`; {} for pixels.
    vae_sha256: of the VAE's file; "" for pixels.
    class_names: of its labels; () where the data did not say.
    sampling: arguments of `Inference.sample` that it is sampled with unless others are given.
  """

  model: Mapping[str, Any]
  path: Mapping[str, Any]
  streams: Mapping[str, Any]
  latents: Mapping[str, Any]
  vae_sha256: str
  class_names: tuple[str, ...]
  sampling: Mapping[str, Any]

  def inference(self, **settings) -> Inference:
    """The model and its path; `settings` replace attributes of the model: dtype, remat."""
    return Inference(AutoEncoder(**{**self.model, **settings}), make_path(**self.path))

  def settings(self, given: Mapping, guided: bool) -> dict:
    """Arguments of `Inference.sample`: those given that are not None, else the model's own.

    Args:
      given: by name.
      guided: whether there are labels to guide by.
    """
    given = {name: value for name, value in given.items() if value is not None}
    own = dict(self.sampling)
    if given.get("sampler", own["sampler"]) != own["sampler"]:  # Its options are not another's.
      own = {name: value for name, value in own.items() if name in SAMPLING}
    if not guided:
      own["cfg_scale"] = 1.0
    found = own | given
    return found | {"guidance_interval": tuple(found["guidance_interval"])}

  def lacks(self, task: str) -> str:
    """Why training has not prepared the model for "sample" or "reconstruct"; "" if it has."""
    streams = self.streams.values()
    if task == "sample" and all(s.get("timesteps") == "clean" for s in streams):
      return "it was trained on clean images only, so it cannot make images from noise"
    if task == "reconstruct" and not any(s.get("mask_ratio", 0) > 0 for s in streams):
      return "it was trained without masks, so it cannot fill in what is masked"
    if task == "reconstruct" and "x0" not in self.model["heads"]:
      return f"it has no head 'x0' (but {tuple(self.model['heads'])}), which fills in"
    return ""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a trained model is.

  Attributes:
    folder: of the run (the stage), or what was exported.
    description: what the model is.
    weights: of an exported one what its file holds, {which, step, dtype, sha256}; None for a run.
    best: of a run, the config's checkpoint.best.
  """

  folder: str
  description: Description
  weights: Mapping | None = None
  best: str = ""


def _read_json(folder: str, name: str) -> dict | None:
  path = workdir.join(folder, name)
  try:
    found = workdir.read_json(path)
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is damaged: {error}. Bring it back from a copy.") from None
  if found is not None and not isinstance(found, dict):
    raise ValueError(f"{path} holds no settings. Bring it back from a copy.")
  return found


def _heads(model: AutoEncoder, path: Path) -> list[str]:
  """The heads from which samples can start, the best first."""
  return [h for h in HEADS if h in model.heads and not path.singular(h)[1:].any()]


def _sampling(config: Mapping, model: AutoEncoder, path: Path) -> dict:
  """Settings of the run's own samples, or sensible ones if it drew none."""
  steps, heads = min(STEPS, path.timesteps), _heads(model, path)
  found = {**SAMPLING, "steps": steps, "head": (heads or model.heads)[0]}
  found["clip_x0"] = not config["latents"]  # Latents have no bounds.
  for settings in config["evals"].values():
    if settings["type"] == "generation":
      found |= settings["sampling"]
  if not model.num_classes:
    found["cfg_scale"] = 1.0
  return {**found, "guidance_interval": tuple(found["guidance_interval"])}


def _of_run(folder: str, config: Mapping) -> Place:
  """Of the run in a folder, which has been started at least."""
  about = _read_json(folder, ABOUT)
  if config.get("trainer") != "autoencoder":
    hint = f" It looks at {config['init_from']!r}: load that." if config.get("init_from") else ""
    raise ValueError(
      f"{folder!r} is a run of the trainer {config.get('trainer')!r}, which leaves no auto-encoder."
      f"{hint}"
    )
  if about is None:
    raise FileNotFoundError(f"{folder!r}: {ABOUT} is missing; it is written as a run starts.")
  settings = {**config["model"], "heads": tuple(config["model"]["heads"])}
  # The run's own are for training; of a forward pass a loop keeps nothing, and compiles faster.
  settings |= {"scan": True, "remat": "none", "attention": "auto"}
  settings |= {"image_size": tuple(about["image_size"]), "num_classes": about["num_classes"]}
  description = Description(
    settings,
    config["path"],
    config["streams"],
    config["latents"],
    about.get("vae_sha256", ""),
    tuple(about.get("class_names", ())),
    _sampling(config, AutoEncoder(**settings), make_path(**config["path"])),
  )
  return Place(folder, description, best=config["checkpoint"]["best"])


def _of_export(folder: str, config: Mapping) -> Place:
  """Of an exported folder."""
  if config[FORMAT] != VERSION:
    raise ValueError(
      f"{workdir.join(folder, CONFIG)}: {FORMAT}={config[FORMAT]!r}, but only {VERSION} is known "
      "here. Export the run again with this version, or use the version that wrote it."
    )
  found = {field.name: config[field.name] for field in dataclasses.fields(Description)}
  model, sampling = dict(found["model"]), dict(found["sampling"])
  for name in ("heads", "image_size"):  # JSON has no tuples.
    model[name] = tuple(model[name])
  sampling["guidance_interval"] = tuple(sampling["guidance_interval"])
  latents = dict(found["latents"])
  if latents.get("vae", "").startswith("./"):  # It was exported along.
    latents["vae"] = workdir.join(folder, latents["vae"].removeprefix("./"))
  names = tuple(found["class_names"])
  found |= dict(model=model, sampling=sampling, latents=latents, class_names=names)
  return Place(folder, Description(**found), config["weights"])


def _stages(folder: str) -> list[str]:
  """Runs of auto-encoders with checkpoints below a folder, in the order of their starts."""
  root, found = epath.Path(folder), []
  for entry in sorted(root.iterdir()) if root.is_dir() else ():
    stage = workdir.join(folder, entry.name)
    if not entry.is_dir() or not workdir.exists(workdir.join(stage, ABOUT)):
      continue
    config = _read_json(stage, CONFIG) or {}
    checkpoints = workdir.join(stage, FOLDER)
    if config.get("trainer") != "autoencoder" or not workdir.exists(checkpoints):
      continue
    if recovery.steps(checkpoints):
      started = (_read_json(stage, ENVIRONMENT) or {}).get("started", "")
      found.append((started, stage))
  return [stage for _, stage in sorted(found, key=lambda pair: pair[0])]


def find(path: str) -> Place:
  """The model in a run's workdir, in the last stage of one with stages, or in an exported folder.

  Raises:
    FileNotFoundError: there is none.
    ValueError: what is there is damaged, or no auto-encoder.
  """
  path = os.path.expanduser(path)
  config = _read_json(path, CONFIG)
  if config is None:
    if not (stages := _stages(path)):
      what = "there is no such folder" if not workdir.exists(path) else "holds no trained model"
      raise FileNotFoundError(
        f"{path!r}: {what}. Give the workdir of a run with a checkpoint, or a folder that "
        "tools.export wrote."
      )
    return find(stages[-1])
  return _of_export(path, config) if FORMAT in config else _of_run(path, config)


def to_json(description: Description, weights: Mapping) -> dict:
  """What the config.json of an exported folder holds."""
  return {FORMAT: VERSION, **dataclasses.asdict(description), "weights": dict(weights)}

"""What a trained model is, but for its weights: read from a run's folder or an exported one."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from umd import models, objectives
from umd.codecs import codec
from umd.models import MODELS
from umd.models.network import Network, feature_widths
from umd.objectives import Stream
from umd.paths import Path, make_path
from umd.runs import checkpoint, integrity, workdir
from umd.runs import workdir as folder
from umd.runs.checkpoint import FOLDER, WEIGHTS, Retention
from umd.runs.progress import say
from umd.samplers import Sampling
from umd.trained import transfer
from umd.trained.inference import Inference
from umd.weights import safetensors

STAGE = "stage:"


def locate(reference: str, workdir: str) -> str:
  """The folder that `init_from` or `run` means.

  Args:
    reference: "stage:NAME" for the stage of that name in the same workdir, or the folder of any
      run, or one that holds such a stage "pretrain"; "" for none.
    workdir: of all stages.
  """
  if reference.startswith(STAGE):
    return os.path.join(workdir, reference.removeprefix(STAGE))
  inside = os.path.join(reference, "pretrain")
  has_checkpoints = lambda path: folder.exists(os.path.join(path, checkpoint.FOLDER))
  if reference and not has_checkpoints(reference) and has_checkpoints(inside):
    return inside
  return reference


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run.

  Attributes:
    folder: its workdir.
    model: its auto-encoder.
    inference: model and path.
    streams: what it was trained on.
    config: as it was started.
    about: what follows from the data, see `describe_model`.
  """

  folder: str
  model: Network
  inference: Inference
  streams: tuple[Stream, ...]
  config: Mapping
  about: Mapping

  def open_codec(self, mesh: Mesh) -> codec.Codec:
    """What the run encodes images with; ValueError if it is another VAE now."""
    opened = codec.make(self.config["latents"], mesh)
    check_same_vae(self.folder, opened.sha256)
    return opened


def describe_model(model: Network, opened: codec.Codec, class_names: Sequence[str] = ()) -> dict:
  """What `open_run` needs beside the config: it follows from the data and the VAE.

  Args:
    model: the auto-encoder.
    opened: what it sees images through.
    class_names: of the data's labels; kept if the model is given labels.
  """
  return {
    "image_size": list(model.image_size),
    "num_classes": model.num_classes,
    "class_names": list(class_names) if model.num_classes else [],
    "pixels_per_place": opened.factor,
    "vae_sha256": opened.sha256,
  }


def check_same_vae(path: str, sha256: str) -> None:
  """Raises ValueError if the run in that folder, if there is one, is of another VAE's latents."""
  about = folder.read_json(os.path.join(path, ABOUT)) or {}
  if (there := about.get("vae_sha256", sha256)) != sha256:
    name = lambda digest: f"latents of the VAE {digest[:12]}..." if digest else "pixels"
    raise ValueError(
      f"latents.vae: the run in {path!r} was trained on {name(there)}, this would be on "
      f"{name(sha256)}. Give the vae that it was trained with, or another workdir."
    )


def as_it_runs(model: Mapping) -> dict:
  """Attributes of the model of a config.

  What it leaves open is as suits a forward pass: a loop over layers, which compiles faster.
  """
  settings = {**model, "heads": tuple(model["heads"])}
  known = {field.name for field in dataclasses.fields(MODELS[model["name"]])}
  if "scan" in known:
    settings["scan"] = settings.get("scan") != "false"
  if "remat" in known:
    settings["remat"] = settings.get("remat", "none").replace("auto", "none")
  return settings


def open_run(path: str, **settings) -> Run:
  """Reads what a run trained, from the config that it saved.

  Args:
    path: the run's folder.
    **settings: attributes of the model that may differ from the run's: dtype, scan, remat.

  Raises:
    FileNotFoundError: there is no run, or it has no checkpoint yet.
  """
  config = folder.read_json(os.path.join(path, "config.json"))
  about = folder.read_json(os.path.join(path, ABOUT))
  if config is None or about is None:
    raise FileNotFoundError(
      f"{path!r} holds no run: config.json or model.json is missing. Train first, or give the "
      "workdir of a run that was trained."
    )
  checkpoint.param_shapes(path)
  settings = {**as_it_runs(config["model"]), **settings}
  size = tuple(about["image_size"])
  model = models.make(image_size=size, num_classes=about["num_classes"], **settings)
  inference = Inference(model, make_path(**config["path"]))
  return Run(path, model, inference, objectives.make_streams(config["streams"]), config, about)


def check_expected(run: Run, expected: Mapping) -> None:
  """Raises ValueError where the run is not what the command says it is.

  Args:
    run: see `open_run`.
    expected: any of variant, size, adaln, latent_diffusion, width.
  """
  actual = {
    "variant": run.model.variant,
    "size": run.model.image_size[0] * run.about["pixels_per_place"],
    "adaln": {"adaln": "true", "adaln_shared": "shared", "token": "false"}[run.model.condition],
    "latent_diffusion": bool(run.config["latents"]),
    "width": feature_widths(run.model)["class"],
  }
  wrong = [f"{k}={v!r}, there {actual[k]!r}" for k, v in expected.items() if actual[k] != v]
  if wrong:
    raise ValueError(
      f"The checkpoint in {run.folder!r} is of another model: {'; '.join(wrong)}. Give the values "
      "that are there, or another workdir."
    )


def check_fits(path: str, model_shapes, fresh) -> None:
  """Raises ValueError, listing the leaves, unless a model can start from the run in `path`."""
  own, given = transfer.leaves(model_shapes), transfer.leaves(checkpoint.param_shapes(path))
  transfer.check(own, given, fresh)


TENSORS = "model.safetensors"
NEWEST, BEST = "newest", "best"


@dataclasses.dataclass(frozen=True)
class Description:
  """A trained model without its weights; all of it can be written as JSON.

  Attributes:
    model: arguments of `umd.models.make`.
    path: arguments of `make_path`.
    streams: what it was trained on, as in a config.
    latents: arguments of `umd.codecs.codec.make`; {} for pixels.
    vae_sha256: of the VAE's file; "" for pixels.
    class_names: of its labels; () where the data did not say.
    sampling: what it is sampled with unless other settings are given.
  """

  model: Mapping[str, Any]
  path: Mapping[str, Any]
  streams: Mapping[str, Any]
  latents: Mapping[str, Any]
  vae_sha256: str
  class_names: tuple[str, ...]
  sampling: Sampling

  def inference(self, **settings) -> Inference:
    """The model and its path; `settings` replace attributes of the model: dtype, remat."""
    return Inference(models.make(**{**self.model, **settings}), make_path(**self.path))

  def settings(self, given: Mapping, guided: bool) -> Sampling:
    """Returns the settings of sampling: those given that are not None, else the model's own.

    Args:
      given: by name.
      guided: whether there are labels to guide by.
    """
    sampling = self.sampling if guided else dataclasses.replace(self.sampling, cfg_scale=1.0)
    return sampling.updated(given)

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


def _checkpoints(place: Place) -> str:
  folder = place.folder
  return os.path.join(folder if workdir.scheme(folder) else os.path.abspath(folder), FOLDER)


def choose(place: Place, step: int | str = NEWEST) -> int:
  """The step that is meant; that checkpoint is as it was written.

  Args:
    place: of a run.
    step: a number; "newest"; or "best" by the metric that the run's config names.

  Raises:
    FileNotFoundError: there is no such checkpoint; lists those that there are.
    ValueError: it is damaged, or nothing says which is best.
  """
  folder = _checkpoints(place)
  there = integrity.steps(folder) if workdir.exists(folder) else []
  if not there:
    raise FileNotFoundError(
      f"{place.folder!r} has no checkpoint yet. Train on, or give another workdir."
    )
  shown = ", ".join(map(str, sorted(there)))
  if step == NEWEST:
    found = integrity.find_newest(folder)
    for bad, text in found.damaged.items():
      say(f"{folder}: checkpoint {bad} is damaged: {text}; using {found.step}")
    return found.step
  if step == BEST:
    if not place.best:
      raise ValueError(
        f"step='best': the run in {place.folder!r} does not say what is best (checkpoint.best is "
        f"''). Name a step: {shown}."
      )
    metrics = {s: integrity.read_metrics(epath.Path(folder) / str(s)) for s in there}
    step = Retention(best=place.best).best_step(there, metrics)
    if step is None:
      raise ValueError(f"step='best': no checkpoint has {place.best!r}. Name a step: {shown}.")
  if isinstance(step, bool) or not isinstance(step, int):
    raise ValueError(f"step={step!r} must be a number, 'newest' or 'best'.")
  if step not in there:
    raise FileNotFoundError(
      f"step={step}: {place.folder!r} has no such checkpoint; it has {shown}."
    )
  verdict = integrity.verify(epath.Path(folder) / str(step))
  if not verdict.good:
    raise ValueError(
      f"step={step}: that checkpoint of {place.folder!r} is damaged: {verdict.text}. Name another: "
      f"{shown}."
    )
  return step


def _of_checkpoint(path: epath.Path, field: str) -> dict:
  """One field of a train state, as NumPy arrays."""
  about = ocp.PyTreeCheckpointHandler().metadata(path)
  if about is None or field not in (about.tree or {}):
    raise ValueError(f"{path} holds no {field} that can be read. Name another step.")
  wanted = {field: about.tree[field]}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  with ocp.PyTreeCheckpointer() as checkpointer:
    state = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    return checkpointer.restore(path, args=state)[field]


def _weights_of_export(place: Place, which: str, step: int | str) -> tuple[dict, str, int]:
  held = place.weights
  if which not in ("", held["which"]) or step not in (NEWEST, held["step"]):
    raise ValueError(
      f"weights={which!r}, step={step!r}: {place.folder!r} holds the {held['which']} weights of "
      f"step {held['step']} only. Leave both out, or load the run that it was exported from."
    )
  path = workdir.join(place.folder, TENSORS)
  return safetensors.read(path, held["sha256"]), held["which"], held["step"]


def read(place: Place, which: str = "", step: int | str = NEWEST) -> tuple[dict, str, int]:
  """(parameters as NumPy float32, which they are, their step).

  Args:
    place: see `umd.trained.saved.find`.
    which: "ema" or "raw"; "" for the average, or for what an exported folder holds.
    step: see `choose`.

  Raises:
    FileNotFoundError, ValueError: there are no such weights, or they are damaged.
  """
  if which and which not in WEIGHTS:
    raise ValueError(f"weights={which!r} is not one of {list(WEIGHTS)}.")
  if place.weights is not None:
    return _weights_of_export(place, which, step)
  which = which or "ema"
  step = choose(place, step)
  state = epath.Path(_checkpoints(place)) / str(step) / "state"
  return _of_checkpoint(state, WEIGHTS[which]), which, step


CONFIG, ABOUT, ENVIRONMENT = "config.json", "model.json", "environment.json"
FORMAT, VERSION = "umd_format", 1  # The key that only an exported config.json has.
HEADS = ("eps", "v", "x0")  # In the order in which samplers prefer them.
STEPS = 50


def _read_json(folder: str, name: str) -> dict | None:
  path = workdir.join(folder, name)
  try:
    found = workdir.read_json(path)
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is damaged: {error}. Bring it back from a copy.") from None
  if found is not None and not isinstance(found, dict):
    raise ValueError(f"{path} holds no settings. Bring it back from a copy.")
  return found


def _heads(model: Network, path: Path) -> list[str]:
  """The heads from which samples can start, the best first."""
  return [h for h in HEADS if h in model.heads and path.invertible(h)]


def _sampling(config: Mapping, model: Network, path: Path) -> Sampling:
  """Settings of the run's own samples, or sensible ones if it drew none."""
  generation = [s for s in config["evals"].values() if s["type"] == "generation"]
  if generation:
    sampling = Sampling().updated(generation[-1]["sampling"])
  else:
    heads = _heads(model, path) or model.heads
    sampling = Sampling(steps=min(STEPS, path.timesteps or STEPS), head=heads[0])
  clip_x0 = sampling.clip_x0 and not config["latents"]  # Latents have no bounds.
  cfg_scale = sampling.cfg_scale if model.num_classes else 1.0
  return dataclasses.replace(sampling, clip_x0=clip_x0, cfg_scale=cfg_scale)


def _of_run(folder: str, config: Mapping) -> Place:
  """Of the run in a folder, which has been started at least."""
  about = _read_json(folder, ABOUT)
  if config.get("trainer") != "diffusion":
    hint = f" It looks at {config['init_from']!r}: load that." if config.get("init_from") else ""
    raise ValueError(
      f"{folder!r} is a run of the trainer {config.get('trainer')!r}, which leaves no auto-encoder."
      f"{hint}"
    )
  if about is None:
    raise FileNotFoundError(f"{folder!r}: {ABOUT} is missing; it is written as a run starts.")
  settings = {**config["model"], "heads": tuple(config["model"]["heads"])}
  # The run's own are for training; of a forward pass a loop keeps nothing, and compiles faster.
  forward = {"scan": True, "remat": "none", "attention": "auto"}
  settings |= {name: value for name, value in forward.items() if name in settings}
  settings |= {"image_size": tuple(about["image_size"]), "num_classes": about["num_classes"]}
  description = Description(
    settings,
    config["path"],
    config["streams"],
    config["latents"],
    about.get("vae_sha256", ""),
    tuple(about.get("class_names", ())),
    _sampling(config, models.make(**settings), make_path(**config["path"])),
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
  model, sampling = dict(found["model"]), Sampling().updated(found["sampling"])
  for name in ("heads", "image_size"):  # JSON has no tuples.
    model[name] = tuple(model[name])
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
    if config.get("trainer") != "diffusion" or not workdir.exists(checkpoints):
      continue
    if integrity.steps(checkpoints):
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

"""A trained model on disk: where it is, what it is, and its weights.

It is a run's workdir, with config.json as the run was started, model.json with what followed from
its data, and checkpoints; or a folder that tools.export wrote, with all of this in config.json and
the weights in model.safetensors. `open_run` opens either, for `umd.load` as for trainers that start
from a run. What reads checkpoints is imported where a run's weights are read: an exported folder
needs none of it.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from umd import models, objectives
from umd.codecs import codec
from umd.models.network import Network, feature_widths
from umd.objectives import Stream
from umd.paths import Path, make_path
from umd.runs import workdir as folders
from umd.samplers import Sampling
from umd.trained import transfer
from umd.trained.inference import Inference
from umd.weights import safetensors

CONFIG, ABOUT, ENVIRONMENT = "config.json", "model.json", "environment.json"
TENSORS = "model.safetensors"
FORMAT, VERSION = "umd_format", 1  # The key that only an exported config.json has.
NEWEST, BEST = "newest", "best"
STAGE = "stage:"
HEADS = ("eps", "v", "x0")  # In the order in which samplers prefer them.
STEPS = 50  # Of the sampler, for a run that drew no samples of its own.
# In a forward pass nothing is kept for a gradient, and a loop over layers compiles fastest.
FORWARD = {"scan": True, "remat": "none", "attention": "auto"}


@dataclasses.dataclass(frozen=True)
class Description:
  """A trained model without its weights; all of it can be written as JSON.

  Attributes:
    model: arguments of `umd.models.make`.
    path: arguments of `make_path`.
    streams: what it was trained on, as in a config.
    latents: arguments of `umd.codecs.codec.make`; {} for pixels.
    pixels_per_place: the pixels along a side of what the model sees as one place; 1 for pixels.
    vae_sha256: the digest of the VAE's file; "" for pixels.
    class_names: the names of its labels; () where the data did not say.
    sampling: how it is sampled unless other settings are given.
  """

  model: Mapping[str, Any]
  path: Mapping[str, Any]
  streams: Mapping[str, Any]
  latents: Mapping[str, Any]
  pixels_per_place: int
  vae_sha256: str
  class_names: tuple[str, ...]
  sampling: Sampling

  def inference(self, **settings) -> Inference:
    """Makes the network with its path; `settings` replace attributes of the network."""
    return Inference(models.make(**{**self.model, **settings}), make_path(**self.path))

  def settings(self, given: Mapping, guided: bool) -> Sampling:
    """Returns the settings of sampling: those given that are not None, else the model's own.

    Args:
      given: settings by name.
      guided: whether there are labels to guide by.
    """
    sampling = self.sampling if guided else dataclasses.replace(self.sampling, cfg_scale=1.0)
    return sampling.updated(given)

  def lacks(self, task: str) -> str:
    """Says why training has not prepared the model for "sample" or "reconstruct"; "" if it has."""
    streams = self.streams.values()
    if task == "sample" and all(s.get("timesteps") == "clean" for s in streams):
      return "it was trained on clean images only, so it cannot make images from noise"
    if task == "reconstruct" and not any(s.get("mask_ratio", 0) > 0 for s in streams):
      return "it was trained without masks, so it cannot fill in what is masked"
    if task == "reconstruct" and "x0" not in self.model["heads"]:
      return f"it has no head 'x0' (but {tuple(self.model['heads'])}), which fills in"
    return ""

  def to_json(self, weights: Mapping) -> dict:
    """Returns what the config.json of an exported folder holds."""
    return {FORMAT: VERSION, **dataclasses.asdict(self), "weights": dict(weights)}


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A trained model on disk.

  Attributes:
    folder: the workdir of its run (of the stage), or the exported folder.
    description: what it is.
    config: the config as the run was started; {} for an exported folder.
    exported: what the file of an exported folder holds, {which, step, dtype, sha256}; None for a
      run.
  """

  folder: str
  description: Description
  config: Mapping = dataclasses.field(default_factory=dict)
  exported: Mapping | None = None

  @functools.cached_property
  def inference(self) -> Inference:
    """The network with its path."""
    return self.description.inference()

  @property
  def model(self) -> Network:
    """The network."""
    return self.inference.model

  @property
  def streams(self) -> tuple[Stream, ...]:
    """What it was trained on."""
    return objectives.make_streams(self.description.streams)

  def open_codec(self, mesh: Mesh) -> codec.Codec:
    """Opens what the model sees images through.

    Raises:
      ValueError: it is another VAE than in training.
    """
    opened = codec.make(self.description.latents, mesh)
    _check_vae(self.folder, self.description.vae_sha256, opened.sha256)
    return opened

  def params(self, which: str = "", step: int | str = NEWEST) -> tuple[dict, str, int]:
    """Reads (parameters as NumPy float32, which ones they are, their step).

    Args:
      which: "ema" or "raw"; "" for the average, or for what an exported folder holds.
      step: the step of a checkpoint; "newest"; or "best" by the run's own checkpoint.best.

    Raises:
      FileNotFoundError, ValueError: there are no such weights, or they are damaged.
    """
    if self.exported is not None:
      return self._exported_params(which, step)
    from umd.runs import checkpoint, integrity

    if which and which not in checkpoint.WEIGHTS:
      raise ValueError(f"weights={which!r} is not one of {list(checkpoint.WEIGHTS)}.")
    which = which or "ema"
    if step == NEWEST:
      params, step = checkpoint.load_params(self.folder, which)
      return params, which, step
    folder = checkpoint.folder_of(self.folder)
    steps = integrity.steps(folder)
    shown = ", ".join(map(str, sorted(steps)))
    step = self._best(steps) if step == BEST else step
    if isinstance(step, bool) or not isinstance(step, int):
      raise ValueError(f"step={step!r} must be a number, 'newest' or 'best'.")
    if step not in steps:
      raise FileNotFoundError(
        f"step={step}: {self.folder!r} has no such checkpoint; it has {shown}."
      )
    path = epath.Path(folder) / str(step)
    if problem := integrity.verify(path):
      raise ValueError(
        f"step={step}: that checkpoint of {self.folder!r} is damaged: {problem}. Name "
        f"another: {shown}."
      )
    return checkpoint.read_field(path / "state", checkpoint.WEIGHTS[which]), which, step

  def _best(self, steps: Sequence[int]) -> int:
    from umd.runs import checkpoint, integrity

    best = self.config["checkpoint"]["best"]
    folder = epath.Path(checkpoint.folder_of(self.folder))
    metrics = {step: integrity.read_metrics(folder / str(step)) for step in steps}
    step = checkpoint.Retention(best=best).best_step(steps, metrics) if best else None
    if step is None:
      raise ValueError(
        f"step='best': no checkpoint of {self.folder!r} is the best by checkpoint.best={best!r}. "
        f"Name a step: {', '.join(map(str, sorted(steps)))}."
      )
    return step

  def _exported_params(self, which: str, step: int | str) -> tuple[dict, str, int]:
    held = self.exported
    if which not in ("", held["which"]) or step not in (NEWEST, held["step"]):
      raise ValueError(
        f"weights={which!r}, step={step!r}: {self.folder!r} holds the {held['which']} weights of "
        f"step {held['step']} only. Leave both out, or load the run that it was exported from."
      )
    tensors = safetensors.read(folders.join(self.folder, TENSORS), held["sha256"])
    return tensors, held["which"], held["step"]


def open_run(path: str, **settings) -> TrainedRun:
  """Opens the model in a run's workdir, in the last stage of one with stages, or in an export.

  Args:
    path: the folder.
    **settings: attributes of the network that may differ from the run's: dtype, scan, remat.

  Raises:
    FileNotFoundError: there is none, or its run has no checkpoint yet.
    ValueError: what is there is damaged, or no run of the diffusion trainer.
  """
  path = os.path.expanduser(path)
  config = _read_json(path, CONFIG)
  if config is None:
    stages = _stages(path) if path else []
    if not stages:
      why = "there is none with a checkpoint in it" if folders.exists(path) else "no such folder"
      raise FileNotFoundError(
        f"{path!r} holds no run: {why}. Give the workdir of a run with a checkpoint, or a folder "
        "that tools.export wrote."
      )
    path, config = stages[-1], _read_json(stages[-1], CONFIG)
  run = _open_export(path, config) if FORMAT in config else _open_workdir(path, config)
  if not settings:
    return run
  model = {**run.description.model, **settings}
  return dataclasses.replace(run, description=dataclasses.replace(run.description, model=model))


def _read_json(folder: str, name: str) -> dict | None:
  path = folders.join(folder, name)
  try:
    contents = folders.read_json(path)
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is damaged: {error}. Bring it back from a copy.") from None
  if contents is not None and not isinstance(contents, dict):
    raise ValueError(f"{path} holds no settings. Bring it back from a copy.")
  return contents


def _stages(folder: str) -> list[str]:
  """Lists the runs with checkpoints below a folder, in the order of their starts."""
  root, starts = epath.Path(folder), []
  for entry in sorted(root.iterdir()) if root.is_dir() else ():
    stage = folders.join(folder, entry.name)
    if not entry.is_dir() or not folders.exists(folders.join(stage, ABOUT)):
      continue
    trainer = (_read_json(stage, CONFIG) or {}).get("trainer")
    if trainer == "diffusion" and _has_checkpoint(stage):
      environment = _read_json(stage, ENVIRONMENT) or {}
      starts.append((environment.get("started", ""), stage))
  return [stage for _, stage in sorted(starts, key=lambda pair: pair[0])]


def _has_checkpoint(folder: str) -> bool:
  from umd.runs import checkpoint, integrity

  checkpoints = checkpoint.folder_of(folder)
  return folders.exists(checkpoints) and bool(integrity.steps(checkpoints))


def _open_workdir(folder: str, config: Mapping) -> TrainedRun:
  if config.get("trainer") != "diffusion":
    hint = f" It looks at {config['init_from']!r}: load that." if config.get("init_from") else ""
    raise ValueError(
      f"{folder!r} is a run of the trainer {config.get('trainer')!r}, which leaves no model that "
      f"makes images.{hint}"
    )
  about = _read_json(folder, ABOUT)
  if about is None or not _has_checkpoint(folder):
    raise FileNotFoundError(
      f"{folder!r} has no checkpoint yet. Train that run first, or give the workdir of one that was"
      " trained."
    )
  model = {**config["model"], "heads": tuple(config["model"]["heads"])}
  model |= {name: value for name, value in FORWARD.items() if name in model}
  model |= {"image_size": tuple(about["image_size"]), "num_classes": about["num_classes"]}
  description = Description(
    model=model,
    path=config["path"],
    streams=config["streams"],
    latents=config["latents"] or {},
    pixels_per_place=about["pixels_per_place"],
    vae_sha256=about["vae_sha256"],
    class_names=tuple(about["class_names"]),
    sampling=_sampling(config, models.make(**model), make_path(**config["path"])),
  )
  return TrainedRun(folder, description, config)


def _sampling(config: Mapping, model: Network, path: Path) -> Sampling:
  """Returns the settings of the run's own samples, or sensible ones if it drew none."""
  generation = [s for s in config["evals"].values() if s["type"] == "generation"]
  if generation:
    sampling = Sampling().updated(generation[-1]["sampling"])
  else:
    able = [h for h in HEADS if h in model.heads and path.invertible(h)]
    sampling = Sampling(steps=min(STEPS, path.timesteps or STEPS), head=(able or model.heads)[0])
  clip_x0 = sampling.clip_x0 and not config["latents"]  # Latents have no bounds.
  cfg_scale = sampling.cfg_scale if model.num_classes else 1.0
  return dataclasses.replace(sampling, clip_x0=clip_x0, cfg_scale=cfg_scale)


def _open_export(folder: str, config: Mapping) -> TrainedRun:
  if config[FORMAT] != VERSION:
    raise ValueError(
      f"{folders.join(folder, CONFIG)}: {FORMAT}={config[FORMAT]!r}, but only {VERSION} is known "
      "here. Export the run again with this version, or use the version that wrote it."
    )
  fields = {field.name: config[field.name] for field in dataclasses.fields(Description)}
  model, latents = dict(fields["model"]), dict(fields["latents"])
  for name in ("heads", "image_size"):  # JSON has no tuples.
    model[name] = tuple(model[name])
  if latents.get("vae", "").startswith("./"):  # It was exported along.
    latents["vae"] = folders.join(folder, latents["vae"].removeprefix("./"))
  fields |= {
    "model": model,
    "latents": latents,
    "class_names": tuple(fields["class_names"]),
    "sampling": Sampling().updated(fields["sampling"]),
  }
  return TrainedRun(folder, Description(**fields), exported=config["weights"])


# For trainers: what a run leaves beside its config, and what may start from it.


def describe_model(model: Network, opened: codec.Codec, class_names: Sequence[str] = ()) -> dict:
  """Returns what model.json holds: what `open_run` needs beside the config.

  Args:
    model: the network.
    opened: what it sees images through.
    class_names: the names of the data's labels; kept if the model is given labels.
  """
  return {
    "image_size": list(model.image_size),
    "num_classes": model.num_classes,
    "class_names": list(class_names) if model.num_classes else [],
    "pixels_per_place": opened.factor,
    "vae_sha256": opened.sha256,
  }


def locate(reference: str, workdir: str) -> str:
  """Returns the folder that `init_from` means.

  Args:
    reference: "stage:NAME" for the stage of that name in the same workdir, or the folder of any
      run, or one that holds such a stage "pretrain"; "" for none.
    workdir: the workdir of all stages.
  """
  if reference.startswith(STAGE):
    return os.path.join(workdir, reference.removeprefix(STAGE))
  from umd.runs import checkpoint

  inside = os.path.join(reference, "pretrain")
  has_checkpoints = lambda path: folders.exists(checkpoint.folder_of(path))
  if reference and not has_checkpoints(reference) and has_checkpoints(inside):
    return inside
  return reference


def check_same_vae(path: str, sha256: str) -> None:
  """Raises ValueError if the run in that folder, if there is one, is of another VAE's latents."""
  about = _read_json(path, ABOUT)
  if about is not None:
    _check_vae(path, about["vae_sha256"], sha256)


def _check_vae(folder: str, trained: str, sha256: str) -> None:
  if trained != sha256:
    name = lambda digest: f"latents of the VAE {digest[:12]}..." if digest else "pixels"
    raise ValueError(
      f"latents.vae: the run in {folder!r} was trained on {name(trained)}, this would be on "
      f"{name(sha256)}. Give the vae that it was trained with, or another workdir."
    )


def check_expected(run: TrainedRun, expected: Mapping) -> None:
  """Raises ValueError where the run is not what the command says it is.

  Args:
    run: see `open_run`.
    expected: any of variant, size, adaln, latent_diffusion, width.
  """
  about = run.description
  adaln = {"adaln": "true", "adaln_shared": "shared", "token": "false"}
  actual = {
    "variant": about.model.get("variant"),
    "size": run.model.image_size[0] * about.pixels_per_place,
    "adaln": adaln.get(about.model.get("condition")),
    "latent_diffusion": bool(about.latents),
    "width": feature_widths(run.model).get("class"),
  }
  wrong = [f"{k}={v!r}, there {actual[k]!r}" for k, v in expected.items() if actual[k] != v]
  if wrong:
    raise ValueError(
      f"The checkpoint in {run.folder!r} is of another model: {'; '.join(wrong)}. Give the values "
      "that are there, or another workdir."
    )


def check_fits(path: str, model_shapes, fresh) -> None:
  """Raises ValueError, listing the leaves, unless a model can start from the run in `path`."""
  from umd.runs import checkpoint

  shapes = checkpoint.param_shapes(path)
  transfer.check(transfer.leaves(model_shapes), transfer.leaves(shapes), fresh)

"""Runs on disk: where a run is that another one builds on, and what it holds."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from trainers import methods
from umd import checkpoint, codec, transfer
from umd import workdir as folder
from umd.inference import Inference
from umd.models.autoencoder import AutoEncoder
from umd.objectives import Stream
from umd.paths import make_path

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
  model: AutoEncoder
  inference: Inference
  streams: tuple[Stream, ...]
  config: Mapping
  about: Mapping

  def open_codec(self, mesh: Mesh) -> codec.Codec:
    """What the run encodes images with; ValueError if it is another VAE now."""
    opened = codec.make(self.config["latents"], mesh)
    check_same_vae(self.folder, opened.sha256)
    return opened


ABOUT = "model.json"


def describe_model(
  model: AutoEncoder, opened: codec.Codec, class_names: Sequence[str] = ()
) -> dict:
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
  settings["scan"] = settings.get("scan") != "false"
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
  model = AutoEncoder(image_size=size, num_classes=about["num_classes"], **settings)
  inference = Inference(model, make_path(**config["path"]))
  return Run(path, model, inference, methods.make_streams(config["streams"]), config, about)


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
    "width": run.model.shape.width,
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

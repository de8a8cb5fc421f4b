"""Runs on disk: where a run is that another one builds on, and what it holds."""

import dataclasses
import os
from collections.abc import Mapping

from trainers import methods
from umd import checkpoint, transfer
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
  """

  folder: str
  model: AutoEncoder
  inference: Inference
  streams: tuple[Stream, ...]
  config: Mapping


def describe_model(model: AutoEncoder) -> dict:
  """What `open_run` needs beside the config: it follows from the data."""
  return {"image_size": list(model.image_size), "num_classes": model.num_classes}


def open_run(path: str, **settings) -> Run:
  """Reads what a run trained, from the config that it saved.

  Args:
    path: the run's folder.
    **settings: attributes of the model that may differ from the run's: dtype, scan, remat.

  Raises:
    FileNotFoundError: there is no run, or it has no checkpoint yet.
  """
  config = folder.read_json(os.path.join(path, "config.json"))
  about = folder.read_json(os.path.join(path, "model.json"))
  if config is None or about is None:
    raise FileNotFoundError(
      f"{path!r} holds no run: config.json or model.json is missing. Train first, or give the "
      "workdir of a run that was trained."
    )
  checkpoint.param_shapes(path)
  settings = {**config["model"], "heads": tuple(config["model"]["heads"]), **settings}
  size = tuple(about["image_size"])
  model = AutoEncoder(image_size=size, num_classes=about["num_classes"], **settings)
  inference = Inference(model, make_path(**config["path"]))
  return Run(path, model, inference, methods.make_streams(config["streams"]), config)


def check_expected(run: Run, expected: Mapping) -> None:
  """Raises ValueError where the run is not what the command says it is.

  Args:
    run: see `open_run`.
    expected: any of variant, size, adaln, latent_diffusion, width.
  """
  actual = {
    "variant": run.model.variant,
    "size": run.model.image_size[0] * run.config["latents"].get("factor", 1),
    "adaln": run.model.adaln,
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

"""Trains a network on the streams of its config: MAE, UMD, DiT, MaskDiT are rows of one table."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

import evaluators
from evaluators import Scheduled
from trainers import auto, diagnosis, logs, loop, optim
from trainers.config.records import Diffusion, to_dict
from umd import data, models, objectives
from umd.codecs import codec as codecs
from umd.codecs.codec import Codec
from umd.devices import chips, flops
from umd.devices import mesh as sharding
from umd.models.network import Network, grid, init_params, param_shapes
from umd.objectives import Objective, Stream
from umd.paths import make_path
from umd.runs import workdir as folder
from umd.runs import writers
from umd.runs.checkpoint import load_params
from umd.state import TrainState, init_state, state_shapes
from umd.trained import saved, transfer
from umd.trained.inference import Inference

# What may change between two starts of one run without making it another run.
HARMLESS = (
  "accumulate",
  "checkpoint",
  "data.max_bad",
  "evals",
  "fsdp",
  "log_every",
  "model.attention",
  "model.remat",
  "model.scan",
  "summary",
  "wandb",
)


class Parts(NamedTuple):
  """What a config stands for, before anything is computed.

  Attributes:
    mesh: all devices.
    source: the data to train on.
    codec: between its images and what the network sees.
    steps: the number of the last step.
    objective: the network, its path and streams, and the loss.
    schedule: the learning rate by step.
    tx: the optimiser.
    work: what a step asks of each device.
    evaluators: with their schedules.
  """

  mesh: Mesh
  source: data.Source
  codec: Codec
  steps: int
  objective: Objective
  schedule: Callable
  tx: optax.GradientTransformation
  work: writers.Work = writers.Work()
  evaluators: Sequence[Scheduled] = ()

  @property
  def model(self) -> Network:
    return self.objective.model

  @property
  def streams(self) -> tuple[Stream, ...]:
    return self.objective.streams


def prepare(config: Diffusion, workdir: str, cache: str, init_from: str = "") -> Parts:
  """Builds everything that can be wrong; takes seconds, compiles and writes nothing.

  Args:
    config: a stage, see `trainers.config.records`.
    workdir: the folder of the run.
    cache: folder for what evaluators compute once.
    init_from: workdir of the run whose weights to start from; "" for none, or for one that an
      earlier stage is yet to train.

  Raises:
    ValueError: a setting that makes no sense, a workdir that holds another run, or weights in
      `init_from` that do not fit.
    FileNotFoundError: data, the VAE's weights or the run in `init_from` are not there.
  """
  folder.check_same_run(workdir, to_dict(config), HARMLESS)
  mesh = sharding.make_mesh(fsdp=config.fsdp)
  sharding.check_divides("batch_size", config.batch_size, mesh)
  sharding.check_divides("eval_batch_size", config.eval_batch_size, mesh)
  source = data.load(**to_dict(config.data))
  if config.use_labels and not source.num_classes:
    raise ValueError(f"use_labels=True, but {source.name!r} has no labels. Set use_labels=False.")
  codec = codecs.make(to_dict(config.latents), mesh)
  saved.check_same_vae(workdir, codec.sha256)
  parts = assemble(config, mesh, source, codec, codec.source_size("data", source))
  if init_from:
    saved.check_same_vae(init_from, codec.sha256)
    saved.check_fits(init_from, param_shapes(parts.model), config.init_fresh)
  context = evaluators.Context(
    inference=Inference(parts.model, parts.objective.path),
    streams=parts.streams,
    mesh=mesh,
    batch_size=config.eval_batch_size,
    seed=config.seed,
    cache=cache,
    codec=codec,
  )
  scheduled = evaluators.from_config(to_dict(config.evals), context)
  return parts._replace(work=count_work(parts.objective, mesh), evaluators=scheduled)


def assemble(
  config: Diffusion, mesh: Mesh, source: data.Source, codec: Codec, image_size: tuple[int, int, int]
) -> Parts:
  """Builds network, objective and optimiser: all that a step needs.

  Args:
    config: a stage, see `trainers.config.records`.
    mesh: all devices.
    source: of its number of classes, and of its length if the run's is in epochs.
    codec: between its images and what the network sees.
    image_size: (H, W, C) of what the network sees.
  """
  path = make_path(**dataclasses.asdict(config.path))
  settings = {name: dataclasses.asdict(stream) for name, stream in config.streams.items()}
  streams = objectives.make_streams(settings)

  def build(**attributes) -> Objective:
    model = make_model(config, image_size, source.num_classes, **attributes)
    return Objective(model, path, streams, config.batch_size, config.label_drop_prob)

  choices = {key: getattr(config.model, key, "") for key in ("scan", "remat")}
  if auto.AUTO in choices.values():
    objective = auto.settle(build, mesh, accumulate=config.accumulate, **choices)
  else:  # All is said, or the network has no layers to loop over or to rematerialise.
    objective = build()
  sharding.check_accumulates(config.accumulate, config.batch_size, objective.period, mesh)
  steps = optim.count_steps(config, len(source))
  schedule, tx = optim.from_config(config.optim, steps)
  return Parts(mesh, source, codec, steps, objective, schedule, tx)


def make_model(
  config: Diffusion, image_size: tuple[int, int, int], num_classes: int, **attributes
) -> Network:
  """Builds the config's network for images (H, W, C), or for latents of that size.

  `attributes` take the place of the config's.
  """
  num_classes = num_classes if config.use_labels else 0
  attributes = {**dataclasses.asdict(config.model), **attributes}
  return models.make(image_size=image_size, num_classes=num_classes, **attributes)


def count_work(objective: Objective, mesh: Mesh) -> writers.Work:
  """Returns what a step asks of each device of the mesh; the codec's share is not counted."""
  model = objective.model
  batch = auto.batch_shapes(model, objective.batch_size)
  total = flops.train_step(objective, param_shapes(model), batch)
  peak = chips.peak_flops(mesh.devices.flat[0].device_kind, getattr(model, "dtype", "float32"))
  return writers.Work(total / mesh.size, peak)


def start_from(
  state: TrainState, init_from: str, config: Diffusion, model: Network
) -> tuple[TrainState, int]:
  """Returns the state with the weights of the run in `init_from`, and the step they are from."""
  params, step = load_params(init_from, config.init_weights)
  grids = grid(saved.open_run(init_from).model), grid(model)
  return transfer.adopt(state, params, config.init_fresh, grids), step


def run(
  parts: Parts,
  config: Diffusion,
  workdir: str,
  name: str,
  *,
  cache: str,
  init_from: str = "",
  wandb_key: str | None = None,
) -> dict:
  """Trains to the last step and returns the summary; resumes from the workdir's last checkpoint.

  Args:
    parts: what `prepare` returned for this config.
    config: a stage, see `trainers.config.records`.
    workdir: config, metrics, images and checkpoints go here.
    name: is printed in front of every line.
    cache: the folder that `prepare` was given.
    init_from: workdir of the run whose weights to start from; "" for none.
    wandb_key: API key of Weights & Biases.
  """
  say = logs.printer(name)
  init = functools.partial(init_params, parts.model)
  like = state_shapes(init, parts.tx, parts.mesh)

  def fresh() -> TrainState:
    """The state of a first start: random weights, or those of another run."""
    state = init_state(init, parts.tx, jax.random.key(config.seed), parts.mesh)
    if init_from:
      saved.check_same_vae(init_from, parts.codec.sha256)
      state, step = start_from(state, init_from, config, parts.model)
      say(f"started from {init_from}, step {step}, {config.init_weights} weights")
    return state

  say(objectives.describe(like.params, parts.streams, config.batch_size))
  if jax.process_index() == 0:
    about = saved.describe_model(parts.model, parts.codec, parts.source.class_names)
    folder.write_json(os.path.join(workdir, saved.ABOUT), about)
  training = loop.Training(
    like=like,
    fresh=fresh,
    step=optim.make_step(config, parts, like),
    source=parts.source,
    steps=parts.steps,
    evaluators=parts.evaluators,
    mesh=parts.mesh,
    max_skipped=config.guard.max_skipped,
    inspect=lambda state, step: diagnosis.inspect(parts, config, state.params, step, workdir),
    work=parts.work,
  )
  return loop.train(training, config, workdir, name, wandb_key)

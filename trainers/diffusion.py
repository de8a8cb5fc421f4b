"""Trains a masked-diffusion auto-encoder: MAE, UMD, DiT, MaskDiT, as its config's streams say."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import evaluators
from trainers import logs, optim, transfer
from trainers.loop import Loop, Training
from umd import data, models, objectives
from umd.codecs.codec import Codec
from umd.codecs.codec import make as make_codec
from umd.devices import chips, flops, memory
from umd.devices import mesh as sharding
from umd.devices.mesh import placed, state_shardings
from umd.devices.placement import LAYERS, on
from umd.models import MODELS
from umd.models.layers.blocks import REMAT
from umd.models.network import Network, grid, init_params, param_shapes
from umd.objectives import Objective, Stream
from umd.paths import make_path
from umd.runs import workdir as folder
from umd.runs import writers
from umd.runs.checkpoint import load_params
from umd.state import init_state
from umd.trained import saved
from umd.trained.inference import Inference

AUTO = "auto"
# Share of a device's memory that an estimate may fill: JAX takes three quarters of a GPU's.
USED = 0.7
UNROLLED = 12  # Layers of a stack that are not too long to compile one by one.


def needed(objective: Objective, mesh: Mesh, accumulate: int = 1) -> int:
  """Bytes that a step of training takes on a device, by `umd.devices.memory`; AdamW's state is counted."""
  shapes = param_shapes(objective.model)
  params = placed(shapes, state_shardings(shapes, mesh))
  batch = batch_shapes(objective.model, objective.batch_size // accumulate)
  with on(mesh):
    found = memory.residuals(objective, params, batch)
  told = memory.estimate(params, found, memory.nbytes(batch), mesh.size)
  return 4 * memory.on_device(params) + told.total  # Parameters, average and two moments.


def num_layers(model: Network) -> int:
  """The depth of the deepest stack of layers, whose parameters are stacked; 0 without one."""
  leaves = jax.tree_util.tree_leaves_with_path(param_shapes(model))
  in_layers = lambda path: any(getattr(key, "key", None) == LAYERS for key in path)
  return max((len(leaf) for path, leaf in leaves if in_layers(path)), default=0)


def batch_shapes(model: Network, rows: int) -> dict:
  """Shapes of a batch as the network sees it."""
  return {
    "image": jax.ShapeDtypeStruct((rows, *model.image_size), "float32"),
    "label": jax.ShapeDtypeStruct((rows,), "int32"),
  }


def settle(config: ConfigDict, build: Callable[[dict], Objective], mesh: Mesh) -> Objective:
  """The objective with what the config's model leaves to "auto" decided.

  Of what to keep for the backward pass the most that fits the device's memory, by estimate. Layers
  are unrolled unless they are many and all is computed again: only then a loop takes no more
  memory, and it compiles much faster.

  Where the memory is not known (a CPU), a loop that keeps products: it is as fast as unrolled
  layers that keep everything, takes less than half the memory and compiles faster
  (`benchmarks.train_step`). A loop that keeps everything is slower than either.

  Args:
    config: of the stage.
    build: makes the objective of a model with these attributes {scan, remat}.
    mesh: that it is to run on.
  """
  settings = {"scan": AUTO, "remat": AUTO, **config.model}
  scan, remat = settings["scan"], settings["remat"]
  capacity = chips.memory(mesh.devices.flat[0].device_kind)
  policies = [remat] if remat != AUTO else list(REMAT) if capacity else ["dots"]
  for policy in policies:
    found = build(dict(scan=scan == "true", remat=policy))
    if policy == policies[-1] or needed(found, mesh, config.accumulate) <= USED * capacity:
      break
  many = num_layers(found.model) > UNROLLED
  loop = many and policy == "full" if capacity else policy != "none"
  return build(dict(scan=True, remat=policy)) if scan == AUTO and loop else found


# What may change between two starts of one run without making it another run.
HARMLESS = (
  *("accumulate", "checkpoint", "data.max_bad", "evals", "fsdp", "log_every"),
  *("model.attention", "model.remat", "model.scan", "summary", "wandb"),
)


def make_model(config: ConfigDict, image_size: tuple[int, int, int], num_classes: int, **how):
  """The config's auto-encoder for images (H, W, C), or for latents of that size.

  `how` are attributes in place of the config's, see `trainers.diffusion`.
  """
  num_classes = num_classes if config.use_labels else 0
  settings = {**saved.as_it_runs(config.model.to_dict()), **how}
  return models.make(image_size=image_size, num_classes=num_classes, **settings)


def count_steps(config: ConfigDict, examples: int) -> int:
  """Length of the run: `steps`, or `epochs` over so many examples."""
  if (config.steps > 0) == (config.epochs > 0):
    raise ValueError(
      f"steps={config.steps} and epochs={config.epochs}: give one of them, and leave the other 0."
    )
  return config.steps or max(1, round(config.epochs * examples / config.batch_size))


class Parts(NamedTuple):
  """What a config stands for, before anything is computed."""

  mesh: Mesh
  source: data.Source
  codec: Codec
  model: Network
  steps: int
  streams: tuple[Stream, ...]
  objective: Objective
  schedule: Callable
  tx: optax.GradientTransformation
  evaluators: list[evaluators.Scheduled]
  work: writers.Work


def assemble(
  config: ConfigDict, mesh: Mesh, source: data.Source, codec: Codec, seen: tuple[int, int, int]
) -> Parts:
  """Model, objective and optimiser for what the model sees, (h, w, c); no evaluators yet.

  Of the source its number of classes counts, and its length where the run's is in epochs.
  """
  path, streams = (
    make_path(**config.path.to_dict()),
    objectives.make_streams(config.streams.to_dict()),
  )

  def build(how: dict) -> Objective:
    model = make_model(config, seen, source.num_classes, **how)
    return Objective(model, path, streams, config.batch_size, config.label_drop_prob)

  attributes = {field.name for field in dataclasses.fields(MODELS[config.model.name])}
  # A network without layers to loop over or to rematerialise leaves nothing open.
  objective = settle(config, build, mesh) if "remat" in attributes else build({})
  sharding.check_accumulates(config.accumulate, config.batch_size, objective.period, mesh)
  steps, settings = count_steps(config, len(source)), config.optim.to_dict()
  schedule = optim.make_schedule(settings.pop("lr"), steps, settings.pop("warmup"))
  tx = optim.make_optimizer(schedule, **settings)
  work = count_work(objective, mesh)
  return Parts(
    mesh, source, codec, objective.model, steps, streams, objective, schedule, tx, [], work
  )


def count_work(objective: Objective, mesh: Mesh) -> writers.Work:
  """What a step asks of each device of the mesh; the codec's share is not counted."""
  model = objective.model
  batch = batch_shapes(model, objective.batch_size)
  total = flops.train_step(objective, param_shapes(model), batch)
  kind = mesh.devices.flat[0].device_kind
  return writers.Work(total / mesh.size, chips.peak_flops(kind, getattr(model, "dtype", "float32")))


def prepare(config: ConfigDict, workdir: str, cache: str, init_from: str = "") -> Parts:
  """Builds everything that can be wrong; takes seconds, compiles and writes nothing.

  Raises:
    ValueError: a setting that makes no sense, a workdir that holds another run, or weights in
      `init_from` that do not fit.
    FileNotFoundError: data, the VAE's weights or the run in `init_from` are not there.
  """
  folder.check_same_run(workdir, config.to_dict(), HARMLESS)
  mesh = sharding.make_mesh(fsdp=config.fsdp)
  sharding.check_divides("batch_size", config.batch_size, mesh)
  sharding.check_divides("eval_batch_size", config.eval_batch_size, mesh)
  source = data.load(**config.data.to_dict())
  if config.use_labels and not source.num_classes:
    raise ValueError(f"use_labels=True, but {source.name!r} has no labels. Set use_labels=False.")
  codec = make_codec(config.latents.to_dict(), mesh)
  saved.check_same_vae(workdir, codec.sha256)
  parts = assemble(config, mesh, source, codec, codec.source_size("data", source))
  inference = Inference(parts.model, make_path(**config.path.to_dict()))
  shared = (inference, parts.streams, mesh, config.eval_batch_size, config.seed, cache)
  context = evaluators.Context(*shared, codec=codec)
  scheduled = evaluators.from_config(config.evals.to_dict(), context)
  if init_from:
    saved.check_same_vae(init_from, codec.sha256)
    saved.check_fits(init_from, param_shapes(parts.model), config.init_fresh)
  return parts._replace(evaluators=scheduled)


def start_from(state, init_from: str, config: ConfigDict, model: Network):
  """(state with the weights of the run in `init_from`, the step they are from)."""
  params, step = load_params(init_from, config.init_weights)
  grids = grid(saved.open_run(init_from).model), grid(model)
  return transfer.adopt(state, params, config.init_fresh, grids), step


def run(
  config: ConfigDict,
  workdir: str,
  name: str,
  *,
  cache: str,
  init_from: str = "",
  wandb_key: str | None = None,
) -> dict:
  """Trains to the last step and returns the summary; resumes from the workdir's last checkpoint.

  Args:
    config: see `configs/common.py`.
    workdir: config, metrics, images and checkpoints go here.
    name: shown in front of every line printed.
    cache: folder for what evaluators compute once.
    init_from: workdir of the run whose weights to start from; empty for none.
    wandb_key: API key of Weights & Biases.
  """
  say = logs.printer(name)
  parts = prepare(config, workdir, cache, init_from)
  loop = Loop(config, workdir, name)

  # State: new, started from another run, or the one that was interrupted.
  key = jax.random.key(config.seed)
  state = init_state(functools.partial(init_params, parts.model), parts.tx, key, parts.mesh)
  training = Training(config, parts, state, workdir)
  state = loop.restore(state)
  if not loop.step and init_from:
    state, init_step = start_from(state, init_from, config, parts.model)
    say(f"started from {init_from}, step {init_step}, {config.init_weights} weights")
  say(objectives.describe(state.params, parts.streams, config.batch_size))
  if jax.process_index() == 0:
    path = os.path.join(workdir, saved.ABOUT)
    about = saved.describe_model(parts.model, parts.codec, parts.source.class_names)
    folder.write_json(path, about)

  return loop.run(
    state,
    training,
    parts.source,
    parts.evaluators,
    parts.steps,
    pending=logs.StepMetrics(config.guard.max_skipped, training.inspect),
    mesh=parts.mesh,
    work=parts.work,
    wandb_key=wandb_key,
  )

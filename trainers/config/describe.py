"""Tells what a config would do, from all that is built before anything is computed or written."""

import dataclasses
import functools
import math
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from trainers import evaluate, kl_vae, linear_probe, stages
from trainers.config import records
from trainers.diffusion import Parts
from umd import data
from umd.codecs.codec import Latents, stored
from umd.codecs.vae import KLAutoEncoder
from umd.devices import flops
from umd.devices.memory import nbytes, on_device
from umd.devices.mesh import make_mesh, placed, state_shardings
from umd.models.network import (
  Network,
  feature_widths,
  init_params,
  num_tokens,
  param_shapes,
  predict,
)
from umd.objectives import Stream, num_visible, period, stream_rows
from umd.runs import checkpoint, integrity
from umd.runs import workdir as folder
from umd.state import TrainState, state_shapes
from umd.trained import saved

Rows = list[Sequence[str]]  # Of a table, headings first.
Section = tuple[str, list[str]]  # (title, lines).
PREFIXES = ("", "k", "M", "G", "T", "P")


# What is counted and measured.


def state_sizes(parts: Parts) -> TrainState:
  """Returns shapes and types of all that is trained and saved."""
  return state_shapes(functools.partial(init_params, parts.model), parts.tx)


def nbytes_of_device(tree, mesh) -> int:
  """Counts the bytes that one device of the mesh keeps of the arrays that the shapes stand for."""
  return on_device(placed(tree, state_shardings(tree, mesh)))


def _shapes(tree) -> list[Sequence[int]]:
  """Returns the shapes of arrays, or of what a checkpoint says of them."""
  return [leaf.shape for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape"))]


def count(params) -> int:
  """Counts parameters, from anything with shapes."""
  return sum(math.prod(shape) for shape in _shapes(params))


def parts(params: Mapping) -> Rows:
  """Makes a row for each part of a model (a name of `init_fresh`): its matrices, its parameters."""
  rows = [("part", "what", "parameters", "share")]
  for name, part in params.items():
    matrices, number = [shape for shape in _shapes(part) if len(shape) > 1], count(part)
    listed = len(matrices) <= 3
    what = ", ".join(map(_by, matrices or _shapes(part))) if listed else f"{len(matrices)} arrays"
    rows.append((name, what, f"{number:,}", f"{100 * number / count(params):.1f} %"))
  return rows


def streams(model: Network, streams: Sequence[Stream], batch_size: int) -> Rows:
  """Makes a row for each stream: its rows of the batch, what the model sees, what is scored."""
  size = period(streams, batch_size)
  rows = [("stream", "rows", "timesteps", "mask", "patches seen", "scored")]
  for s in streams:
    start, stop = stream_rows(s, size)
    terms = " + ".join(f"{t.weight:g} {t.head} on {t.where}" for t in s.terms.values())
    share = f"{(stop - start) * batch_size // size} of {batch_size}"
    seen = f"{num_visible(s, model)} of {num_tokens(model)}"
    rows.append((s.name, share, s.timesteps, f"{s.mask_ratio:g}", seen, terms))
  return rows


def compute(parts: Parts, batch_size: int) -> list[str]:
  """Says what a step of training takes: the model's products, and what encodes its images."""
  model, total = parts.model, parts.work.flops * parts.mesh.size
  image = lambda size: jax.ShapeDtypeStruct((1, *size), "float32")
  t = jax.ShapeDtypeStruct((1,), "int32")
  network = functools.partial(predict, model)
  evaluation = flops.count(network, param_shapes(model), image(model.image_size), t)
  lines = [
    f"{amount(total, 'FLOP')} a step, {amount(total / batch_size, 'FLOP')} an image",
    f"{amount(evaluation, 'FLOP')} a step of a sampler and image",
  ]
  if parts.work.peak:
    seconds = parts.work.flops / parts.work.peak
    lines.append(f"{seconds:.3g} s a step at {parts.work.peak / 1e12:.0f} TFLOP/s a device")
  if isinstance(parts.codec, Latents) and stored(parts.source) is None:
    encoder = KLAutoEncoder(parts.codec.architecture)
    encode = lambda params, image: encoder.apply({"params": params}, image, method="encode")
    number = flops.count(encode, parts.codec.params, image(parts.source.image_size))
    lines.append(f"{amount(number, 'FLOP')} an image to encode it, which MFU does not count")
  return lines


def times(every: int, steps: int) -> int:
  """Counts how often happens what is done every `every` steps (0: never) and after the last."""
  return -(-steps // every) if every else 1


# How it is written.


def amount(number: float, unit: str) -> str:
  """Writes a number with three digits and a prefix: (1234567, "B") -> "1.23 MB"."""
  power = 0
  while number >= 999.5 and power < len(PREFIXES) - 1:
    number, power = number / 1000, power + 1
  return f"{number:.3g} {PREFIXES[power]}{unit}"


def _by(sides: Sequence[int]) -> str:
  return " x ".join(map(str, sides))


def _settings(record, *without: str) -> str:
  """Writes the fields of a record: "wd=0.05, beta1=0.9"."""
  fields = records.to_dict(record).items()
  return ", ".join(f"{name}={value}" for name, value in fields if name not in without)


def _columns(rows: Rows) -> list[str]:
  """Writes rows as lines, with columns as wide as they must be; numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  is_number = lambda cell: re.fullmatch(r"[\d.,]+( %)?", cell)
  right = [all(map(is_number, column)) for column in zip(*rows[1:], strict=True)]
  cells = lambda row: (
    cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)
  )
  return ["  ".join(cells(row)).rstrip() for row in rows]


def _often(every: int, steps: int) -> str:
  number = times(every, steps)
  after = "after the last step"
  return after if not every or number == 1 else f"every {every:,} steps, {number} times"


def describe(config: ConfigDict, workdir: str | None) -> str:
  """Builds all stages as a start does, and describes them.

  Data is opened, and weights are looked for (and fetched, if need be) as at a start.

  Args:
    config: of one stage, or of several.
    workdir: of all stages; None describes a start in a new one.

  Raises:
    ValueError, FileNotFoundError: as a start would; or the config goes on from a run in the
      workdir, and none is given.
  """
  nowhere = os.path.join(tempfile.gettempdir(), f"none_{secrets.token_hex(8)}", "dry_run")
  place = workdir or nowhere
  plan = stages.plan(config, place)
  if workdir:
    folder.check_writable(workdir)
  else:
    _check_starts(plan)
  lines = []
  for stage in stages.build(plan, place):
    lines.append(f"[{stage.name}] trainer {stage.config.trainer}")
    place_of = f"{stage.folder}, {_progress(stage)}"
    where = place_of if workdir else "no --workdir: nothing that was trained is looked at"
    for title, texts in [("workdir", [where]), *SECTIONS[stage.config.trainer](stage, plan)]:
      titles = [title, *[""] * len(texts)]
      lines += [f"  {head:11}  {text}" for head, text in zip(titles, texts, strict=False)]
    lines.append("")
  return "\n".join([*lines, "dry run: nothing was written"])


def _check_starts(plan: Sequence[stages.StagePlan]) -> None:
  """Raises ValueError if a stage goes on from one that only a workdir can hold."""
  names = [saved.STAGE + stage.name for stage in plan]
  for name, stage, _ in plan:
    if stage.init_from.startswith(saved.STAGE) and stage.init_from not in names:
      raise ValueError(
        f"{name}.init_from={stage.init_from!r} is a run in the workdir. Give --workdir, too."
      )


# The sections of a stage.


def _progress(stage: stages.Built) -> str:
  if stage.summary:
    return f"finished at step {stage.summary['step']}"
  checkpoints = os.path.join(stage.folder, checkpoint.FOLDER)
  steps = integrity.steps(checkpoints) if folder.exists(checkpoints) else []
  return f"goes on from step {steps[0]}" if steps else "new"


def _devices(mesh, **batches: int) -> Section:
  processes = jax.process_count()
  of_processes = f"{processes} process" + "es" * (processes > 1)
  kind = mesh.devices.flat[0].device_kind
  lines = [f"{mesh.size} x {kind}, {of_processes}; mesh {dict(mesh.shape)}"]
  lines += [f"{key}={n}: {n // mesh.size} rows on each device" for key, n in batches.items()]
  return "devices", lines


def _data(title: str, source: data.Source) -> Section:
  classes = f"{source.num_classes} classes" if source.num_classes else "no labels"
  size = _by(source.image_size)
  lines = [f"{source.name}: {len(source):,} images, {size}, {classes}"]
  return title, [*lines, source.pp or "no preprocessing"]


def _start(stage: stages.Built, plan: Sequence[stages.StagePlan]) -> Section:
  """Says where the weights come from."""
  if not stage.init_from:
    return "starts from", ["random weights"]
  earlier = {where: f"the stage {name!r} of this command" for name, _, where in plan}
  source = earlier.get(stage.init_from, f"the run in {stage.init_from}")
  fresh = ", ".join(getattr(stage.config, "init_fresh", ()))
  but = f"; afresh: {fresh}" if fresh else ""
  return "starts from", [f"{source}, {stage.config.init_weights} weights{but}"]


def _model(model: Network, params: Mapping) -> Section:
  attributes = {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.name not in ("parent", "name", "image_size", "heads")
  }
  lines = [
    f"{type(model).__name__}: {_by(model.image_size)} in {num_tokens(model)} patches of "
    f"{model.patch} x {model.patch}; heads {', '.join(model.heads)}",
    ", ".join(f"{name}={value}" for name, value in attributes.items()),
    *_columns(parts(params)),
    f"{count(params) / 1e6:.2f}M parameters",
  ]
  return "model", lines


def _memory(state: TrainState, fsdp: int, mesh) -> Section:
  trees = {"parameters": state.params, "average": state.ema_params, "optimiser": state.opt_state}
  each = ", ".join(f"{name} {amount(nbytes(tree), 'B')}" for name, tree in trees.items())
  on_one, shares = amount(nbytes_of_device(state, mesh), "B"), mesh.devices.shape[-1]
  return "state", [
    f"{amount(nbytes(state), 'B')}: {each}",
    f"{on_one} of it on each device (fsdp={fsdp}: {shares} of {mesh.size} share one copy); "
    "gradients and activations come on top",
  ]


def _length(config: records.Steps, steps: int, images: int) -> Section:
  epochs = steps * config.batch_size / images
  return "length", [f"{steps:,} steps of {config.batch_size} images, {epochs:.4g} epochs"]


def _optimiser(config: records.Diffusion, steps: int) -> Section:
  warmup = int(config.optim.warmup * steps)
  lines = [
    f"AdamW, learning rate 0 to {config.optim.lr:g} in {warmup:,} steps, then cosine to 0",
    f"{_settings(config.optim, 'lr', 'warmup')}; ema_decay={config.ema_decay:g}",
  ]
  if config.use_labels:
    lines.append(f"labels are shown, {100 * config.label_drop_prob:g} % of them dropped")
  return "optimiser", lines


def _evaluations(evals: Mapping[str, Mapping], steps: int | None) -> Iterator[Section]:
  """Says what is evaluated, how often (once if `steps` is None) and on what; how samples are drawn.

  Args:
    evals: {name: settings}, as dicts.
    steps: of the run.
  """
  rows, samples = [("name", "type", "when", "on")], []
  spec = lambda value: value if isinstance(value, str) else f"{value['name']}:{value['split']}"
  for name, settings in evals.items():
    when = "once" if steps is None else _often(settings["every"], steps)
    looks_at = [f"{k} {spec(settings[k])}" for k in ("data", "train", "test") if settings.get(k)]
    if number := settings.get("num"):
      looks_at.insert(0, f"{number:,} {'samples' if 'sampling' in settings else 'images'}")
    rows.append((name, settings["type"], when, "; ".join(looks_at)))
    if sampling := settings.get("sampling"):
      drawn = ", ".join(f"{key}={value}" for key, value in sampling.items())
      reference = settings["reference"] and f", against {spec(settings['reference'])}"
      samples.append(f"{name}: {drawn}; judged by {settings['features']}{reference or ''}")
  yield "evaluation", _columns(rows) if evals else ["none"]
  if samples:
    yield "samples", samples


def _checkpoints(saving: records.Saving, steps: int, size: int) -> Section:
  if not saving.every:
    return "checkpoints", ["none: nothing can be resumed or started from"]
  kept = f"the newest {saving.keep}"
  kept += f", every {saving.keep_every:,} steps" if saving.keep_every else ""
  kept += f", the best by {saving.best}" if saving.best else ""
  often = _often(saving.every, steps)
  return "checkpoints", [f"{often}; kept: {kept}; {amount(size, 'B')} each"]


def _latents(config: records.LatentSpace, parts: Parts) -> Section:
  seen, weights = parts.model.image_size, amount(nbytes(parts.codec.params), "B")
  line = (
    f"{_by(seen)} of images of {_by(parts.codec.pixel_size(seen))}; VAE {config.vae}, SHA-256 "
    f"{parts.codec.sha256[:12]}, {weights} on each device, frozen"
  )
  return "latents", [line]


# The sections of each trainer, in order.


def _diffusion(stage: stages.Built, plan: Sequence[stages.StagePlan]) -> Iterator[Section]:
  config, parts, state = stage.config, stage.parts, state_sizes(stage.parts)
  batch, eval_batch = config.batch_size, config.eval_batch_size
  yield _devices(parts.mesh, batch_size=batch, eval_batch_size=eval_batch)
  yield _data("data", parts.source)
  if config.latents:
    yield _latents(config.latents, parts)
  yield _start(stage, plan)
  yield _model(parts.model, state.params)
  yield _memory(state, config.fsdp, parts.mesh)
  yield "streams", _columns(streams(parts.model, parts.streams, batch))
  yield "compute", compute(parts, batch)
  yield _length(config, parts.steps, len(parts.source))
  yield _optimiser(config, parts.steps)
  yield from _evaluations(records.to_dict(config.evals), parts.steps)
  yield _checkpoints(config.checkpoint, parts.steps, nbytes(state))


def _evaluate(stage: stages.Built, plan: Sequence[stages.StagePlan]) -> Iterator[Section]:
  evals = records.to_dict(stage.config.evals)
  yield _devices(make_mesh(), eval_batch_size=stage.config.eval_batch_size)
  yield _start(stage, plan)
  if stage.parts:
    run = stage.parts[0]
    evals = evaluate.settings(stage.config, run)
    yield _model(run.model, checkpoint.param_shapes(run.folder))
  yield from _evaluations(evals, None)


def _linear_probe(stage: stages.Built, plan: Sequence[stages.StagePlan]) -> Iterator[Section]:
  config, parts = stage.config, stage.parts
  heads = f"{len(config.lrs)} learning rates x timesteps {config.timesteps}, a head each"
  yield _devices(make_mesh(), batch_size=config.batch_size, eval_batch_size=config.eval_batch_size)
  yield _start(stage, plan)
  if parts is None:
    yield "heads", [f"{heads}; the rest follows from the run"]
    return
  width, classes = feature_widths(parts.run.model)["class"], parts.train.num_classes
  states = jax.eval_shape(linear_probe.init_heads(config, width, classes), jax.random.key(0))
  yield _model(parts.run.model, checkpoint.param_shapes(parts.run.folder))
  yield _data("data", parts.train)
  for name, source in parts.held_out.items():
    yield _data(name, source)
  yield "heads", [f"{heads}: {width} x {classes}; {amount(nbytes(states), 'B')}"]
  yield _length(config, parts.steps, len(parts.train))
  rates, warmup = ", ".join(f"{lr:g}" for lr in config.lrs), int(config.warmup * parts.steps)
  rates = f"learning rates 0 to {rates} in {warmup:,} steps"
  yield "optimiser", [f"LARS, {rates}, then cosine to 0; wd={config.wd:g}"]
  yield "evaluation", [f"on select and test, {_often(config.eval_every, parts.steps)}"]
  yield _checkpoints(config.checkpoint, parts.steps, nbytes(states))


def _kl_vae(stage: stages.Built, plan: Sequence[stages.StagePlan]) -> Iterator[Section]:
  config, parts = stage.config, stage.parts
  params = jax.eval_shape(kl_vae.init_params(parts.model), jax.random.key(0))
  yield _devices(parts.mesh, batch_size=config.batch_size)
  yield _data("data", parts.source)
  yield _data("test", parts.test)
  yield "model", [kl_vae.describe(params, parts.model, parts.source.image_size)]
  yield _length(config, parts.steps, len(parts.source))
  yield "evaluation", [f"on test, {_often(config.eval_every, parts.steps)}"]


SECTIONS = {
  "diffusion": _diffusion,
  "evaluate": _evaluate,
  "linear_probe": _linear_probe,
  "kl_vae": _kl_vae,
}

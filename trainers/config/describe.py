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

from trainers import evaluate, kl_vae, linear_probe, logs, stages
from trainers.config import check
from trainers.config.schema import PARTS
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


def state_sizes(parts: Parts) -> TrainState:
  """Shapes and types of all that is trained and saved."""
  return state_shapes(functools.partial(init_params, parts.model), parts.tx)


def nbytes_of_device(tree, mesh) -> int:
  """Bytes of the arrays that a tree of shapes stands for which one device of the mesh keeps."""
  return on_device(placed(tree, state_shardings(tree, mesh)))


def text(number: float) -> str:
  """1234567 (bytes) -> "1.23 MB"."""
  units = ["B", "kB", "MB", "GB", "TB"]
  while number >= 999.5 and len(units) > 1:
    number, units = number / 1000, units[1:]
  return f"{number:.3g} {units[0]}"


def _shapes(tree) -> list[Sequence[int]]:
  """Of anything with shapes: arrays, or what a checkpoint says of them."""
  return [leaf.shape for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape"))]


def count(params) -> int:
  """Number of parameters, from anything with shapes."""
  return sum(math.prod(shape) for shape in _shapes(params))


def _matrices(params) -> str:
  """The shapes of a part's matrices, or of its vectors if it has no others."""
  shapes = [shape for shape in _shapes(params) if len(shape) > 1] or _shapes(params)
  return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def parts(model: Network, params: Mapping) -> Rows:
  """A row for each part of a model (those of `init_fresh`): what it is, its number of parameters.

  Args:
    model: the auto-encoder.
    params: its parameters, or anything with their shapes.
  """
  total = count(params)
  rows = [("part", "what", "parameters", "share")]
  for name in [*(p for p in PARTS if p in params), *sorted(params.keys() - {*PARTS})]:
    number, what = count(params[name]), _matrices(params[name])
    rows.append((name, what, f"{number:,}", f"{100 * number / total:.1f} %"))
  return rows


def streams(model: Network, streams: Sequence[Stream], batch_size: int) -> Rows:
  """A row for each stream: what of the batch it gets, what the model sees, and what is scored."""
  size = period(streams, batch_size)
  rows = [("stream", "rows", "timesteps", "mask", "patches seen", "scored")]
  for s in streams:
    start, stop = stream_rows(s, size)
    rows.append(
      (
        s.name,
        f"{(stop - start) * batch_size // size} of {batch_size}",
        s.timesteps,
        f"{s.mask_ratio:g}",
        f"{num_visible(s, model)} of {num_tokens(model)}",
        " + ".join(f"{t.weight:g} {t.head} on {t.where}" for t in s.terms.values()),
      )
    )
  return rows


def operations(number: float) -> str:
  """1.234e9 -> "1.23 GFLOP"."""
  units = ["MFLOP", "GFLOP", "TFLOP", "PFLOP"]
  number /= 1e6
  while number >= 999.5 and len(units) > 1:
    number, units = number / 1000, units[1:]
  return f"{number:.3g} {units[0]}"


def compute(parts: Parts, batch_size: int) -> list[str]:
  """What a step of training takes, as lines: the model's products, and what encodes its images."""
  model, total = parts.model, parts.work.flops * parts.mesh.size
  image = jax.ShapeDtypeStruct((1, *model.image_size), "float32")
  t = jax.ShapeDtypeStruct((1,), "int32")
  evaluation = flops.count(functools.partial(predict, model), param_shapes(model), image, t)
  lines = [
    f"{operations(total)} a step, {operations(total / batch_size)} an image",
    f"{operations(evaluation)} a step of a sampler and image",
  ]
  if parts.work.peak:
    seconds = parts.work.flops / parts.work.peak
    lines.append(f"{seconds:.3g} s a step at {parts.work.peak / 1e12:.0f} TFLOP/s a device")
  if isinstance(parts.codec, Latents) and stored(parts.source) is None:
    encoder = KLAutoEncoder(parts.codec.architecture)
    image = jax.ShapeDtypeStruct((1, *parts.source.image_size), "float32")
    encode = lambda params, image: encoder.apply({"params": params}, image, method="encode")
    encode = flops.count(encode, parts.codec.params, image)
    lines.append(f"{operations(encode)} an image to encode it, which MFU does not count")
  return lines


NO_WORKDIR = "no --workdir: nothing that was trained is looked at"


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
  for remark in check.validate(config, place):
    logs.printer("config")(remark)
  plan = stages.stages(config, place)
  if workdir:
    folder.check_writable(workdir)
  else:
    _check_starts(plan)
  told = []
  for stage in stages.build(plan, place):
    where = f"{stage.folder}, {_progress(stage)}" if workdir else NO_WORKDIR
    told += [f"[{stage.name}] trainer {stage.config.trainer}", *_section("workdir", [where])]
    told += [line for part in DESCRIBE[stage.config.trainer](stage, plan) for line in part] + [""]
  return "\n".join([*told, "dry run: nothing was written"])


def _check_starts(plan) -> None:
  """Raises ValueError if a stage goes on from one that only a workdir can hold."""
  names = [saved.STAGE + name for name, _, _ in plan]
  for name, stage, _ in plan:
    if stage.init_from.startswith(saved.STAGE) and stage.init_from not in names:
      raise ValueError(
        f"{name}.init_from={stage.init_from!r} is a run in the workdir. Give --workdir, too."
      )


def _progress(stage: stages.Built) -> str:
  if stage.summary:
    return f"finished at step {stage.summary['step']}"
  checkpoints = os.path.join(stage.folder, checkpoint.FOLDER)
  steps = integrity.steps(checkpoints) if folder.exists(checkpoints) else []
  return f"goes on from step {steps[0]}" if steps else "new"


def _section(title: str, lines: Sequence[str]) -> list[str]:
  return [f"  {title if not i else '':11}  {line}" for i, line in enumerate(lines)]


def _by(sides: Sequence[int]) -> str:
  return " x ".join(map(str, sides))


def _columns(rows: Rows) -> list[str]:
  """Rows as lines, with columns as wide as they must be; numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  is_number = lambda cell: re.fullmatch(r"[\d.,]+( %)?", cell)
  right = [all(map(is_number, column)) for column in zip(*rows[1:], strict=True)]
  cells = lambda row: (
    cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)
  )
  return ["  ".join(cells(row)).rstrip() for row in rows]


def times(every: int, steps: int) -> int:
  """How often happens what is done every `every` steps (0: never) and after the last."""
  return -(-steps // every) if every else 1


def _often(every: int, steps: int) -> str:
  number = times(every, steps)
  after = "after the last step"
  return after if not every or number == 1 else f"every {every:,} steps, {number} times"


def _devices(mesh, batches: Mapping[str, int]) -> list[str]:
  device, processes = mesh.devices.flat[0], jax.process_count()
  lines = [
    f"{mesh.size} x {device.device_kind}, {processes} process{'es' * (processes > 1)}; mesh "
    f"{dict(mesh.shape)}"
  ]
  lines += [f"{key}={n}: {n // mesh.size} rows on each device" for key, n in batches.items()]
  return _section("devices", lines)


def _data(title: str, source: data.Source) -> list[str]:
  classes = f"{source.num_classes} classes" if source.num_classes else "no labels"
  return _section(
    title,
    [
      f"{source.name}: {len(source):,} images, {_by(source.image_size)}, {classes}",
      source.pp or "no preprocessing",
    ],
  )


def _length(config: ConfigDict, steps: int, images: int) -> list[str]:
  epochs = steps * config.batch_size / images
  return _section("length", [f"{steps:,} steps of {config.batch_size} images, {epochs:.4g} epochs"])


def _attributes(model: Network) -> dict:
  """The attributes of a network beside those of the protocol."""
  names = [field.name for field in dataclasses.fields(model)]
  known = {*Network.__annotations__, "parent", "name"}
  return {name: getattr(model, name) for name in names if name not in known}


def _model(model: Network, params: Mapping) -> list[str]:
  lines = [
    f"{type(model).__name__}: {_by(model.image_size)} in {num_tokens(model)} patches of "
    f"{model.patch} x {model.patch}; heads {', '.join(model.heads)}",
    ", ".join(f"{name}={value}" for name, value in _attributes(model).items()),
    *_columns(parts(model, params)),
    f"{count(params) / 1e6:.2f}M parameters",
  ]
  return _section("model", lines)


def _memory(state: TrainState, config: ConfigDict, mesh) -> list[str]:
  parts = dict(parameters=state.params, average=state.ema_params, optimiser=state.opt_state)
  each = ", ".join(f"{name} {text(nbytes(tree))}" for name, tree in parts.items())
  on_one, shares = text(nbytes_of_device(state, mesh)), mesh.devices.shape[-1]
  lines = [
    f"{text(nbytes(state))}: {each}",
    f"{on_one} of it on each device (fsdp={config.fsdp}: {shares} of {mesh.size} share one copy); "
    "gradients and activations come on top",
  ]
  return _section("state", lines)


def _optimiser(config: ConfigDict, steps: int) -> list[str]:
  o = config.optim
  lines = [
    f"AdamW, learning rate 0 to {o.lr:g} in {int(o.warmup * steps):,} steps, then cosine to 0",
    f"wd={o.wd:g}, beta1={o.beta1:g}, beta2={o.beta2:g}, clip_norm={o.clip_norm:g}, "
    f"mu_dtype={o.mu_dtype}; ema_decay={config.ema_decay:g}",
  ]
  if config.use_labels:
    lines.append(f"labels are shown, {100 * config.label_drop_prob:g} % of them dropped")
  return _section("optimiser", lines)


def _spec(spec: Mapping | str) -> str:
  return spec if isinstance(spec, str) else f"{spec['name']}:{spec['split']}"


def _looks_at(settings: Mapping) -> str:
  given = [f"{k} {_spec(settings[k])}" for k in ("data", "train", "test") if settings.get(k)]
  if number := settings.get("num"):
    given.insert(0, f"{number:,} {'samples' if 'sampling' in settings else 'images'}")
  return "; ".join(given)


def _evaluations(evals: Mapping[str, Mapping], steps: int | None) -> list[str]:
  """What is evaluated, how often (once if `steps` is None) and on what; how samples are drawn."""
  rows, samples = [("name", "type", "when", "on")], []
  for name, settings in evals.items():
    when = "once" if steps is None else _often(settings["every"], steps)
    rows.append((name, settings["type"], when, _looks_at(settings)))
    if "sampling" in settings:
      order = lambda key: (key != "sampler", key != "steps", key)
      how = ", ".join(
        f"{k}={settings['sampling'][k]}" for k in sorted(settings["sampling"], key=order)
      )
      judge = settings.get("features", "classifier")
      reference = f", against {_spec(settings['reference'])}" if settings.get("reference") else ""
      samples.append(f"{name}: {how}; judged by {judge}{reference}")
  lines = _section("evaluation", _columns(rows) if evals else ["none"])
  return lines + _section("samples", samples)


def _checkpoints(config: ConfigDict, steps: int, size: int) -> list[str]:
  c = config.checkpoint
  if not c.every:
    return _section("checkpoints", ["none: nothing can be resumed or started from"])
  kept = f"the newest {c.keep}" + f", every {c.keep_every:,} steps" * bool(c.keep_every)
  kept += f", the best by {c.best}" * bool(c.best)
  return _section("checkpoints", [f"{_often(c.every, steps)}; kept: {kept}; {text(size)} each"])


def _start(stage: stages.Built, plan) -> list[str]:
  """Where the weights come from."""
  if not stage.init_from:
    return _section("starts from", ["random weights"])
  earlier = {where: name for name, _, where in plan}
  if stage.init_from in earlier:
    source = f"the stage {earlier[stage.init_from]!r} of this command"
  else:
    source = f"the run in {stage.init_from}"
  fresh = ", ".join(stage.config.get("init_fresh", ()))
  but = f"; afresh: {fresh}" if fresh else ""
  return _section("starts from", [f"{source}, {stage.config.init_weights} weights{but}"])


def _latents(settings: Mapping, parts) -> str:
  seen, weights = parts.model.image_size, parts.codec.params
  return (
    f"{_by(seen)} of images of {_by(parts.codec.pixel_size(seen))}; VAE {settings['vae']}, SHA-256 "
    f"{parts.codec.sha256[:12]}, {text(nbytes(weights))} on each device, frozen"
  )


def _diffusion(stage: stages.Built, plan) -> Iterator[list[str]]:
  config, parts = stage.config, stage.parts
  state, batch = state_sizes(parts), config.batch_size
  yield _devices(parts.mesh, dict(batch_size=batch, eval_batch_size=config.eval_batch_size))
  yield _data("data", parts.source)
  if config.latents:
    yield _section("latents", [_latents(config.latents, parts)])
  yield _start(stage, plan)
  yield _model(parts.model, state.params)
  yield _memory(state, config, parts.mesh)
  yield _section("streams", _columns(streams(parts.model, parts.streams, batch)))
  yield _section("compute", compute(parts, batch))
  yield _length(config, parts.steps, len(parts.source))
  yield _optimiser(config, parts.steps)
  yield _evaluations(config.evals.to_dict(), parts.steps)
  yield _checkpoints(config, parts.steps, nbytes(state))


def _evaluate(stage: stages.Built, plan) -> Iterator[list[str]]:
  config, evals = stage.config, stage.config.evals.to_dict()
  yield _devices(make_mesh(), dict(eval_batch_size=config.eval_batch_size))
  yield _start(stage, plan)
  if stage.parts:
    run = stage.parts[0]
    evals = evaluate.settings(config, run)
    yield _model(run.model, checkpoint.param_shapes(run.folder))
  yield _evaluations(evals, None)


def _linear_probe(stage: stages.Built, plan) -> Iterator[list[str]]:
  config, parts = stage.config, stage.parts
  batches = dict(batch_size=config.batch_size, eval_batch_size=config.eval_batch_size)
  heads = f"{len(config.lrs)} learning rates x timesteps {tuple(config.timesteps)}, a head each"
  yield _devices(make_mesh(), batches)
  yield _start(stage, plan)
  if parts is None:
    yield _section("heads", [f"{heads}; the rest follows from the run"])
    return
  width, classes = feature_widths(parts.run.model)["class"], parts.train.num_classes
  states = jax.eval_shape(linear_probe.init_heads(config, width, classes), jax.random.key(0))
  yield _model(parts.run.model, checkpoint.param_shapes(parts.run.folder))
  yield _data("data", parts.train)
  for name, source in parts.held_out.items():
    yield _data(name, source)
  yield _section("heads", [f"{heads}: {width} x {classes}; {text(nbytes(states))}"])
  yield _length(config, parts.steps, len(parts.train))
  rates = ", ".join(f"{lr:g}" for lr in config.lrs)
  warmup = int(config.warmup * parts.steps)
  yield _section(
    "optimiser",
    [f"LARS, learning rates 0 to {rates} in {warmup:,} steps, then cosine to 0; wd={config.wd:g}"],
  )
  yield _section("evaluation", [f"on select and test, {_often(config.eval_every, parts.steps)}"])
  yield _checkpoints(config, parts.steps, nbytes(states))


def _kl_vae(stage: stages.Built, plan) -> Iterator[list[str]]:
  config, parts = stage.config, stage.parts
  params = jax.eval_shape(kl_vae.init_params(parts.model), jax.random.key(0))
  yield _devices(parts.mesh, dict(batch_size=config.batch_size))
  yield _data("data", parts.source)
  yield _data("test", parts.test)
  yield _section("model", [kl_vae.describe(params, parts.model, parts.source.image_size)])
  yield _length(config, parts.steps, len(parts.source))
  yield _section("evaluation", [f"on test, {_often(config.eval_every, parts.steps)}"])


DESCRIBE = {
  "diffusion": _diffusion,
  "evaluate": _evaluate,
  "linear_probe": _linear_probe,
  "kl_vae": _kl_vae,
}

"""Trains linear classifiers on the frozen representation of a trained auto-encoder.

The protocol is MAE's (He et al. 2022, app. A.2): batch normalisation without affine parameters, one
dense layer, LARS. A grid of learning rates, and features of clean and of noised images, train at
once on one pass through the encoder.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

import evaluators
from trainers import logs, optim
from trainers.diffusion import count_steps
from trainers.loop import Loop
from umd import data
from umd.codecs.codec import Codec, encode_batch
from umd.devices import mesh as sharding
from umd.metrics import linear_probe
from umd.models.network import feature_widths
from umd.runs import workdir as folder
from umd.runs.checkpoint import load_params
from umd.samplers.keys import example_keys
from umd.trained import saved
from umd.trained.inference import Inference

HARMLESS = ("checkpoint", "data.max_bad", "eval_every", "log_every", "summary", "wandb")
STATISTICS = ("top1", "top5")


def run(
  config: ConfigDict,
  workdir: str,
  name: str,
  *,
  cache: str,
  init_from: str = "",
  wandb_key: str | None = None,
) -> dict:
  """Trains the heads to the last step and returns the summary; resumes as the auto-encoder does.

  Logs, for every timestep, "probe/top1/t<t>" and "probe/top5/t<t>" on the test split of the head
  that is best on the `select` split, its learning rate "probe/lr/t<t>", and
  "probe/select/t<t>/lr<lr>" of all heads.
  Arguments as in `trainers.diffusion.run`.
  """
  say = logs.printer(name)
  prepare(config, workdir, cache)
  parts = _build(config, sharding.make_mesh(), init_from)
  mesh, trained, codec, train, held_out, steps, schedule = parts
  loop = Loop(config, workdir, name)
  params, run_step = load_params(trained.folder, config.init_weights)
  params = sharding.replicate(params, mesh)
  width, classes = feature_widths(trained.model)["class"], train.num_classes
  init = init_heads(config, width, classes)
  everywhere = sharding.replicated(mesh)
  states = jax.jit(init, out_shardings=everywhere)(jax.random.key(config.seed))
  states = loop.restore(states)
  step_fn = make_step(trained.inference, codec, config, schedule, mesh)
  say(
    f"probes {trained.folder}, step {run_step}, {config.init_weights} weights: {classes} classes, "
    f"{len(config.lrs)} learning rates x timesteps {tuple(config.timesteps)}"
  )
  size = config.eval_batch_size
  context = evaluators.Context(
    trained.inference, trained.streams, mesh, size, config.seed, cache, codec=codec
  )
  judge, weights = make_judge(context, config), context.weights(params)

  def evaluate(states):
    found = {part: judge(weights, states, source) for part, source in held_out.items()}
    for t in timestep_names(config):
      chosen = int(found["select"][t]["top1"].argmax())
      yield from ((f"{s}/{t}", found["test"][t][s][chosen]) for s in STATISTICS)
      yield f"lr/{t}", config.lrs[chosen]
      for lr, accuracy in zip(config.lrs, found["select"][t]["top1"], strict=True):
        yield f"select/{t}/lr{lr:g}", accuracy

  return loop.run(
    states,
    lambda states, batch: step_fn(states, weights, batch),
    train,
    [evaluators.Scheduled("probe", config.eval_every, evaluate)],
    steps,
    pending=logs.StepMetrics(),
    mesh=mesh,
    wandb_key=wandb_key,
  )


class Parts(NamedTuple):
  """What a config stands for, before anything is computed."""

  mesh: Mesh
  run: saved.Run
  codec: Codec
  train: data.Source
  held_out: dict[str, data.Source]
  steps: int
  schedule: Callable


def prepare(config: ConfigDict, workdir: str, cache: str, init_from: str = "") -> Parts | None:
  """Builds everything that can be wrong; computes and writes nothing.

  Without `init_from`, where the run is yet to be trained, it checks the settings and returns None.

  Raises:
    ValueError: a setting that makes no sense, or a run that is not what `config.expected` says.
    FileNotFoundError: there is no trained run, or no data.
  """
  folder.check_same_run(workdir, config.to_dict(), HARMLESS)
  mesh = sharding.make_mesh()
  sharding.check_divides("batch_size", config.batch_size, mesh)
  sharding.check_divides("eval_batch_size", config.eval_batch_size, mesh)
  if not config.lrs or min(config.lrs) <= 0:
    raise ValueError(f"lrs={config.lrs} must be at least one positive learning rate.")
  return _build(config, mesh, init_from) if init_from else None


def _build(config: ConfigDict, mesh: Mesh, init_from: str) -> Parts:
  run = saved.open_run(init_from)
  saved.check_expected(run, config.expected.to_dict())
  train = data.load(**config.data.to_dict())
  held_out = {name: data.load(**config[name].to_dict()) for name in ("select", "test")}
  codec = run.open_codec(mesh)
  for key, source in {"data": train, **held_out}.items():
    seen = codec.source_size(key, source)
    if seen != run.model.image_size or not source.num_classes:
      raise ValueError(
        f"{source.name!r} has images of {source.image_size} and {source.num_classes} classes; the "
        f"probe needs labels and the encoder's {codec.pixel_size(run.model.image_size)}. Choose "
        "size= or dataset=."
      )
    if source.num_classes != train.num_classes:
      raise ValueError(
        f"{source.name!r} has {source.num_classes} classes, {train.name!r} has "
        f"{train.num_classes}. Name data with the same classes."
      )
  timesteps = run.inference.path.timesteps
  if bad := [t for t in config.timesteps if not 0 <= t <= timesteps]:
    raise ValueError(f"timesteps={bad} must be in [0, {timesteps}].")
  steps = count_steps(config, len(train))
  schedule = optim.make_schedule(1.0, steps, config.warmup)
  return Parts(mesh, run, codec, train, held_out, steps, schedule)


def make_step(
  inference: Inference, codec: Codec, config: ConfigDict, schedule: Callable, mesh: Mesh
) -> Callable:
  """Builds the jitted `step(states, weights, batch) -> (states, metrics)`, a state per timestep."""
  lrs = jnp.asarray(config.lrs, jnp.float32)

  def step(states, weights, batch):
    any_state = next(iter(states.values()))
    key = jax.random.fold_in(jax.random.key(config.seed), any_state.step)
    seen = encode_batch(codec, weights.codec, batch, key)["image"]
    new, values = {}, {"lr": schedule(any_state.step)}
    for name, t in timestep_names(config).items():
      keys = jax.random.split(jax.random.fold_in(key, t), len(batch["label"]))
      features = inference.represent(weights.model, seen, keys, t)["class"]
      new[name], losses = linear_probe.train_probe(
        states[name], features, batch["label"], lrs * schedule(any_state.step), config.wd
      )
      values |= {f"loss/{name}/lr{lr:g}": losses[i] for i, lr in enumerate(config.lrs)}
    values["loss"] = jnp.stack([v for k, v in values.items() if k.startswith("loss/")]).min()
    return new, values

  everywhere, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(everywhere, everywhere, rows),
    out_shardings=(everywhere, everywhere),
  )


def timestep_names(config: ConfigDict) -> dict[str, int]:
  """{"t0": 0, "t50": 50}."""
  return {f"t{t}": t for t in config.timesteps}


def init_heads(config: ConfigDict, width: int, classes: int) -> Callable:
  """`init(key) -> states`: the heads of every learning rate, a state per timestep."""
  return lambda key: {
    t: linear_probe.init_probe(key, len(config.lrs), width, classes, config.wd)
    for t in timestep_names(config)
  }


def make_judge(context: evaluators.Context, config: ConfigDict) -> Callable:
  """Builds `judge(weights, states, source) -> {timestep: {statistic: [accuracy of each head]}}`."""

  def count(inputs, batch):
    weights, states = inputs
    seen, out = context.see(weights, batch), {}
    for name, t in timestep_names(config).items():
      keys = example_keys(config.seed, batch["index"])
      features = context.inference.represent(weights.model, seen, keys, t)["class"]
      logits = linear_probe.predict(states[name], features)
      for statistic in STATISTICS:
        k = min(int(statistic.removeprefix("top")), logits.shape[-1])
        out[f"{name}/{statistic}"] = linear_probe.hits(logits, batch["label"], k)
    return out

  count = context.jit(count)

  def judge(weights, states, source):
    found = context.map(count, (weights, states), source)
    shares = {name: hits.mean(axis=0) for name, hits in found.items()}
    return {t: {s: shares[f"{t}/{s}"] for s in STATISTICS} for t in timestep_names(config)}

  return judge

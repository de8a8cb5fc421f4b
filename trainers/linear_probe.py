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

import evaluators
from trainers import logs, loop, optim
from trainers.config.records import LinearProbe, given, to_dict
from umd import data
from umd.codecs.codec import Codec, encode_batch
from umd.devices import mesh as sharding
from umd.metrics import linear_probe
from umd.models.network import feature_widths
from umd.runs import workdir as folder
from umd.samplers.keys import example_keys
from umd.trained import saved

HARMLESS = ("checkpoint", "data.max_bad", "eval_every", "log_every", "summary", "wandb")
STATISTICS = {"top1": 1, "top5": 5}


class Parts(NamedTuple):
  """What a config stands for, before anything is computed.

  Attributes:
    mesh: all devices.
    run: the trained run whose representation is probed.
    codec: what it sees images through.
    train: the data to train on.
    held_out: {"select": to choose a learning rate on, "test": to report}.
    steps: the number of the last step.
    schedule: by step, the share that is taken of every head's learning rate.
  """

  mesh: Mesh
  run: saved.TrainedRun
  codec: Codec
  train: data.Source
  held_out: dict[str, data.Source]
  steps: int
  schedule: Callable


def prepare(config: LinearProbe, workdir: str, cache: str, init_from: str = "") -> Parts | None:
  """Builds everything that can be wrong; computes and writes nothing.

  Without `init_from`, where the run is yet to be trained, it checks the settings and returns None.

  Raises:
    ValueError: a setting that makes no sense, or a run that is not what `config.expected` says.
    FileNotFoundError: there is no trained run, or no data.
  """
  folder.check_same_run(workdir, to_dict(config), HARMLESS)
  mesh = sharding.make_mesh()
  sharding.check_divides("batch_size", config.batch_size, mesh)
  sharding.check_divides("eval_batch_size", config.eval_batch_size, mesh)
  return _build(config, mesh, init_from) if init_from else None


def _build(config: LinearProbe, mesh: Mesh, init_from: str) -> Parts:
  run = saved.open_run(init_from)
  saved.check_expected(run, given(config.expected))
  codec = run.open_codec(mesh)
  train = data.load(**to_dict(config.data))
  held_out = {name: data.load(**to_dict(getattr(config, name))) for name in ("select", "test")}
  for key, source in {"data": train, **held_out}.items():
    fits = codec.source_size(key, source) == run.model.image_size
    if not fits or not source.num_classes:
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
  steps = optim.count_steps(config, len(train))
  schedule = optim.make_schedule(1.0, steps, config.warmup)
  return Parts(mesh, run, codec, train, held_out, steps, schedule)


def timestep_names(config: LinearProbe) -> dict[str, int]:
  """Returns {"t0": 0, "t50": 50}."""
  return {f"t{t}": t for t in config.timesteps}


def init_heads(config: LinearProbe, width: int, classes: int) -> Callable:
  """Returns `init(key) -> states`: the heads of every learning rate, a state per timestep."""
  return lambda key: {
    t: linear_probe.init_probe(key, len(config.lrs), width, classes, config.wd)
    for t in timestep_names(config)
  }


def make_step(parts: Parts, config: LinearProbe) -> Callable:
  """Builds the jitted `step(states, weights, batch) -> (states, metrics)`.

  `states` holds the heads of each timestep, and is donated; `weights` are the frozen ones.
  """
  lrs = jnp.asarray(config.lrs, jnp.float32)

  def step(states, weights, batch):
    count = next(iter(states.values())).step
    key = jax.random.fold_in(jax.random.key(config.seed), count)
    images = encode_batch(parts.codec, weights.codec, batch, key)["image"]
    new = {}
    losses = {}
    for name, t in timestep_names(config).items():
      keys = jax.random.split(jax.random.fold_in(key, t), len(batch["label"]))
      features = parts.run.inference.represent(weights.model, images, keys, t)["class"]
      rates = lrs * parts.schedule(count)
      new[name], of_heads = linear_probe.train_probe(
        states[name], features, batch["label"], rates, config.wd
      )
      losses |= {f"loss/{name}/lr{lr:g}": of_heads[i] for i, lr in enumerate(config.lrs)}
    best = jnp.stack(list(losses.values())).min()
    return new, {"loss": best, "lr": parts.schedule(count), **losses}

  everywhere = sharding.replicated(parts.mesh)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(everywhere, everywhere, sharding.batch_sharding(parts.mesh)),
    out_shardings=(everywhere, everywhere),
  )


def make_judge(context: evaluators.Context, config: LinearProbe) -> Callable:
  """Builds `judge(weights, states, source) -> {"top1/t0": accuracy of each head}`."""

  def count(inputs, batch):
    weights, states = inputs
    images = context.see(weights, batch)
    hits = {}
    for name, t in timestep_names(config).items():
      keys = example_keys(config.seed, batch["index"])
      features = context.inference.represent(weights.model, images, keys, t)["class"]
      logits = linear_probe.predict(states[name], features)
      for statistic, k in STATISTICS.items():
        k = min(k, logits.shape[-1])
        hits[f"{statistic}/{name}"] = linear_probe.hits(logits, batch["label"], k)
    return hits

  count = context.jit(count)

  def judge(weights, states, source):
    hits = context.map(count, (weights, states), source)
    return {name: of_heads.mean(axis=0) for name, of_heads in hits.items()}

  return judge


def run(
  parts: Parts | None,
  config: LinearProbe,
  workdir: str,
  name: str,
  *,
  cache: str,
  init_from: str = "",
  wandb_key: str | None = None,
) -> dict:
  """Trains the heads to the last step and returns the summary; resumes as other trainers do.

  It logs, for every timestep, "probe/top1/t<t>" and "probe/top5/t<t>" on the test split of the head
  that is best on the `select` split, its learning rate "probe/lr/t<t>", and
  "probe/select/t<t>/lr<lr>" of all heads.

  Arguments are as in `trainers.diffusion.run`. `parts` is None if the run in `init_from` was yet to
  be trained when this one was prepared.
  """
  say = logs.printer(name)
  parts = parts or _build(config, sharding.make_mesh(), init_from)
  params, _, step = parts.run.params(config.init_weights)
  width = feature_widths(parts.run.model)["class"]
  classes = parts.train.num_classes
  say(
    f"probes {parts.run.folder}, step {step}, {config.init_weights} weights: {classes} classes, "
    f"{len(config.lrs)} learning rates x timesteps {tuple(config.timesteps)}"
  )
  context = evaluators.Context(
    inference=parts.run.inference,
    streams=parts.run.streams,
    mesh=parts.mesh,
    batch_size=config.eval_batch_size,
    seed=config.seed,
    cache=cache,
    codec=parts.codec,
  )
  weights = context.weights(sharding.replicate(params, parts.mesh))
  judge = make_judge(context, config)

  def evaluate(states):
    selected = judge(weights, states, parts.held_out["select"])
    tested = judge(weights, states, parts.held_out["test"])
    for t in timestep_names(config):
      accuracies = selected[f"top1/{t}"]
      best = int(accuracies.argmax())
      for statistic in STATISTICS:
        yield f"{statistic}/{t}", tested[f"{statistic}/{t}"][best]
      yield f"lr/{t}", config.lrs[best]
      for lr, accuracy in zip(config.lrs, accuracies, strict=True):
        yield f"select/{t}/lr{lr:g}", accuracy

  init = init_heads(config, width, classes)
  key = jax.random.key(config.seed)
  everywhere = sharding.replicated(parts.mesh)
  step_fn = make_step(parts, config)
  training = loop.Training(
    like=sharding.placed(jax.eval_shape(init, key), everywhere),
    fresh=lambda: jax.jit(init, out_shardings=everywhere)(key),
    step=lambda states, batch: step_fn(states, weights, batch),
    source=parts.train,
    steps=parts.steps,
    evaluators=[evaluators.Scheduled("probe", config.eval_every, evaluate)],
    mesh=parts.mesh,
  )
  return loop.train(training, config, workdir, name, wandb_key)

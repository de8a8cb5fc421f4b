"""Trains a masked-diffusion auto-encoder: MAE, UMD, DiT, MaskDiT, as its config's streams say."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import evaluators
from umd import data, metrics, optim, sharding
from umd import workdir as folder
from umd.checkpoint import Checkpoints, load_params
from umd.inference import Inference
from umd.models.autoencoder import AutoEncoder
from umd.objectives import Stream, Term, make_loss, period, stream_rows
from umd.paths import make_path
from umd.state import adopt, init_state, make_train_step

# What may change between two starts of one run without making it another run.
HARMLESS = ("checkpoint", "evals", "log_every", "summary", "wandb")


def make_streams(config: ConfigDict) -> tuple[Stream, ...]:
  """The config's `streams` as dataclasses."""
  streams = []
  for name, settings in config.items():
    settings = settings.to_dict()
    terms = {k: Term(**term) for k, term in settings.pop("terms").items()}
    streams.append(Stream(name, terms, **settings))
  return tuple(streams)


def describe(params, streams, batch_size: int) -> str:
  """One line per run: parameters, and the rows that each stream really gets."""
  size = period(streams, batch_size)
  shares = []
  for s in streams:
    start, stop = stream_rows(s, size)
    rows = (stop - start) * batch_size // size
    shares.append(f"{s.name} {rows}/{batch_size} rows, mask {s.mask_ratio:g}, {s.timesteps}")
  count = sum(x.size for x in jax.tree.leaves(params))
  return f"{count / 1e6:.2f}M parameters; streams: {'; '.join(shares)}"


def make_writer(config: ConfigDict, workdir: str, step: int, wandb_key: str | None):
  """All sinks on process 0, none elsewhere."""
  if jax.process_index():
    return metrics.Writer([])
  lines = metrics.JsonLines(workdir, step)
  sinks = [lines, metrics.PngFolder(workdir), metrics.TensorBoard(workdir)]
  if config.wandb.mode != "disabled":
    name = os.path.basename(os.path.normpath(workdir))
    settings = {"name": name, **config.wandb.to_dict()}
    sinks.append(metrics.Wandb(workdir, config.to_dict(), wandb_key, **settings))
  return metrics.Writer(sinks, lines.earlier)


class StepMetrics:
  """Metrics of the steps since the last log, left on the device until they are needed."""

  def __init__(self):
    self._pending = []

  def add(self, step: int, values: dict[str, jax.Array]) -> None:
    self._pending.append((step, values))

  def drain(self) -> dict[str, float]:
    """Means over the pending steps (of "lr": the last).

    Raises:
      FloatingPointError: the loss or the gradient of a step was not finite; names the first.
    """
    steps = [step for step, _ in self._pending]
    fetched = jax.device_get([values for _, values in self._pending])
    self._pending = []
    for step, values in zip(steps, fetched, strict=True):
      bad = [k for k, v in values.items() if not np.isfinite(v)]
      if bad:
        raise FloatingPointError(
          f"Step {step}: {', '.join(bad)} not finite. Parameters are lost from this step on; the "
          "last checkpoint is from before. Lower optim.lr or optim.clip_norm, or look at the data."
        )
    means = {k: float(np.mean([v[k] for v in fetched])) for k in (fetched[0] if fetched else ())}
    return {**means, "lr": float(fetched[-1]["lr"])} if fetched else {}


class Parts(NamedTuple):
  """What a config stands for, before anything is computed."""

  mesh: Mesh
  source: data.Source
  model: AutoEncoder
  streams: tuple[Stream, ...]
  loss: Callable
  schedule: Callable
  tx: optax.GradientTransformation
  evaluators: list[evaluators.Scheduled]


def prepare(config: ConfigDict, workdir: str, cache: str) -> Parts:
  """Builds everything that can be wrong; takes seconds, compiles and writes nothing.

  Raises:
    ValueError: a setting that makes no sense, or a workdir that holds another run.
  """
  mesh = sharding.make_mesh()
  sharding.check_divides("batch_size", config.batch_size, mesh)
  sharding.check_divides("eval_batch_size", config.eval_batch_size, mesh)
  source = data.load(config.data.name, config.data.split)
  num_classes = source.num_classes if config.use_labels else 0
  model = AutoEncoder(
    image_size=source.image_size, num_classes=num_classes, **config.model.to_dict()
  )
  path, streams = make_path(**config.path.to_dict()), make_streams(config.streams)
  loss = make_loss(model, path, streams, config.batch_size, config.label_drop_prob)
  settings = config.optim.to_dict()
  schedule = optim.make_schedule(settings.pop("lr"), config.steps, settings.pop("warmup_steps"))
  tx = optim.make_optimizer(schedule, **settings)
  context = evaluators.Context(
    Inference(model, path), streams, mesh, config.eval_batch_size, config.seed, cache
  )
  scheduled = evaluators.from_config(config.evals.to_dict(), context)
  folder.check_same_run(workdir, config.to_dict(), HARMLESS)
  return Parts(mesh, source, model, streams, loss, schedule, tx, scheduled)


def run(
  config: ConfigDict,
  workdir: str,
  name: str,
  *,
  cache: str,
  init_from: str = "",
  wandb_key: str | None = None,
) -> dict:
  """Trains to `config.steps` and returns the summary; resumes from the workdir's last checkpoint.

  Args:
    config: see `configs/quickstart.py`.
    workdir: config, metrics, images and checkpoints go here.
    name: shown in front of every line printed.
    cache: folder for what evaluators compute once.
    init_from: workdir of the run whose weights to start from; empty for none.
    wandb_key: API key of Weights & Biases.
  """
  is_main = jax.process_index() == 0
  say = lambda text: print(f"[{name}] {text}", flush=True) if is_main else None
  started = time.time()
  mesh, source, model, streams, loss, schedule, tx, scheduled = prepare(config, workdir, cache)

  # State: new, started from another run, or the one that was interrupted.
  blank = jnp.zeros((1, *source.image_size)), jnp.zeros(1, jnp.int32)
  init = lambda key: model.init(key, *blank)["params"]
  state = init_state(init, tx, jax.random.key(config.seed), mesh)
  step_fn = make_train_step(
    loss, tx, schedule, ema_decay=config.ema_decay, seed=config.seed, mesh=mesh
  )
  checkpoints = Checkpoints(workdir, config.checkpoint.keep)
  step, position = checkpoints.latest() or 0, 0
  if step:
    state, saved = checkpoints.restore(state, step)
    position = saved["position"]
    say(f"resumed at step {step}")
  elif init_from:
    params, init_step = load_params(init_from, config.init_weights)
    state = adopt(state, params, config.init_fresh, mesh)
    say(f"started from {init_from}, step {init_step}, {config.init_weights} weights")
  say(describe(state.params, streams, config.batch_size))

  if is_main:
    folder.start(workdir, config.to_dict())
  writer = make_writer(config, workdir, step, wandb_key)

  def evaluate(step):
    for s in scheduled:
      if s.due(step, config.steps):
        began = time.perf_counter()
        values = {f"{s.name}/{k}": v for k, v in s.evaluator(state)}
        writer.write(step, values)
        seconds = time.perf_counter() - began
        shown = [k for k in config.summary if k in values]
        numbers = "  ".join(f"{k.removeprefix(s.name + '/')} {values[k]:.4g}" for k in shown)
        say(f"step {step}  {s.name} ({seconds:.0f} s)  {numbers}")

  def log(step):
    values, pace = pending.drain(), progress.tick(step)
    writer.write(step, {**values, "images_per_second": pace["images_per_second"]})
    say(
      f"step {step}/{config.steps}  loss {values['loss']:.4f}  "
      f"{pace['images_per_second']:.0f} images/s  ETA {metrics.format_seconds(pace['eta_seconds'])}"
    )

  # The loop: no value leaves the device but at logs, evaluations and checkpoints.
  place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  batches = data.train_batches(
    source,
    config.batch_size,
    seed=config.seed,
    start_step=position // config.batch_size,
    **place,
  )
  pending, progress = StepMetrics(), metrics.Progress(config.steps, step, config.batch_size)
  # However the loop ends, a save under way is completed and the logs are closed.
  with contextlib.closing(checkpoints), contextlib.closing(writer):
    for batch in sharding.prefetch(batches, mesh):
      if step == config.steps:
        break
      state, values = step_fn(state, batch)
      step += 1
      pending.add(step, values)
      last = step == config.steps
      evaluating = any(s.due(step, config.steps) for s in scheduled)
      saving = last or step % config.checkpoint.every == 0
      if last or evaluating or saving or step % config.log_every == 0:
        log(step)
      if evaluating:
        evaluate(step)
      if saving:
        # After the metrics are safe: a checkpoint promises that everything up to it is written.
        writer.flush()
        checkpoints.save(state, step, {"position": step * config.batch_size})
      if evaluating:
        progress.resume(step)

  summary = {
    "name": name,
    "step": step,
    "seconds": time.time() - started,
    "headline": list(config.summary),
    "metrics": writer.latest,
  }
  if is_main:
    folder.finish(workdir, summary)
  return summary

"""Trains a KL auto-encoder (Rombach et al. 2022), on whose latents other models can be trained.

After the last step it is written to <workdir>/vae, as `umd.codecs.vae_files` and diffusers read it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

import evaluators
from evaluators.context import count
from trainers import logs, optim
from trainers.diffusion import count_steps
from trainers.loop import Loop, Training, train_batches
from umd import data
from umd.codecs import vae_files
from umd.codecs.codec import Codec, Pixels
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.devices import mesh as sharding
from umd.objectives import Stream
from umd.runs import preemption, writers
from umd.runs import workdir as folder
from umd.state import TrainState, init_state

ERRORS: Mapping[str, Callable] = {"l1": jnp.abs, "l2": jnp.square}


def kl_divergence(
  mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"]
) -> Float[Array, "b"]:
  """KL(N(mean, exp(logvar)) || N(0, 1)) of each example, in nats, summed over its latents."""
  # expm1: for variances near 1, where exp(x) - 1 would round the difference away.
  return 0.5 * (jnp.square(mean) + jnp.expm1(logvar) - logvar).sum(axis=(1, 2, 3))


def posterior_noise(key: Array, images: Float[Array, "b h w c"], model: KLAutoEncoder) -> Array:
  """Standard normal noise for the latents of a batch, each example's from a key of its own."""
  b, h, w, _ = images.shape
  factor = model.architecture.factor
  shape = h // factor, w // factor, model.architecture.latent_channels
  return jax.vmap(lambda k: jax.random.normal(k, shape))(jax.random.split(key, b))


@dataclasses.dataclass(frozen=True, eq=False)
class KLObjective:
  """The loss of a KL auto-encoder: `objective(params, objective.draw(batch, key))`.

  It is the mean error of the values of an image plus `kl_weight` times the KL divergence,
  which is divided by the number of values too: sums over both in the published ratio. The published
  objective has two terms more, a perceptual and an adversarial one, which need networks trained
  elsewhere. Without them reconstructions lack texture: they are blurrier, and the more so the
  smaller the latents; colours come late.

  The values are "reconstruction", "kl" (nats per value of the image), and "latent_mean" and
  "latent_std" of the posterior means, over all channels.

  Attributes:
    model: the auto-encoder.
    error: "l1", the absolute error, or "l2", the squared one; images are in [-1, 1].
    kl_weight: 1e-6 in the paper.

  Raises:
    ValueError: no such error.
  """

  model: KLAutoEncoder
  error: str
  kl_weight: float

  def __post_init__(self):
    if self.error not in ERRORS:
      raise ValueError(f"objective.error={self.error!r} is not one of {list(ERRORS)}.")

  def draw(self, batch: Mapping, key: Array) -> tuple[Array, Array]:
    """(images, noise of their latents)."""
    return batch["image"], posterior_noise(key, batch["image"], self.model)

  def __call__(self, params, drawn: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
    images, noise = drawn
    reconstruction, mean, logvar = self.model.apply({"params": params}, images, noise)
    values = {
      "reconstruction": ERRORS[self.error](reconstruction - images).mean(),
      "kl": kl_divergence(mean, logvar).mean() / images[0].size,
      "latent_mean": mean.mean(),
      "latent_std": mean.std(),
    }
    return values["reconstruction"] + self.kl_weight * values["kl"], values


def centre(params: Mapping, mean: Float[Array, "c"]) -> dict:
  """The same auto-encoder with `mean` taken from the channels of its latents.

  The 1 x 1 convolutions on both sides of the latents take it up, so that reconstructions stay as
  they are, up to rounding. A KL weighted by 1e-6 leaves the means where they happen to be, and the
  one `shift_factor` of all channels cannot bring them to 0.
  """
  before, after = params["quant_conv"], params["post_quant_conv"]
  shift = jnp.concatenate([mean, jnp.zeros_like(mean)])  # Of means, not of log-variances.
  back = jnp.dot(mean, after["kernel"][0, 0], precision="highest")
  return {
    **params,
    "quant_conv": {**before, "bias": before["bias"] - shift},
    "post_quant_conv": {**after, "bias": after["bias"] + back},
  }


# What may change between two starts of one run without making it another run.
HARMLESS = ("accumulate", "checkpoint", "data.max_bad", "eval_every", "eval_num", "fsdp")
HARMLESS += ("log_every", "summary", "test", "wandb")
FOLDER = "vae"  # Of the weights, in the workdir.
ROWS, WIDTH = 8, 96  # Of the picture: rows, and about how many pixels wide an image is drawn.


class Parts(NamedTuple):
  """What a config stands for, before anything is computed.

  What `nonfinite` reports is of the pixels, and of one pass of the model, called "images".
  """

  mesh: Mesh
  source: data.Source
  test: data.Source
  model: KLAutoEncoder
  steps: int
  objective: KLObjective
  schedule: Callable
  tx: optax.GradientTransformation
  codec: Codec = Pixels()
  streams: tuple[Stream, ...] = (Stream("images", {}),)


def make_model(config: ConfigDict, image_size: tuple[int, int, int]) -> KLAutoEncoder:
  """The config's model for images (H, W, C)."""
  height, width, channels = image_size
  settings = config.model.to_dict()
  sizes = settings.pop("architecture")
  widths = sizes["block_out_channels"] = tuple(sizes["block_out_channels"])
  architecture = Architecture(in_channels=channels, out_channels=channels, **sizes)
  factor = architecture.factor
  if height % factor or width % factor:
    raise ValueError(
      f"model.architecture.block_out_channels={widths}: {len(widths)} levels make a latent of "
      f"{factor} x {factor} px, which does not divide the images of {height} x {width} px. Choose "
      "another size, or fewer levels."
    )
  return KLAutoEncoder(architecture, **settings)


def prepare(config: ConfigDict, workdir: str, cache: str, init_from: str = "") -> Parts:
  """Builds everything that can be wrong; takes seconds, compiles and writes nothing.

  Raises:
    ValueError: a setting that makes no sense, or a workdir that holds another run.
    FileNotFoundError: data that is not there.
  """
  folder.check_same_run(workdir, config.to_dict(), HARMLESS)
  mesh = sharding.make_mesh(fsdp=config.fsdp)
  sharding.check_divides("batch_size", config.batch_size, mesh)
  sharding.check_divides("eval_batch_size", config.eval_batch_size, mesh)
  if init_from:
    raise ValueError(f"init_from={init_from!r}: this trainer starts from nothing. Leave it empty.")
  source, test = (data.load(**config[part].to_dict()) for part in ("data", "test"))
  if test.image_size != source.image_size:
    sizes = f"images of {test.image_size}, data: {source.name!r} of {source.image_size}"
    raise ValueError(f"test: {test.name!r} has {sizes}. Choose data and pp of one size.")
  count(test, config.eval_num)
  model = make_model(config, source.image_size)
  sharding.check_accumulates(config.accumulate, config.batch_size, 1, mesh)
  objective = KLObjective(model, **config.objective.to_dict())
  steps, settings = count_steps(config, len(source)), config.optim.to_dict()
  schedule = optim.make_schedule(settings.pop("lr"), steps, settings.pop("warmup"))
  tx = optim.make_optimizer(schedule, **settings)
  return Parts(mesh, source, test, model, steps, objective, schedule, tx)


def init_params(model: KLAutoEncoder) -> Callable:
  """`init(key) -> params`."""
  a = model.architecture
  # Parameters do not depend on the size of images: the smallest ones will do.
  blank = jnp.zeros((1, a.factor, a.factor, a.in_channels)), jnp.zeros((1, 1, 1, a.latent_channels))
  return lambda key: model.init(key, *blank)["params"]


def describe(params, model: KLAutoEncoder, image_size: tuple[int, int, int]) -> str:
  """One line per run: parameters, and the sizes of images and latents."""
  (height, width, _), factor = image_size, model.architecture.factor
  latent = f"{height // factor} x {width // factor} x {model.architecture.latent_channels}"
  number = sum(x.size for x in jax.tree.leaves(params)) / 1e6
  return f"{number:.2f}M parameters; images of {height} x {width} px, latents of {latent}"


def mean_image_mse(context: evaluators.Context, source: data.Source, num: int) -> float:
  """Squared error per value of the first `num` images from their mean, by one pass over them."""
  n = count(source, num)

  def add_up(batch):
    inside = batch["_mask"] * (batch["index"] < n)
    images = batch["image"] * inside[:, None, None, None]
    return images.sum(axis=0), jnp.square(images).sum(axis=0), inside.sum()

  compiled = jax.jit(add_up, out_shardings=sharding.replicated(context.mesh))
  totals = [0.0, 0.0, 0.0]
  batches = data.eval_batches(source, context.batch_size, **context.place())
  batches = itertools.islice(batches, -(-n // context.batch_size) * jax.process_count())
  for sums in sharding.run_ahead(compiled, batches, context.mesh):
    totals = [total + np.asarray(x, np.float64) for total, x in zip(totals, sums, strict=True)]
    preemption.check()
  mean, square = totals[0] / totals[2], totals[1] / totals[2]
  return float((square - mean**2).mean())


class Reconstruction:
  """How well held-out images come back from the means of their latents, by the averaged weights.

  Yields "psnr" (dB, the mean of the images'), "mse" per value, both of reconstructions cut to
  [-1, 1]; "mean_image_mse", that of the mean image; "kl" (nats per value); "latent_mean/<channel>"
  and "latent_std/<channel>" of the unscaled means; and "images", rows of original |
  reconstruction.
  """

  def __init__(
    self, context: evaluators.Context, model: KLAutoEncoder, source: data.Source, num: int
  ):
    """`num`: look at the first so many images of the source only; 0 for all."""
    self._context, self._source, self._num = context, source, num
    self._scale = max(1, WIDTH // source.image_size[1])

    def reconstruct(params, batch):
      images = batch["image"]
      mean, logvar = model.apply({"params": params}, images, method="encode")
      found = model.apply({"params": params}, mean, method="decode")
      mse = jnp.square(jnp.clip(found, -1.0, 1.0) - images).mean(axis=(1, 2, 3))
      return {
        "image": images,
        "reconstruction": found,
        "mse": mse,
        "psnr": 10 * jnp.log10(2.0**2 / jnp.maximum(mse, 1e-12)),  # Of a range of 2.
        "kl": kl_divergence(mean, logvar) / images[0].size,
        "latent": mean.mean(axis=(1, 2)),
        "square": jnp.square(mean).mean(axis=(1, 2)),
      }

    # The same images every time, spread over the data.
    shown = np.linspace(0, count(source, num) - 1, ROWS).astype(int)
    self._reconstruct = context.jit(reconstruct, ("image", "reconstruction"), shown)

  @functools.cached_property
  def _mean_image_mse(self) -> float:
    return mean_image_mse(self._context, self._source, self._num)

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float | writers.Images]]:
    out = self._context.map(self._reconstruct, state.ema_params, self._source, num=self._num)
    yield from ((name, out[name].mean(dtype=np.float64)) for name in ("psnr", "mse", "kl"))
    yield "mean_image_mse", self._mean_image_mse
    mean, square = (out[name].mean(axis=0, dtype=np.float64) for name in ("latent", "square"))
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    yield from ((f"latent_mean/{c}", value) for c, value in enumerate(mean))
    yield from ((f"latent_std/{c}", value) for c, value in enumerate(std))
    cells = np.stack([out["image"], out["reconstruction"]], axis=1)
    yield "images", writers.to_grid(cells.reshape(-1, *cells.shape[2:]), 2, self._scale)


def make_moments(model: KLAutoEncoder, mesh: Mesh) -> Callable:
  """Builds `moments(params, batches) -> (mean of each channel, standard deviation from them)`.

  Of latents drawn from their posteriors: their square is E[mean^2 + var], with no need to draw.
  """
  everywhere = sharding.replicated(mesh)

  def of_batch(params, batch):
    params = jax.lax.with_sharding_constraint(params, everywhere)
    mean, logvar = model.apply({"params": params}, batch["image"], method="encode")
    square = jnp.square(mean) + jnp.exp(logvar)
    return mean.mean(axis=(0, 1, 2)), square.mean(axis=(0, 1, 2))

  of_batch = jax.jit(of_batch, out_shardings=everywhere)

  def moments(params, batches) -> tuple[np.ndarray, float]:
    found = []
    for values in sharding.run_ahead(lambda batch: of_batch(params, batch), batches, mesh):
      found.append(np.asarray(values, np.float64))
      preemption.check()
    mean, square = np.mean(found, axis=0)
    return np.float32(mean), float(np.sqrt((square - mean**2).mean()))

  return moments


def make_export(config: ConfigDict, parts: Parts, workdir: str, say: Callable) -> Callable:
  """Builds the evaluator that writes the averaged weights to <workdir>/vae, after the last step.

  Latents are centred, channel by channel, and get unit variance by the one "scaling_factor" (which
  it yields; Rombach et al. 2022, appendix G), on `scaling_num` images of the training stream, those
  that would be next: shuffled, cut and mirrored as in training.
  """
  moments, path = make_moments(parts.model, parts.mesh), folder.join(workdir, FOLDER)

  def export(state: TrainState) -> Iterator[tuple[str, float]]:
    number = -(-config.scaling_num // config.batch_size)
    batches = train_batches(parts.source, config.batch_size, config.seed, parts.steps)
    mean, std = moments(state.ema_params, itertools.islice(batches, number))
    centred = jax.jit(centre, out_shardings=sharding.replicated(parts.mesh))
    params = jax.device_get(centred(state.ema_params, mean))
    scaled = dataclasses.replace(parts.model.architecture, scaling_factor=1.0 / std)
    if jax.process_index() == 0:
      vae_files.save(path, scaled, params)
    say(f"the auto-encoder is in {path}; to train on its latents: latent_diffusion=True,vae={path}")
    yield "scaling_factor", scaled.scaling_factor

  return export


def run(
  config: ConfigDict,
  workdir: str,
  name: str,
  *,
  cache: str,
  init_from: str = "",
  wandb_key: str | None = None,
) -> dict:
  """Trains to the last step, writes <workdir>/vae and returns the summary; resumes as others do.

  Arguments as in `trainers.diffusion.run`; there is nothing to give as `init_from`.
  """
  say = logs.printer(name)
  parts = prepare(config, workdir, cache, init_from)
  loop = Loop(config, workdir, name)
  init, key = init_params(parts.model), jax.random.key(config.seed)
  state = init_state(init, parts.tx, key, parts.mesh)
  training = Training(config, parts, state, workdir)
  state = loop.restore(state)
  say(describe(state.params, parts.model, parts.source.image_size))
  context = evaluators.Context(
    inference=None,  # Of diffusion, and so are streams: nothing here asks for them.
    streams=(),
    mesh=parts.mesh,
    batch_size=config.eval_batch_size,
    seed=config.seed,
    cache=cache,
  )
  reconstruction = Reconstruction(context, parts.model, parts.test, config.eval_num)
  return loop.run(
    state,
    training,
    parts.source,
    [
      evaluators.Scheduled("reconstruction", config.eval_every, reconstruction),
      evaluators.Scheduled(FOLDER, 0, make_export(config, parts, workdir, say)),
    ],
    parts.steps,
    pending=logs.StepMetrics(config.guard.max_skipped, training.inspect),
    mesh=parts.mesh,
    wandb_key=wandb_key,
  )

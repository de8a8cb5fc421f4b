"""Trains a KL auto-encoder (Rombach et al. 2022), on whose latents other models can be trained.

After the last step it is written to <workdir>/vae, where `umd.codecs.vae_files` and diffusers read
it.
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

import evaluators
from evaluators.context import count
from trainers import diagnosis, logs, loop, optim
from trainers.config.records import KlVae, to_dict
from umd import data
from umd.codecs import vae_files
from umd.codecs.codec import Codec, Pixels
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.devices import mesh as sharding
from umd.objectives import Stream
from umd.runs import preemption, writers
from umd.runs import workdir as folder
from umd.state import TrainState, init_state, state_shapes

ERRORS: Mapping[str, Callable] = {"l1": jnp.abs, "l2": jnp.square}


def kl_divergence(
  mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"]
) -> Float[Array, "b"]:
  """Returns KL(N(mean, exp(logvar)) || N(0, 1)) of each example, in nats, summed over its latents.

  Of one latent it is (mean^2 + var - 1 - log var) / 2.
  """
  # Near a variance of 1 exp(x) - 1 would round the difference away; expm1 does not.
  return 0.5 * (jnp.square(mean) + jnp.expm1(logvar) - logvar).sum(axis=(1, 2, 3))


def posterior_noise(key: Array, images: Float[Array, "b h w c"], model: KLAutoEncoder) -> Array:
  """Draws standard normal noise for the latents of a batch, each example's from its own key."""
  b, h, w, _ = images.shape
  factor = model.architecture.factor
  shape = h // factor, w // factor, model.architecture.latent_channels
  return jax.vmap(lambda k: jax.random.normal(k, shape))(jax.random.split(key, b))


@dataclasses.dataclass(frozen=True, eq=False)
class KLObjective:
  """The loss of a KL auto-encoder: `objective(params, objective.draw(batch, key))`.

    L = |reconstruction - image| (or squared) + kl_weight KL,    both per value of the image

  with latents drawn from their posterior, z = mean + exp(logvar / 2) eps. The published objective
  has two terms more, a perceptual and an adversarial one, which need networks trained elsewhere.
  Without them reconstructions lack texture: they are blurrier, and the more so the smaller the
  latents; colours come late.

  The terms are "reconstruction", "kl" (nats per value), and "latent_mean" and "latent_std" of the
  posterior means, over all channels.

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
    """Returns (images, noise of their latents)."""
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
  """Returns the same auto-encoder with `mean` subtracted from the channels of its latents.

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
HARMLESS = (
  "accumulate",
  "checkpoint",
  "data.max_bad",
  "eval_every",
  "eval_num",
  "fsdp",
  "log_every",
  "summary",
  "test",
  "wandb",
)
FOLDER = "vae"  # The weights are written here, in the workdir.
ROWS = 8  # The number of images in the picture.
WIDTH = 96  # About how many pixels wide an image is drawn.


class Parts(NamedTuple):
  """What a config stands for, before anything is computed.

  `trainers.diagnosis` looks at pixels and at one pass of the model, which it calls "images".
  """

  mesh: Mesh
  source: data.Source
  test: data.Source
  steps: int
  objective: KLObjective
  schedule: Callable
  tx: optax.GradientTransformation
  codec: Codec = Pixels()
  streams: tuple[Stream, ...] = (Stream("images", {}),)

  @property
  def model(self) -> KLAutoEncoder:
    return self.objective.model


def make_model(config: KlVae, image_size: tuple[int, int, int]) -> KLAutoEncoder:
  """Builds the config's model for images (H, W, C)."""
  height, width, channels = image_size
  sizes, widths = config.model.architecture, config.model.architecture.block_out_channels
  architecture = Architecture(in_channels=channels, out_channels=channels, **to_dict(sizes))
  factor = architecture.factor
  if height % factor or width % factor:
    raise ValueError(
      f"model.architecture.block_out_channels={widths}: {len(widths)} levels make a latent of "
      f"{factor} x {factor} px, which does not divide the images of {height} x {width} px. Choose "
      "another size, or fewer levels."
    )
  return KLAutoEncoder(architecture, config.model.dtype)


def prepare(config: KlVae, workdir: str, cache: str, init_from: str = "") -> Parts:
  """Builds everything that can be wrong; takes seconds, compiles and writes nothing.

  Raises:
    ValueError: a setting that makes no sense, or a workdir that holds another run.
    FileNotFoundError: data that is not there.
  """
  folder.check_same_run(workdir, to_dict(config), HARMLESS)
  mesh = sharding.make_mesh(fsdp=config.fsdp)
  sharding.check_divides("batch_size", config.batch_size, mesh)
  sharding.check_divides("eval_batch_size", config.eval_batch_size, mesh)
  sharding.check_accumulates(config.accumulate, config.batch_size, 1, mesh)
  if init_from:
    raise ValueError(f"init_from={init_from!r}: this trainer starts from nothing. Leave it empty.")
  source = data.load(**to_dict(config.data))
  test = data.load(**to_dict(config.test))
  if test.image_size != source.image_size:
    raise ValueError(
      f"test: {test.name!r} has images of {test.image_size}, data: {source.name!r} of "
      f"{source.image_size}. Choose data and pp of one size."
    )
  count(test, config.eval_num)
  model = make_model(config, source.image_size)
  objective = KLObjective(model, config.objective.error, config.objective.kl_weight)
  steps = optim.count_steps(config, len(source))
  return Parts(mesh, source, test, steps, objective, *optim.from_config(config.optim, steps))


def init_params(model: KLAutoEncoder) -> Callable:
  """Returns `init(key) -> params`."""
  a = model.architecture
  # Parameters do not depend on the size of images: the smallest ones will do.
  image = jnp.zeros((1, a.factor, a.factor, a.in_channels))
  noise = jnp.zeros((1, 1, 1, a.latent_channels))
  return lambda key: model.init(key, image, noise)["params"]


def describe(params, model: KLAutoEncoder, image_size: tuple[int, int, int]) -> str:
  """Describes a run in a line: the number of parameters, the sizes of images and latents."""
  height, width, _ = image_size
  factor = model.architecture.factor
  latent = f"{height // factor} x {width // factor} x {model.architecture.latent_channels}"
  number = sum(x.size for x in jax.tree.leaves(params)) / 1e6
  return f"{number:.2f}M parameters; images of {height} x {width} px, latents of {latent}"


class Reconstruction:
  """Measures how well held-out images come back from the means of their latents, by the average.

  Yields "psnr" (dB, the mean of the images'), "mse" per value, both of reconstructions cut to
  [-1, 1]; "mean_image_mse", that of the mean image; "kl" (nats per value); "latent_mean/<channel>"
  and "latent_std/<channel>" of the unscaled means; and "images", rows of original |
  reconstruction.
  """

  def __init__(
    self, context: evaluators.Context, model: KLAutoEncoder, source: data.Source, num: int
  ):
    """Looks at the first `num` images of the source only; 0 for all."""
    self._context = context
    self._source = source
    self._num = num

    def reconstruct(params, batch):
      images = batch["image"]
      mean, logvar = model.apply({"params": params}, images, method="encode")
      decoded = model.apply({"params": params}, mean, method="decode")
      mse = jnp.square(jnp.clip(decoded, -1.0, 1.0) - images).mean(axis=(1, 2, 3))
      return {
        "image": images,
        "reconstruction": decoded,
        "mse": mse,
        "psnr": 10 * jnp.log10(2.0**2 / jnp.maximum(mse, 1e-12)),  # Values have a range of 2.
        "kl": kl_divergence(mean, logvar) / images[0].size,
        "latent": mean.mean(axis=(1, 2)),
        "square": jnp.square(mean).mean(axis=(1, 2)),
      }

    # The same images every time, spread over the data.
    shown = np.linspace(0, count(source, num) - 1, ROWS).astype(int)
    self._reconstruct = context.jit(reconstruct, ("image", "reconstruction"), shown)

  @functools.cached_property
  def _mean_image_mse(self) -> float:
    """The squared error per value of the images from their mean, by one pass over them."""
    n = count(self._source, self._num)
    size = self._context.batch_size

    def add_up(batch):
      inside = batch["_mask"] * (batch["index"] < n)
      images = batch["image"] * inside[:, None, None, None]
      return images.sum(axis=0), jnp.square(images).sum(axis=0), inside.sum()

    compiled = jax.jit(add_up, out_shardings=sharding.replicated(self._context.mesh))
    batches = data.eval_batches(self._source, size, **self._context.place())
    batches = itertools.islice(batches, -(-n // size) * jax.process_count())
    totals = [0.0, 0.0, 0.0]
    for sums in sharding.run_ahead(compiled, batches, self._context.mesh):
      totals = [total + np.asarray(x, np.float64) for total, x in zip(totals, sums, strict=True)]
      preemption.check()
    images, squares, number = totals
    return float((squares / number - (images / number) ** 2).mean())

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float | writers.Images]]:
    out = self._context.map(self._reconstruct, state.ema_params, self._source, num=self._num)
    for name in ("psnr", "mse", "kl"):
      yield name, out[name].mean(dtype=np.float64)
    yield "mean_image_mse", self._mean_image_mse
    means = out["latent"].mean(axis=0, dtype=np.float64)
    squares = out["square"].mean(axis=0, dtype=np.float64)
    for channel, (mean, square) in enumerate(zip(means, squares, strict=True)):
      yield f"latent_mean/{channel}", mean
      yield f"latent_std/{channel}", np.sqrt(max(square - mean**2, 0.0))
    cells = np.stack([out["image"], out["reconstruction"]], axis=1)
    scale = max(1, WIDTH // self._source.image_size[1])
    yield "images", writers.to_grid(cells.reshape(-1, *cells.shape[2:]), 2, scale)


def make_moments(model: KLAutoEncoder, mesh: Mesh) -> Callable:
  """Builds `moments(params, batches) -> (mean of each channel, standard deviation from them)`.

  They are of latents drawn from their posteriors. There is no need to draw: E[z^2] = mean^2 + var.
  """
  everywhere = sharding.replicated(mesh)

  def of_batch(params, batch):
    params = jax.lax.with_sharding_constraint(params, everywhere)
    mean, logvar = model.apply({"params": params}, batch["image"], method="encode")
    square = jnp.square(mean) + jnp.exp(logvar)
    return mean.mean(axis=(0, 1, 2)), square.mean(axis=(0, 1, 2))

  of_batch = jax.jit(of_batch, out_shardings=everywhere)

  def moments(params, batches) -> tuple[np.ndarray, float]:
    values = []
    for of_one in sharding.run_ahead(lambda batch: of_batch(params, batch), batches, mesh):
      values.append(np.asarray(of_one, np.float64))
      preemption.check()
    mean, square = np.mean(values, axis=0)
    return np.float32(mean), float(np.sqrt((square - mean**2).mean()))

  return moments


def make_export(parts: Parts, config: KlVae, workdir: str, say: Callable) -> Callable:
  """Builds the evaluator that writes the averaged weights to <workdir>/vae, after the last step.

  Latents are centred, channel by channel, and get unit variance by the one "scaling_factor" (which
  it yields; Rombach et al. 2022, appendix G), on `scaling_num` images of the training stream, those
  that would be next: shuffled, cut and mirrored as in training.
  """
  moments = make_moments(parts.model, parts.mesh)
  path = folder.join(workdir, FOLDER)

  def export(state: TrainState) -> Iterator[tuple[str, float]]:
    number = -(-config.scaling_num // config.batch_size)
    batches = loop.train_batches(parts.source, config.batch_size, config.seed, parts.steps)
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
  parts: Parts,
  config: KlVae,
  workdir: str,
  name: str,
  *,
  cache: str,
  init_from: str = "",
  wandb_key: str | None = None,
) -> dict:
  """Trains to the last step, writes <workdir>/vae and returns the summary; resumes as others do.

  Arguments are as in `trainers.diffusion.run`; `init_from` must be empty.
  """
  say = logs.printer(name)
  init = init_params(parts.model)
  like = state_shapes(init, parts.tx, parts.mesh)
  context = evaluators.Context(
    inference=None,  # What is of diffusion, nothing here asks for: inference and streams.
    streams=(),
    mesh=parts.mesh,
    batch_size=config.eval_batch_size,
    seed=config.seed,
    cache=cache,
  )
  reconstruction = Reconstruction(context, parts.model, parts.test, config.eval_num)
  say(describe(like.params, parts.model, parts.source.image_size))
  training = loop.Training(
    like=like,
    fresh=lambda: init_state(init, parts.tx, jax.random.key(config.seed), parts.mesh),
    step=optim.make_step(config, parts, like),
    source=parts.source,
    steps=parts.steps,
    evaluators=[
      evaluators.Scheduled("reconstruction", config.eval_every, reconstruction),
      evaluators.Scheduled(FOLDER, 0, make_export(parts, config, workdir, say)),
    ],
    mesh=parts.mesh,
    max_skipped=config.guard.max_skipped,
    inspect=lambda state, step: diagnosis.inspect(parts, config, state.params, step, workdir),
  )
  return loop.train(training, config, workdir, name, wandb_key)

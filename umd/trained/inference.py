"""What anyone may ask of a trained model: represent, reconstruct, denoise, sample."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umd import samplers
from umd.masks import Mask, mask_from_noise, num_kept, patchify, unpatchify
from umd.models.network import Network, feature_widths, num_tokens, predict
from umd.paths import Path


def example_keys(seed: int, index: Int[Array, "b"]) -> Array:
  """One key per example, a function of (seed, index) alone: batch and padding do not matter."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)


def example_normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
  """Standard normal noise [B, *shape], each example's from its own key."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def example_uniform(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
  """Uniform noise [B, *shape] in [0, 1), each example's from its own key."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)


@dataclasses.dataclass(frozen=True)
class Inference:
  """A model and its path; every method is a pure function of parameters and inputs.

  Attributes:
    model: the network.
    path: the noise path it was trained on.
  """

  model: Network
  path: Path

  def features(self) -> tuple[str, ...]:
    """The names of what `represent` returns."""
    return tuple(feature_widths(self.model))

  def represent(
    self, params, images: Float[Array, "b h w c"], keys: Array, t: int = 0
  ) -> dict[str, Float[Array, "b _"]]:
    """Representations of images noised to timestep t (0: clean), a key per example.

    Returns what the network's `represent` does, {name: [B, D]}.
    """
    times = jnp.full(len(images), t, jnp.int32)
    x_t = self.path.combine("x_t", images, example_normal(keys, images.shape[1:]), times)
    return self.model.apply({"params": params}, x_t, times, method="represent")

  def reconstruct(
    self,
    params,
    images: Float[Array, "b h w c"],
    keys: Array,
    mask_ratio: float,
    t: int = 0,
    mask: Mask | None = None,
  ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Fills in dropped patches with the x0 head.

    They are a random share `mask_ratio` of all, or those of `mask`.

    Returns (reconstruction, masked): the input with its dropped patches predicted, and a map of
    ones where they are.
    """
    times = jnp.full(len(images), t, jnp.int32)
    noise_keys, mask_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if mask is None:
      tokens = num_tokens(self.model)
      noise = example_uniform(mask_keys, (tokens,))
      mask = mask_from_noise(noise, num_kept(tokens, mask_ratio))
    x_t = self.path.combine("x_t", images, example_normal(noise_keys, images.shape[1:]), times)
    filled = predict(self.model, params, x_t, times, None, mask)["x0"]
    patch = self.model.patch
    shape = patchify(images, patch).shape
    masked = jnp.broadcast_to(mask.masked[:, :, None], shape)
    where = unpatchify(masked, patch, images.shape[1:3])
    return jnp.where(where > 0, filled, images), where

  def denoiser(
    self,
    params,
    labels: Int[Array, "b"] | None,
    head: str = "eps",
    cfg_scale: float = 1.0,
    cfg_channels: int = 0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
  ) -> samplers.Denoiser:
    """`denoise(x_t, t) -> (x0, eps)` by one head, with classifier-free guidance.

    Guided prediction: uncond + cfg_scale (cond - uncond) (Ho & Salimans 2022); both come from one
    pass over a doubled batch. cfg_scale = 1 is the plain conditional model and costs one batch.
    With cfg_channels only the first so many channels are guided, the others stay conditional: DiT
    (Peebles & Xie 2023) and MDT guide 3 of 4 latent channels, and their FIDs are of such samples.
    Outside guidance_interval, (low, high) as shares of T, it is the conditional model as well and
    costs one batch: at high noise guidance makes samples alike, at low noise it does nothing
    (Kynkaanniemi et al. 2024).

    Raises:
      ValueError: the head cannot start from pure noise on this path, guidance is asked of a model
        without labels, of more channels than there are, or of an interval that is none.
    """
    self._check_denoiser(labels, head, cfg_scale, cfg_channels, guidance_interval)
    model, path, channels = self.model, self.path, self.model.image_size[2]
    scale = np.ones(channels, np.float32)
    scale[: cfg_channels or channels] = cfg_scale
    # Timesteps, free of floating-point surprises.
    low, high = np.array(guidance_interval) * path.timesteps
    low, high = int(np.ceil(low - 1e-6)), int(np.floor(high + 1e-6))

    def prediction(x_t, t, labels):
      times = jnp.full(len(x_t), t, jnp.int32)
      return predict(model, params, x_t, times, labels)[head]

    def conditional(x_t, t):
      return prediction(x_t, t, labels)

    def guided(x_t, t):
      null = jnp.full_like(labels, model.num_classes)
      both = prediction(jnp.concatenate([x_t, x_t]), t, jnp.concatenate([labels, null]))
      cond, uncond = jnp.split(both, 2)
      return uncond + scale * (cond - uncond)

    def denoise(x_t, t):
      if cfg_scale == 1:
        pred = conditional(x_t, t)
      elif (low, high) == (0, path.timesteps):
        pred = guided(x_t, t)
      else:
        pred = jax.lax.cond((low <= t) & (t <= high), guided, conditional, x_t, t)
      return path.invert(head, pred, x_t, t)

    return denoise

  def _check_denoiser(self, labels, head, cfg_scale, cfg_channels, guidance_interval) -> None:
    """Raises what `denoiser` does."""
    model, path, channels = self.model, self.path, self.model.image_size[2]
    if head not in model.heads:
      raise ValueError(f"head={head!r} is not among the model's heads {model.heads}.")
    if path.singular(head)[1:].any():
      raise ValueError(
        f"head={head!r} does not determine x0 at every timestep of path {path.name!r}. "
        f"Sample with another of {model.heads}."
      )
    if cfg_scale != 1 and (labels is None or not model.num_classes):
      raise ValueError(
        f"cfg_scale={cfg_scale} guides by labels, but there are none. Set cfg_scale=1 or train "
        "with labels."
      )
    if not 0 <= cfg_channels <= channels:
      raise ValueError(
        f"cfg_channels={cfg_channels} must be in [0, {channels}], the channels that the model "
        "sees; 0 guides them all."
      )
    if not 0 <= guidance_interval[0] < guidance_interval[1] <= 1:
      raise ValueError(
        f"guidance_interval={tuple(guidance_interval)} must be (low, high) with 0 <= low < high <= "
        "1, shares of all timesteps; (0, 1) guides at all of them."
      )

  def sample(
    self,
    params,
    keys: Array,
    labels: Int[Array, "b"] | None,
    *,
    sampler: str = "ddim",
    steps: int = 125,
    head: str = "eps",
    cfg_scale: float = 1.0,
    cfg_channels: int = 0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    clip_x0: bool = True,
    **options,
  ) -> Float[Array, "b h w c"]:
    """Images from noise.

    Args:
      params: model parameters, as a rule the EMA's.
      keys: one per image; x_T and any noise on the way are functions of it.
      labels: [B] classes, or None to sample without.
      sampler: key of `samplers.SAMPLERS`; `options` go to it (all: spacing; ddim: eta).
      steps: S, 1 <= S <= T.
      head: the head that the denoiser reads.
      cfg_scale: classifier-free guidance; 1 is none.
      cfg_channels: guide the first so many channels only; 0: all.
      guidance_interval: guide from the first to the second share of T only.
      clip_x0: keep x0 in [-1, 1] at every step: right for pixels, wrong for latents.

    Raises:
      ValueError: an unknown sampler or option, or see `denoiser` and `samplers.step_schedule`.
    """
    settings = dict(sampler=sampler, steps=steps, head=head, clip_x0=clip_x0, **options)
    guidance = dict(cfg_scale=cfg_scale, cfg_channels=cfg_channels)
    guidance |= dict(guidance_interval=guidance_interval)
    made, steps = self.make_sampler(params, labels, **settings, **guidance)
    return samplers.walk(made, *self.noise(keys), steps)

  def trace(
    self, params, keys: Array, labels: Int[Array, "b"] | None, **settings
  ) -> samplers.Trajectory:
    """What `sample` passes on its way with these settings: its last x_t are the samples."""
    sampler, steps = self.make_sampler(params, labels, **settings)
    return samplers.trace(sampler, *self.noise(keys), steps)

  def inpaint(
    self,
    params,
    keys: Array,
    labels: Int[Array, "b"] | None,
    known: Float[Array, "b h w c"],
    mask: Float[Array, "b h w 1"],
    resampling: int = 1,
    **settings,
  ) -> Float[Array, "b h w c"]:
    """`known` with what the mask is 1 at drawn anew; see `samplers.inpaint`.

    Other arguments are those of `sample`.
    """
    sampler, steps = self.make_sampler(params, labels, **settings)
    noise, keys = self.noise(keys)
    return samplers.inpaint(sampler, noise, keys, steps, known, mask, resampling)

  def noise(self, keys: Array) -> tuple[Float[Array, "b h w c"], Array]:
    """(x_T, keys of what is drawn on the way)."""
    start, on_the_way = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return example_normal(start, self.model.image_size), on_the_way

  def make_sampler(
    self, params, labels: Int[Array, "b"] | None, **settings
  ) -> tuple[samplers.Sampler, int]:
    """The sampler and the number of steps that settings of `sample` stand for.

    Raises:
      ValueError: see `sample`.
    """
    options = {**SAMPLING, **settings}
    name, steps, head, clip_x0 = map(options.pop, ("sampler", "steps", "head", "clip_x0"))
    guidance = [options.pop(n) for n in ("cfg_scale", "cfg_channels", "guidance_interval")]
    if name not in samplers.SAMPLERS:
      raise ValueError(f"sampler={name!r} is not one of {sorted(samplers.SAMPLERS)}.")
    make = samplers.SAMPLERS[name]
    parameters = inspect.signature(make).parameters.values()
    known = [p.name for p in parameters if p.default is not p.empty]
    if unknown := sorted(options.keys() - set(known)):
      raise ValueError(f"Unknown sampling options {unknown}: sampler={name!r} takes {known}.")
    denoise = self.denoiser(params, labels, head, *guidance)
    if clip_x0:
      denoise = samplers.clip_x0(denoise, self.path)
    return make(denoise, self.path, **options), steps


# Settings of `Inference.sample`, as they are unless they are given.
SAMPLING = {
  name: parameter.default
  for name, parameter in inspect.signature(Inference.sample).parameters.items()
  if parameter.default is not parameter.empty
}

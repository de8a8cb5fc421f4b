"""What anyone may ask of a trained model: represent, reconstruct, denoise, sample."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umd import samplers
from umd.masks import Mask, mask_from_noise, num_kept, patchify, unpatchify
from umd.models.network import Network, feature_widths, num_tokens, predict
from umd.paths import Path
from umd.samplers import Sampling
from umd.samplers.guidance import guide
from umd.samplers.keys import example_normal, example_uniform, split


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
    """Names what `represent` returns."""
    return tuple(feature_widths(self.model))

  def represent(
    self, params, images: Float[Array, "b h w c"], keys: Array, t: float = 0
  ) -> dict[str, Float[Array, "b _"]]:
    """Represents images noised to time t (0: clean), with one key per example.

    Returns what the network's `represent` does, {name: [B, D]}.
    """
    inputs, times = self._noised(images, keys, t)
    return self.model.apply({"params": params}, inputs, times, method="represent")

  def reconstruct(
    self,
    params,
    images: Float[Array, "b h w c"],
    keys: Array,
    mask_ratio: float,
    t: float = 0,
    mask: Mask | None = None,
  ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Fills in masked patches with the x0 head.

    The masked patches are a random share `mask_ratio` of all, or those of `mask`.

    Returns (reconstruction, masked): the images with their masked patches predicted, and a map of
    ones where they are.
    """
    noise_keys, mask_keys = split(keys)
    if mask is None:
      tokens = num_tokens(self.model)
      noise = example_uniform(mask_keys, (tokens,))
      mask = mask_from_noise(noise, num_kept(tokens, mask_ratio))
    inputs, times = self._noised(images, noise_keys, t)
    filled = predict(self.model, params, inputs, times, None, mask)["x0"]
    patch = self.model.patch
    shape = patchify(images, patch).shape
    masked = jnp.broadcast_to(mask.masked[:, :, None], shape)
    where = unpatchify(masked, patch, images.shape[1:3])
    return jnp.where(where > 0, filled, images), where

  def _noised(self, images, keys, t) -> tuple[Array, Array]:
    """Noises images to time t; returns what the network is shown and the times it is told."""
    eps = example_normal(keys, images.shape[1:])
    x_t = self.path.combine("x_t", images, eps, jnp.full(len(images), t))
    return self.path.input_scale(t) * x_t, jnp.full(len(images), self.path.time_input(t))

  def denoiser(
    self, params, labels: Int[Array, "b"] | None, sampling: Sampling
  ) -> samplers.Denoiser:
    """Makes `denoise(x_t, t) -> (x0, eps)` of one head, with classifier-free guidance.

    Raises:
      ValueError: the head does not determine x0 where sampling starts, or guidance is asked of a
        model without labels or of more channels than there are.
    """
    self._check(labels, sampling)
    model, path = self.model, self.path

    def prediction(x_t, t, labels):
      times = jnp.full(len(x_t), path.time_input(t))
      return predict(model, params, path.input_scale(t) * x_t, times, labels)[sampling.head]

    guided = guide(prediction, labels, model.num_classes, path, sampling)
    return lambda x_t, t: path.invert(sampling.head, guided(x_t, t), x_t, t)

  def _check(self, labels, sampling: Sampling) -> None:
    """Raises what `denoiser` does."""
    model, channels = self.model, self.model.image_size[2]
    if sampling.head not in model.heads:
      raise ValueError(f"head={sampling.head!r} is not among the model's heads {model.heads}.")
    if not self.path.invertible(sampling.head):
      raise ValueError(
        f"head={sampling.head!r} does not determine x0 at every time of path "
        f"{self.path.name!r}. Sample with another of {model.heads}."
      )
    if sampling.cfg_scale != 1 and (labels is None or not model.num_classes):
      raise ValueError(
        f"cfg_scale={sampling.cfg_scale} guides by labels, but there are none. Set cfg_scale=1 or "
        "train with labels."
      )
    if not 0 <= sampling.cfg_channels <= channels:
      raise ValueError(
        f"cfg_channels={sampling.cfg_channels} must be in [0, {channels}], the channels that the "
        "model sees; 0 guides them all."
      )

  def make_sampler(
    self, params, labels: Int[Array, "b"] | None, sampling: Sampling
  ) -> samplers.Sampler:
    """Makes the sampler that the settings stand for.

    Raises:
      ValueError: see `denoiser` and `samplers.make_sampler`.
    """
    return samplers.make_sampler(sampling, self.denoiser(params, labels, sampling), self.path)

  def noise(self, keys: Array) -> tuple[Float[Array, "b h w c"], Array]:
    """Draws (noise at the end of the path, keys of what is drawn on the way)."""
    start, on_the_way = split(keys)
    return self.path.start_scale * example_normal(start, self.model.image_size), on_the_way

  def sample(
    self, params, keys: Array, labels: Int[Array, "b"] | None, sampling: Sampling
  ) -> Float[Array, "b h w c"]:
    """Draws images from noise.

    Args:
      params: model parameters, as a rule the EMA's.
      keys: one per image; the noise at the start and on the way is a function of it.
      labels: [B] classes, or None to sample without.
      sampling: the settings.

    Raises:
      ValueError: see `make_sampler`.
    """
    return samplers.walk(self.make_sampler(params, labels, sampling), *self.noise(keys))

  def trace(
    self, params, keys: Array, labels: Int[Array, "b"] | None, sampling: Sampling
  ) -> samplers.Trajectory:
    """Returns what `sample` passes on its way; the last x_t are its samples."""
    return samplers.trace(self.make_sampler(params, labels, sampling), *self.noise(keys))

  def inpaint(
    self,
    params,
    keys: Array,
    labels: Int[Array, "b"] | None,
    known: Float[Array, "b h w c"],
    mask: Float[Array, "b h w 1"],
    sampling: Sampling,
    resampling: int = 1,
  ) -> Float[Array, "b h w c"]:
    """Draws `known` anew where the mask is 1; see `samplers.inpaint` and `sample`."""
    sampler, noise = self.make_sampler(params, labels, sampling), self.noise(keys)
    return samplers.inpaint(sampler, *noise, known, mask, resampling)

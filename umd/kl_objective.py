"""What a KL auto-encoder learns from: errors of reconstructions, the KL of latents; and their mean.

After Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from umd.models.vae import KLAutoEncoder

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

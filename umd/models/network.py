"""The protocol of networks: images in, images out, and what one may ask of any of them.

Objectives, samplers, evaluators, FLOP counts and memory estimates know a network by this protocol
alone. A new network is therefore one file in `umd/models/` and one entry of `umd.models.MODELS`.

Shapes: B images, H x W pixels of C channels, N tokens (patches), K of them kept, D features.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from umd.masks import Mask


class Input(NamedTuple):
  """What a network is shown of a part of a batch.

  Attributes:
    images: x_t, [B, H, W, C]. Of the patches only those in `mask.keep` may be looked at.
    t: times, 0 being clean: [B], or [B, N] where every token has a time of its own.
    labels: class labels [B], or None for "no label".
    mask: which patches are kept; None keeps all.
  """

  images: Array
  t: Array
  labels: Array | None = None
  mask: Mask | None = None


@runtime_checkable
class Network(Protocol):
  """A Flax module that the rest of the code can train, probe and sample.

  Attributes:
    image_size: (H, W, C) of images or latents.
    num_classes: number of labels, 0 for a network without labels. Label `num_classes` stands for
      "no label".
    heads: what is predicted for every pixel: quantities that a path knows (x0, eps, v, ...).
    patch: side of a patch in pixels, the unit of masks and scores; 1 for a convolutional network.
  """

  image_size: tuple[int, int, int]
  num_classes: int
  heads: tuple[str, ...]
  patch: int

  def predict(self, inputs: Sequence[Input], groups: int = 1) -> list[dict[str, Array]]:
    """Predicts every head, {head: [B, H, W, C]} float32, for several parts of a batch.

    The parts may differ in rows and in how many patches they keep. `groups` says how the rows of
    the parts interleave in the batch (see `umd.devices.mesh.join_rows`), for a network that
    takes the parts through some layers together.
    """

  def represent(self, images: Array, t: Array, labels: Array | None = None) -> dict[str, Array]:
    """Features of whole images at times t, float32: {name: [B, D]}."""


def grid(network: Network) -> tuple[int, int]:
  """Rows and columns of patches in an image."""
  height, width, _ = network.image_size
  return height // network.patch, width // network.patch


def num_tokens(network: Network) -> int:
  """N, the number of patches in an image."""
  rows, columns = grid(network)
  return rows * columns


def init_params(network: Network, key: Array) -> dict:
  """Fresh parameters: those that `predict` uses."""
  image = jnp.zeros((1, *network.image_size))
  inputs = [Input(image, jnp.zeros(1, jnp.int32))]
  return network.init(key, inputs, method="predict")["params"]


def param_shapes(network: Network) -> dict:
  """Shapes and types of the parameters, without computing any."""
  return jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))


def predict(network: Network, params, images, t, labels=None, mask=None) -> dict[str, Array]:
  """Predicts every head, {head: [B, H, W, C]}, of one batch; arguments as in `Input`."""
  inputs = [Input(images, t, labels, mask)]
  return network.apply({"params": params}, inputs, method="predict")[0]


def feature_widths(network: Network) -> dict[str, int]:
  """{name: D} of what `represent` returns."""

  def represent(key):
    image, t = jnp.zeros((1, *network.image_size)), jnp.zeros(1, jnp.int32)
    return network.init_with_output(key, image, t, method="represent")[0]

  features = jax.eval_shape(represent, jax.random.key(0))
  return {name: x.shape[-1] for name, x in features.items()}

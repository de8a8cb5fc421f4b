"""Cheap things that take the place of expensive ones in tests."""

import functools
import socket

import jax
import jax.numpy as jnp
import numpy as np

from umd.codecs import codec
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.codecs.vae_files import VaeWeights
from umd.metrics import features as extraction
from umd.metrics.inception import LOGITS, POOL, SPATIAL
from umd.metrics.quantize import quantize

WIDTHS = {"pool": POOL, "spatial": SPATIAL, "logits": LOGITS}


def features(levels, xp=np):
  """{pool, spatial, logits} of levels [n, h, w, 1 or 3]: fixed random projections."""
  rgb = xp.broadcast_to(levels, (*levels.shape[:3], 3)).reshape(len(levels), -1) / 255
  draw = lambda width: np.random.default_rng(width).standard_normal((rgb.shape[1], width))
  return {name: xp.tanh(rgb @ draw(width).astype(np.float32) / 8) for name, width in WIDTHS.items()}


def small_inception(setattr):
  """Puts `features` in Inception's place in `umd.metrics.features`; returns it, for NumPy arrays.

  `setattr` is the built-in one, or a monkeypatch's.
  """
  look = lambda params, images, how, mesh: features(quantize(images, how), jnp)
  setattr(extraction, "look", look)
  setattr(extraction, "find_network", lambda path="", tell=None: "weights.pth")
  network = lambda file, mesh: extraction.LoadedInception({"none": jnp.zeros(())}, "5eed")
  setattr(extraction, "load_network", network)
  return lambda levels: features(np.asarray(levels, np.float32))


@functools.cache
def random_weights(architecture: Architecture, seed: int = 0) -> VaeWeights:
  """VaeWeights of a KL auto-encoder, drawn at random, biases among them; NumPy."""
  side, channels = architecture.factor, architecture.in_channels
  network = KLAutoEncoder(architecture)
  blank = jnp.zeros((1, side, side, channels)), jnp.zeros((1, 1, 1, architecture.latent_channels))
  shapes = jax.eval_shape(network.init, jax.random.key(0), *blank)["params"]
  rng = np.random.default_rng(seed)
  draw = lambda leaf: rng.normal(0, leaf.size**-0.25 / 2, leaf.shape).astype(np.float32)
  return VaeWeights(f"random {seed}", architecture, jax.tree.map(draw, shapes), f"{seed:x}" * 64)


# Stable Diffusion's but for the widths, and one of half as many pixels a side for each latent.
TINY = Architecture(block_out_channels=(2, 2, 2, 2), layers_per_block=1, norm_num_groups=1)
HALF = Architecture(
  block_out_channels=(4, 8),
  layers_per_block=1,
  norm_num_groups=2,
  scaling_factor=0.5,
  shift_factor=0.25,
)


def small_vae(setattr):
  """Puts a tiny auto-encoder in the place of each published one, "small" among their names."""
  small = {"small": random_weights(HALF), "other": random_weights(HALF, 1)}
  find = lambda name: small.get(name) or random_weights(TINY)._replace(name=name)
  setattr(codec.vae_files, "load", find)


class Function:
  """A function (params, batch, key) -> (loss, terms) as an objective that draws nothing itself."""

  def __init__(self, fn):
    self.fn = fn

  def draw(self, batch, key):
    return batch, key

  def __call__(self, params, drawn):
    return self.fn(params, *drawn)


def at_once(objective):
  """An objective as a function (params, batch, key) -> (loss, terms)."""
  return lambda params, batch, key: objective(params, objective.draw(batch, key))


def free_port() -> int:
  """A TCP port of this machine that nothing listens on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def object_store(monkeypatch):
  """Lets `etils.epath` find gs:// in memory, empty, as it finds it with gcsfs in the network."""
  from etils.epath import backend, gpath
  from fsspec.implementations.memory import MemoryFileSystem

  class Objects(MemoryFileSystem):
    protocol = ("gs",)
    cachable = False
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
      return "/" + str(path).removeprefix("gs://").strip("/")

  objects = Objects()
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
  monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: objects)
  return objects

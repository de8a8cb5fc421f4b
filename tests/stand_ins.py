"""Cheap things that take the place of expensive ones in tests."""

import jax.numpy as jnp
import numpy as np

from umd import extraction
from umd.models.inception import LOGITS, POOL, SPATIAL
from umd.quantize import quantize

WIDTHS = {"pool": POOL, "spatial": SPATIAL, "logits": LOGITS}


def features(levels, xp=np):
  """{pool, spatial, logits} of levels [n, h, w, 1 or 3]: fixed random projections."""
  rgb = xp.broadcast_to(levels, (*levels.shape[:3], 3)).reshape(len(levels), -1) / 255
  draw = lambda width: np.random.default_rng(width).standard_normal((rgb.shape[1], width))
  return {name: xp.tanh(rgb @ draw(width).astype(np.float32) / 8) for name, width in WIDTHS.items()}


def small_inception(setattr):
  """Puts `features` in Inception's place in `umd.extraction`; returns it, for NumPy arrays.

  `setattr` is the built-in one, or a monkeypatch's.
  """
  look = lambda params, images, how, mesh: features(quantize(images, how), jnp)
  setattr(extraction, "look", look)
  setattr(extraction, "find_network", lambda path="", tell=None: "weights.pth")
  network = lambda file, mesh: extraction.Network({"none": jnp.zeros(())}, "5eed")
  setattr(extraction, "load_network", network)
  return lambda levels: features(np.asarray(levels, np.float32))

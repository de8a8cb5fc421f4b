"""Rounds images in [-1, 1] to the 256 levels of image files, in the ways of several papers.

Samples are measured as they would be read back from a file. The ways differ by up to one level, so
a result should say which was used.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

QUANTIZERS: dict[str, Callable] = {
  "round": lambda x: jnp.round(127.5 * (x + 1.0)),  # to the nearest level
  "adm": lambda x: jnp.trunc((x + 1.0) * 127.5),  # Dhariwal & Nichol, arXiv:2105.05233
  "dit": lambda x: jnp.trunc(127.5 * x + 128.0),  # Peebles & Xie, arXiv:2212.09748
  "none": lambda x: 127.5 * (x + 1.0),
}


def check(how: str) -> None:
  """Raises ValueError unless `how` is a key of QUANTIZERS."""
  if how not in QUANTIZERS:
    raise ValueError(f"quantize={how!r} is not one of {list(QUANTIZERS)}.")


def quantize(images: Float[Array, "*b h w c"], how: str) -> Float[Array, "*b h w c"]:
  """Maps images in [-1, 1] to levels 0..255, whole unless `how` is "none"; others are clipped.

  Only "round" gives back the levels of images that were read from 8 bits: in float32 127.5 (x + 1)
  lies a little below them as often as above.
  """
  check(how)
  return jnp.clip(QUANTIZERS[how](images.astype(jnp.float32)), 0.0, 255.0)

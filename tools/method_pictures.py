"""Draws, for one image, what each method shows to the network and what it scores.

TFDS_DATA_DIR=DATA bash run.sh tools.method_pictures --data tfds:cifar10 --split test[26:27]

A row per stream, made by the very functions that train: the image, the image at the stream's
timestep, the patches that the encoder sees, and the patches that each term scores, with its target.
"""

import argparse
import os
import sys
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.

import jax
import jax.numpy as jnp
import numpy as np

from configs.methods import METHODS, streams_of
from umd import data
from umd.masks import mask_from_noise, num_kept, patchify, unpatchify
from umd.objectives import WHERE, Stream, make_streams
from umd.paths import make_path

HIDDEN, UNSCORED = 0.5, 0.97  # Grey levels.
SHARE = 0.4  # Of T: the timestep at which noised streams are shown.
FLOW = {
  "noised": dict(
    rows=(0.0, 1.0),
    timesteps="uniform",
    mask_ratio=0.0,
    labels=True,
    terms=dict(v=dict(head="v", where="all", weight=1.0)),
  )
}


class Panel(NamedTuple):
  """A picture [H, W, C] in [-1, 1] with grey in place of what does not count, and its title."""

  title: str
  image: np.ndarray
  share: float = 1.0


def methods() -> dict[str, tuple[str, dict]]:
  """{name: (path, streams as in a config)}."""
  rows = {name: (row.path, streams_of(name)) for name, row in METHODS.items()}
  return {**rows, "flow": ("flow", FLOW)}


def _blank(image, where, patch: int, level: float) -> np.ndarray:
  """An image [1, H, W, C] with the patches that `where` [1, N] leaves out in grey."""
  tokens = patchify(image, patch)
  tokens = jnp.where(where[..., None] > 0, tokens, 2 * level - 1)
  return np.asarray(unpatchify(tokens, patch, image.shape[1:3])[0])


def panels(stream: Stream, path_name: str, image, patch: int, seed: int = 0) -> list[Panel]:
  """What becomes of an image [1, H, W, C] in a stream."""
  path, keys = make_path(path_name), jax.random.split(jax.random.key(seed), 2)
  tokens = image.shape[1] * image.shape[2] // patch**2
  eps = jax.random.normal(keys[0], image.shape)
  t = jnp.array([0 if stream.timesteps == "clean" else round(SHARE * path.timesteps)])
  x_t = path.combine("x_t", image, eps, t)
  noise = jax.random.uniform(keys[1], (1, tokens))
  masked = mask_from_noise(noise, num_kept(tokens, stream.mask_ratio)).masked
  noised = "t = 0: clean" if t[0] == 0 else f"t = {int(t[0])} of {path.timesteps}"
  hidden = f"{stream.mask_ratio:.3g} hidden" if stream.mask_ratio else "nothing hidden"
  found = [
    Panel("image", np.asarray(image[0])),
    Panel(noised, np.asarray(x_t[0])),
    Panel(f"encoder sees\n({hidden})", _blank(x_t, 1 - masked, patch, HIDDEN)),
  ]
  for term in stream.terms.values():
    where = WHERE[term.where](masked)
    target = _blank(path.combine(term.head, image, eps, t), where, patch, UNSCORED)
    title = f"{term.head} of {term.where} patches\n(weight {term.weight:g})"
    found.append(Panel(title, target, float(where.mean())))
  return found


def draw(name: str, image, patch: int, out: str) -> str:
  """Writes method_<name>.png to the folder `out`; returns its path."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  path, streams = methods()[name]
  streams = make_streams(streams)
  rows = [panels(stream, path, image, patch) for stream in streams]
  columns = max(map(len, rows))
  size = (1.5 * columns, 1.95 * len(rows))
  figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
  for stream, row, places in zip(streams, rows, axes, strict=True):
    for axis in places:
      axis.axis("off")
    for panel, axis in zip(row, places, strict=False):
      pixels = np.clip((panel.image + 1) / 2, 0, 1)
      axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, "gray", vmin=0, vmax=1)
      axis.set_title(panel.title, fontsize=7.5)
    share = stream.rows[1] - stream.rows[0]
    label = f"{stream.name}: {share:.0%} of the rows"
    places[0].text(-0.12, 0.5, label, fontsize=7.5, rotation=90, va="center", ha="right")
    places[0].texts[-1].set_transform(places[0].transAxes)
  figure.tight_layout(pad=0.6)
  file = os.path.join(out, f"method_{name}.png")
  figure.savefig(file, dpi=96)
  plt.close(figure)
  return file


def main(argv: list[str]) -> None:
  """Parses the command line; bad input becomes one line and exit status 1."""
  parser = argparse.ArgumentParser("tools.method_pictures", description=__doc__.split("\n")[0])
  parser.add_argument("--data", default="digits", help="a data spec's name (digits)")
  parser.add_argument("--split", default="test[3:4]", help="its first image is drawn (test[3:4])")
  parser.add_argument("--patch", type=int, default=0, help="side in px (an eighth of the image)")
  parser.add_argument("--out", default=".", metavar="DIR")
  args = parser.parse_args(argv)
  try:
    pp = "" if args.data == "digits" else "decode|value_range(-1, 1)"
    source = data.load(args.data, args.split, pp)
    image = jnp.asarray(next(data.eval_batches(source, 1))["image"])
    patch = args.patch or max(1, image.shape[1] // 8)
    if image.shape[1] % patch or image.shape[2] % patch:
      raise ValueError(f"--patch={patch} does not divide an image of {image.shape[1:3]} px.")
    os.makedirs(args.out, exist_ok=True)
    for name in methods():
      print(draw(name, image, patch, args.out))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv[1:])

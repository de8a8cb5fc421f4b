"""How large a config's model, state and streams are, from shapes alone."""

import math
from collections.abc import Mapping, Sequence

import jax

from trainers.autoencoder import Parts, init_params
from trainers.keys import PARTS
from umd import flops
from umd.codec import Latents, stored
from umd.memory import on_device
from umd.models.autoencoder import AutoEncoder
from umd.objectives import Stream, period, stream_rows
from umd.sharding import placed, state_shardings
from umd.state import TrainState, state_shapes

Rows = list[Sequence[str]]  # Of a table, headings first.


def state(parts: Parts) -> TrainState:
  """Shapes and types of all that is trained and saved."""
  return state_shapes(init_params(parts.model), parts.tx)


def nbytes_of_device(tree, mesh) -> int:
  """Bytes of the arrays that a tree of shapes stands for which one device of the mesh keeps."""
  return on_device(placed(tree, state_shardings(tree, mesh)))


def text(number: float) -> str:
  """1234567 (bytes) -> "1.23 MB"."""
  units = ["B", "kB", "MB", "GB", "TB"]
  while number >= 999.5 and len(units) > 1:
    number, units = number / 1000, units[1:]
  return f"{number:.3g} {units[0]}"


def _shapes(tree) -> list[Sequence[int]]:
  """Of anything with shapes: arrays, or what a checkpoint says of them."""
  return [leaf.shape for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape"))]


def count(params) -> int:
  """Number of parameters, from anything with shapes."""
  return sum(math.prod(shape) for shape in _shapes(params))


def _matrices(params) -> str:
  """The shapes of a part's matrices, or of its vectors if it has no others."""
  shapes = [shape for shape in _shapes(params) if len(shape) > 1] or _shapes(params)
  return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def parts(model: AutoEncoder, params: Mapping) -> Rows:
  """A row for each part of a model (those of `init_fresh`): what it is, its number of parameters.

  Args:
    model: the auto-encoder.
    params: its parameters, or anything with their shapes.
  """
  s, total = model.shape, count(params)
  blocks = {"encoder": s.depth, "decoder": s.decoder_depth}
  rows = [("part", "what", "parameters", "share")]
  for name in [*(p for p in PARTS if p in params), *sorted(params.keys() - {*PARTS})]:
    number, what = count(params[name]), _matrices(params[name])
    if name in blocks:
      what = f"{blocks[name]} blocks, width {s.width}, {s.heads} heads"
    rows.append((name, what, f"{number:,}", f"{100 * number / total:.1f} %"))
  return rows


def tokens(model: AutoEncoder, mask_ratio: float) -> tuple[int, int]:
  """How many tokens attend to one another in the encoder, and in the decoder."""
  return flops.tokens(model, model.keep(mask_ratio))


def streams(model: AutoEncoder, streams: Sequence[Stream], batch_size: int) -> Rows:
  """A row for each stream: what of the batch it gets, what the model sees, and what is scored."""
  size = period(streams, batch_size)
  rows = [("stream", "rows", "timesteps", "mask", "patches seen", "encoder", "decoder", "scored")]
  for s in streams:
    start, stop = stream_rows(s, size)
    rows.append(
      (
        s.name,
        f"{(stop - start) * batch_size // size} of {batch_size}",
        s.timesteps,
        f"{s.mask_ratio:g}",
        f"{model.keep(s.mask_ratio)} of {model.tokens}",
        *(f"{n} tokens" for n in tokens(model, s.mask_ratio)),
        " + ".join(f"{t.weight:g} {t.head} on {t.where}" for t in s.terms.values()),
      )
    )
  return rows


def operations(number: float) -> str:
  """1.234e9 -> "1.23 GFLOP"."""
  units = ["MFLOP", "GFLOP", "TFLOP", "PFLOP"]
  number /= 1e6
  while number >= 999.5 and len(units) > 1:
    number, units = number / 1000, units[1:]
  return f"{number:.3g} {units[0]}"


def compute(parts: Parts, batch_size: int) -> list[str]:
  """What a step of training takes, as lines: the model's products, and what encodes its images."""
  each = flops.train_step_parts(parts.model, parts.streams, batch_size)
  total, evaluation = sum(each.values()), sum(flops.forward(parts.model, 1).values())
  shares = ", ".join(f"{part} {100 * number / total:.1f} %" for part, number in each.items())
  lines = [
    f"{operations(total)} a step, {operations(total / batch_size)} an image: {shares}",
    f"{operations(evaluation)} a step of a sampler and image",
  ]
  if parts.work.peak:
    seconds = parts.work.flops / parts.work.peak
    lines.append(f"{seconds:.3g} s a step at {parts.work.peak / 1e12:.0f} TFLOP/s a device")
  if isinstance(parts.codec, Latents) and stored(parts.source) is None:
    encode = flops.encode(parts.codec.architecture, parts.source.image_size)
    lines.append(f"{operations(encode)} an image to encode it, which MFU does not count")
  return lines

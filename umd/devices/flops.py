"""How many floating-point operations a model's matrix multiplications take, from its sizes alone.

A product of [m, k] and [k, n] counts 2 m k n. What counts is what the model asks for, however it is
computed: patches that are masked are neither embedded nor encoded, the decoder sees every patch,
and the backward pass is twice the forward pass (Chowdhery et al. 2022, appendix B). Work that is
done again to save memory is not counted, nor is what is no matrix multiplication: norms, softmax,
GELU, masks, losses, the optimiser and the average. So `train_step` / seconds / peak is the model's
FLOP utilisation (MFU), not that of the hardware, and two ways to compute one step compare by it.

The backward pass really leaves a little out: no gradient is wanted of patches and of timesteps, so
`embed` and the first matrix of the time embedding are twice their forward pass in all, not three
times.
"""

from collections import Counter
from collections.abc import Sequence

from umd.codecs.vae import Architecture
from umd.models.autoencoder import AutoEncoder
from umd.objectives import Stream, period, stream_rows

# embed: patches to tokens. encoder, decoder: the matrices of their blocks. attention: its two
# products of tokens by tokens, in both. condition: embeddings of timestep and label, AdaLN's
# matrices. heads: tokens to pixels.
PARTS = ("embed", "encoder", "decoder", "attention", "condition", "heads")
BACKWARD = 2  # Gradients of inputs and of weights: a product each, as large as the forward one.

# AdaLN's tensors of a block: shift, scale and gate of attention and of MLP; of the head: no gate.
OF_BLOCK, OF_HEAD = 6, 2


def tokens(model: AutoEncoder, kept: int | None = None) -> tuple[int, int]:
  """How many tokens attend to one another in the encoder, and in the decoder.

  `kept` is the number of patches that the encoder sees, None for all.
  """
  kept = model.tokens if kept is None else kept
  condition = 1 if model.condition == "token" else 0
  return model.class_tokens + kept + condition, 1 + model.tokens + condition


def _block(tokens: int, width: int) -> tuple[float, float]:
  """(matrices, attention) of one image in one block: qkv, output and an MLP of 4 x the width."""
  matrices = 3 + 1 + 4 + 4  # of [D, D]
  return 2.0 * tokens * matrices * width**2, 2 * 2.0 * tokens**2 * width


def _condition(model: AutoEncoder) -> float:
  """Of one image: what is made of its timestep and label, for every layer."""
  width, layers = model.shape.width, model.shape.depth + model.shape.decoder_depth
  trunks = (2 + 2) * (2 if model.num_classes else 1)  # [D, 2 D] and [2 D, D] each
  blocks = {"adaln": layers * OF_BLOCK, "adaln_shared": OF_BLOCK, "token": 0}[model.condition]
  modulations = blocks + (OF_HEAD if model.condition != "token" else 0)
  return 2.0 * (trunks + modulations) * width**2


def forward(model: AutoEncoder, batch: int, kept: int | None = None) -> dict[str, float]:
  """FLOPs of one forward pass by PARTS.

  Args:
    model: the auto-encoder.
    batch: images.
    kept: patches of each that the encoder sees, as `model.keep` gives them; None for all.
  """
  shape, seen = model.shape, model.tokens if kept is None else kept
  pixels = shape.patch**2 * model.image_size[2]
  encoder, encoder_attention = _block(tokens(model, seen)[0], shape.width)
  decoder, decoder_attention = _block(tokens(model, seen)[1], shape.width)
  attention = shape.depth * encoder_attention + shape.decoder_depth * decoder_attention
  of_one = dict(
    embed=2.0 * seen * pixels * shape.width,
    encoder=shape.depth * encoder,
    decoder=shape.decoder_depth * decoder,
    attention=attention,
    condition=_condition(model),
    heads=2.0 * model.tokens * shape.width * len(model.heads) * pixels,
  )
  return {part: batch * number for part, number in of_one.items()}


def train_step_parts(
  model: AutoEncoder, streams: Sequence[Stream], batch_size: int
) -> dict[str, float]:
  """FLOPs of one step of training, forward and backward, by PARTS.

  Args:
    model: the auto-encoder.
    streams: each counts by the rows of the batch that it really gets.
    batch_size: B, over all devices.
  """
  size, total = period(streams, batch_size), Counter()
  for stream in streams:
    start, stop = stream_rows(stream, size)
    rows = (stop - start) * batch_size // size
    total.update(forward(model, rows, model.keep(stream.mask_ratio)))
  return {part: (1 + BACKWARD) * total[part] for part in PARTS}


def train_step(model: AutoEncoder, streams: Sequence[Stream], batch_size: int) -> float:
  """FLOPs of one step of training over all devices; see `train_step_parts`."""
  return sum(train_step_parts(model, streams, batch_size).values())


def sample(model: AutoEncoder, steps: int, guided: bool = False) -> float:
  """FLOPs of one image that a sampler draws in so many evaluations of the model.

  DDIM and DDPM evaluate it once a step, Heun twice but for the last. With guidance each evaluation
  is of two images, with the label and without.
  """
  return steps * (1 + guided) * sum(forward(model, 1).values())


def encode(architecture: Architecture, image_size: tuple[int, int, int]) -> float:
  """FLOPs by which a KL auto-encoder makes the latent of one image (H, W, C).

  Its convolutions (padding counts like pixels) and its attention. It is no part of `train_step`: it
  is not trained, and latents that are stored do without it.
  """
  arch, (height, width, channels) = architecture, image_size
  area, total = height * width, 0.0
  conv = lambda area, inputs, outputs, taps=9: 2.0 * area * taps * inputs * outputs
  resnet = lambda area, inputs, outputs: (
    conv(area, inputs, outputs)
    + conv(area, outputs, outputs)
    + (conv(area, inputs, outputs, taps=1) if inputs != outputs else 0.0)
  )
  widths, moments = arch.block_out_channels, 2 * arch.latent_channels
  total, inputs = conv(area, channels, widths[0]), widths[0]
  for level, features in enumerate(widths):
    for _ in range(arch.layers_per_block):
      total, inputs = total + resnet(area, inputs, features), features
    if level < len(widths) - 1:
      area //= 4
      total += conv(area, features, features)
  total += 2 * resnet(area, inputs, inputs)
  if arch.mid_block_add_attention:
    total += 4 * conv(area, inputs, inputs, taps=1) + 2 * 2.0 * area**2 * inputs
  total += conv(area, inputs, moments)
  return total + (conv(area, moments, moments, taps=1) if arch.use_quant_conv else 0.0)

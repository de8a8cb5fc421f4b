"""The Inception network of 2015-12-05: the features of FID, sFID and the Inception score.

It is the graph that TensorFlow published then, quirks and all, not the Inception-v3 of model zoos:
TensorFlow 1's bilinear resize, average pools that leave the padding out, a max pool in the last
block, 1008 logits (Szegedy et al. 2016; Heusel et al. 2017). True float32 on every accelerator.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

POOL, SPATIAL, LOGITS = 2048, 2023, 1008  # The widths of the three outputs.
SIDE = 299  # The pixels along a side of the images that the network sees.
BN, BN_EPS = ("weight", "bias", "running_mean", "running_var"), 1e-3
TRACKED = ".bn.num_batches_tracked"  # PyTorch's count of training steps.
EXACT = jax.lax.Precision.HIGHEST  # Otherwise TPUs take bfloat16 and GPUs TF32.


class Conv(NamedTuple):
  """A convolution without bias, its batch normalisation and ReLU; named as in PyTorch's file."""

  name: str
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"


class Pool(NamedTuple):
  """A 3 x 3 pool: stride 1 with padding, or stride 2 without."""

  kind: str
  stride: int = 1


SQUARE, ACROSS, DOWN = (3, 3), (1, 7), (7, 1)  # Kernels: height, width.
HALVE = (2, "VALID")  # Stride, padding.
REDUCE = Pool("max", 2)

# A chain is a tuple of these and of lists of chains: all chains of a list read one input, and their
# outputs are joined. A block is such a list.
STEM = (
  Conv("Conv2d_1a_3x3", 32, SQUARE, *HALVE),
  Conv("Conv2d_2a_3x3", 32, SQUARE, 1, "VALID"),
  Conv("Conv2d_2b_3x3", 64, SQUARE),
  REDUCE,
  Conv("Conv2d_3b_1x1", 80),
  Conv("Conv2d_4a_3x3", 192, SQUARE, 1, "VALID"),
  REDUCE,
)


def _numbered(name: str, *convs) -> tuple[Conv, ...]:
  return tuple(Conv(f"{name}_{i}", *conv) for i, conv in enumerate(convs, 1))


def _fork(name: str) -> list[tuple[Conv]]:
  return [(Conv(name + "a", 384, (1, 3)),), (Conv(name + "b", 384, (3, 1)),)]


def _block35(width: int) -> list:
  """Makes a block at 35 x 35 positions, with `width` features from the pool."""
  return [
    (Conv("branch1x1", 64),),
    _numbered("branch5x5", (48,), (64, (5, 5))),
    _numbered("branch3x3dbl", (64,), (96, SQUARE), (96, SQUARE)),
    (Pool("average"), Conv("branch_pool", width)),
  ]


def _block17(width: int) -> list:
  """Makes a block at 17 x 17 positions: 7 x 7 convolutions are split into 1 x 7 and 7 x 1."""
  across, down = (width, ACROSS), (width, DOWN)
  return [
    (Conv("branch1x1", 192),),
    _numbered("branch7x7", (width,), across, (192, DOWN)),
    _numbered("branch7x7dbl", (width,), down, across, down, (192, ACROSS)),
    (Pool("average"), Conv("branch_pool", 192)),
  ]


def _block8(kind: str) -> list:
  """Makes a block at 8 x 8 positions, with a pool of this kind."""
  return [
    (Conv("branch1x1", 320),),
    (Conv("branch3x3_1", 384), _fork("branch3x3_2")),
    (*_numbered("branch3x3dbl", (448,), (384, SQUARE)), _fork("branch3x3dbl_3")),
    (Pool(kind), Conv("branch_pool", 192)),
  ]


BLOCKS = {
  "Mixed_5b": _block35(32),
  "Mixed_5c": _block35(64),
  "Mixed_5d": _block35(64),
  "Mixed_6a": [
    (Conv("branch3x3", 384, SQUARE, *HALVE),),
    _numbered("branch3x3dbl", (64,), (96, SQUARE), (96, SQUARE, *HALVE)),
    (REDUCE,),
  ],
  "Mixed_6b": _block17(128),
  "Mixed_6c": _block17(160),
  "Mixed_6d": _block17(160),
  "Mixed_6e": _block17(192),
  "Mixed_7a": [
    _numbered("branch3x3", (192,), (320, SQUARE, *HALVE)),
    _numbered("branch7x7x3", (192,), (192, ACROSS), (192, DOWN), (192, SQUARE, *HALVE)),
    (REDUCE,),
  ],
  "Mixed_7b": _block8("average"),
  "Mixed_7c": _block8("max"),  # A slip of the graph, which all published FIDs share.
}


def _declare(steps: tuple, channels: int) -> tuple[dict, int]:
  """Returns the shapes of a chain's parameters, nested as they are, and its output's channels."""
  shapes = {}
  for step in steps:
    if isinstance(step, Conv):
      wide, kernel = (step.features,), (*step.kernel, channels, step.features)
      shapes[step.name] = {"kernel": kernel, "scale": wide, "bias": wide}
      channels = step.features
    elif isinstance(step, list):
      parts = [_declare(chain, channels) for chain in step]
      shapes |= {name: shape for part, _ in parts for name, shape in part.items()}
      channels = sum(width for _, width in parts)
  return shapes, channels


def _shapes() -> dict:
  shapes, channels = _declare(STEM, 3)
  for name, block in BLOCKS.items():
    shapes[name], channels = _declare((block,), channels)
  return shapes | {"fc": {"kernel": (channels, LOGITS)}}


SHAPES = _shapes()


def _neighbours(size: int):
  """Returns two neighbours among `size` pixels of each of 299 positions, and the second's weight.

  They are computed in float32, as TensorFlow does.
  """
  position = np.arange(SIDE, dtype=np.float32) * (np.float32(size) / np.float32(SIDE))
  low = position.astype(np.int32)
  return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)


def resize(images: Float[Array, "b h w c"]) -> Float[Array, "b 299 299 c"]:
  """Resizes to 299 x 299 as TensorFlow 1 did: output i reads the input at i * size / 299.

  No half-pixel offset, no aligned corners, no antialiasing: other libraries' resizes differ.
  """
  low, high, weight = _neighbours(images.shape[2])
  left = images[:, :, low]
  images = left + (images[:, :, high] - left) * weight[:, None]
  low, high, weight = _neighbours(images.shape[1])
  top = images[:, low]
  return top + (images[:, high] - top) * weight[:, None, None]


def _convolve(x, kernel, stride: int, padding: str):
  if kernel.shape[:2] == (1, 1):
    return jnp.matmul(x, kernel[0, 0], precision=EXACT)
  layout, strides = ("NHWC", "HWIO", "NHWC"), (stride, stride)
  return jax.lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=layout, precision=EXACT
  )


def _pool(x, pool: Pool):
  """Pools by three shifted slices, columns and then rows: on CPUs faster than reduce_window."""
  join, empty = (jnp.maximum, -jnp.inf) if pool.kind == "max" else (jnp.add, 0.0)
  edge = int(pool.stride == 1)
  for axis in (2, 1):
    size = x.shape[axis]
    pads = [(edge, edge) if i == axis else (0, 0) for i in range(4)]
    padded = jnp.pad(x, pads, constant_values=empty)
    stop = padded.shape[axis] - 2
    parts = [jax.lax.slice_in_dim(padded, i, i + stop, pool.stride, axis) for i in range(3)]
    x = join(join(parts[0], parts[1]), parts[2])
    if pool.kind == "average":  # the padding does not count: 2 pixels at the borders
      count = np.array([2.0] + [3.0] * (size - 2) + [2.0], np.float32)
      x = x / np.expand_dims(count, [i for i in range(4) if i != axis])
  return x


def _chain(x, steps: tuple, params: Mapping):
  for step in steps:
    if isinstance(step, Conv):
      conv = params[step.name]
      x = _convolve(x, conv["kernel"], step.stride, step.padding)
      x = nn.relu(x * conv["scale"] + conv["bias"])
    elif isinstance(step, Pool):
      x = _pool(x, step)
    else:
      x = jnp.concatenate([_chain(x, chain, params) for chain in step], axis=-1)
  return x


def _trunk(x, params: Mapping) -> dict:
  """Computes all outputs from the 35 x 35 positions that the stem leaves."""
  for name, block in BLOCKS.items():
    x = _chain(x, (block,), params[name])
    if name == "Mixed_6d":  # Its first channels are branch1x1, the graph's node mixed_6/conv.
      spatial = x[..., :7].reshape(len(x), -1)
  pool = x.mean(axis=(1, 2))
  logits = jnp.matmul(pool, params["fc"]["kernel"], precision=EXACT)
  return {"pool": pool, "spatial": spatial, "logits": logits}


def _in_chunks(function: Callable, x, size: int):
  """Computes function(x), on a CPU a few rows at a time, so that they stay in its caches."""
  if jax.default_backend() != "cpu":
    return function(x)
  size = max(n for n in range(1, size + 1) if len(x) % n == 0)
  parts = jax.lax.map(function, x.reshape(-1, size, *x.shape[1:]))
  return jax.tree.map(lambda y: y.reshape(len(x), *y.shape[2:]), parts)


class _Parameters(nn.Module):
  """Parameters by name, nested as `shapes` is."""

  shapes: Mapping

  @nn.compact
  def __call__(self) -> dict:
    init = nn.initializers
    inits = {"kernel": init.he_normal(), "scale": init.ones, "bias": init.zeros}
    nested = lambda name, shape: _Parameters(shape, name=name)()
    leaf = lambda name, shape: self.param(name, inits[name], shape, jnp.float32)
    kind = lambda shape: nested if isinstance(shape, Mapping) else leaf
    return {name: kind(shape)(name, shape) for name, shape in self.shapes.items()}


class Inception(nn.Module):
  """Computes float32 features of float32 images [B, H, W, 3] in [0, 255] of any size.

  "pool" [B, 2048] is for FID, "spatial" [B, 2023] for sFID, "logits" [B, 1008], without their bias
  and before the softmax, for the Inception score. "spatial" is the graph's node mixed_6/conv (Nash
  et al. 2021; Dhariwal & Nichol 2021): the first 7 channels of Mixed_6d.branch1x1 after batch
  normalisation and ReLU, flattened in the order row, column, channel.

  Raises:
    ValueError: the images do not have three channels.
  """

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"]) -> dict[str, Float[Array, "b _"]]:
    if images.shape[-1] != 3:
      raise ValueError(f"Images have {images.shape[-1]} channels, not 3. Repeat grey ones 3 times.")
    params = {name: _Parameters(shapes, name=name)() for name, shapes in SHAPES.items()}
    # The graph's constant is 128, not 127.5: black is -1, white is 127/128.
    stem = lambda x: _chain((resize(x) - 128) / 128, STEM, params)
    return _in_chunks(lambda x: _trunk(x, params), _in_chunks(stem, images, 1), 4)


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict:
  """Makes parameters from the tensors of PyTorch's file of this network, by their names there.

  Batch normalisations become a scale and a bias. `fc.bias` and `num_batches_tracked` are not used.

  Raises:
    ValueError: tensors are missing, unexpected or of wrong shapes.
  """
  shapes = flatten_dict(SHAPES, sep=".")
  layers = {key.removesuffix(".kernel"): s for key, s in shapes.items() if len(s) == 4}
  expected = {"fc.weight": shapes["fc.kernel"][::-1]}
  for layer, (height, width, inputs, outputs) in layers.items():
    expected[f"{layer}.conv.weight"] = (outputs, inputs, height, width)
    expected |= {f"{layer}.bn.{part}": (outputs,) for part in BN}
  given = {k: v for k, v in tensors.items() if k != "fc.bias" and not k.endswith(TRACKED)}
  wrong = [f"{key} is missing" for key in expected if key not in given]
  wrong += [f"{key} is unexpected" for key in given if key not in expected]
  both = [(key, given[key].shape, shape) for key, shape in expected.items() if key in given]
  wrong += [f"{key} has shape {got}, not {shape}" for key, got, shape in both if got != shape]
  if wrong:
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise ValueError(
      f"These are not the tensors of the Inception of 2015-12-05: {'; '.join(wrong[:5])}{more}. "
      "Give pt_inception-2015-12-05-6726825d.pth, as pytorch-fid and torch-fidelity publish it."
    )
  params = {"fc.kernel": given["fc.weight"].T}
  for layer in layers:
    gain, bias, mean, var = (given[f"{layer}.bn.{part}"].astype(np.float64) for part in BN)
    scale = gain / np.sqrt(var + BN_EPS)
    params[f"{layer}.kernel"] = given[f"{layer}.conv.weight"].transpose(2, 3, 1, 0)
    params |= {f"{layer}.scale": scale, f"{layer}.bias": bias - mean * scale}
  params = {key: np.ascontiguousarray(value, np.float32) for key, value in params.items()}
  return unflatten_dict(params, sep=".")

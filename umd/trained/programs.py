"""What a trained model computes on the devices: pixels in, pixels out, compiled per setting."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from umd.codecs.codec import Codec, Weights, encode_examples
from umd.devices.mesh import batch_sharding, on, put_batch, replicated, run_ahead
from umd.masks import mask_from_noise
from umd.metrics.quantize import check, quantize
from umd.samplers import Sampling, State
from umd.samplers.keys import fold
from umd.trained.inference import Inference


class Denoised(NamedTuple):
  """The state of n samples after a step of a sampler.

  Attributes:
    step: the number of the step, 1..S.
    t: the time that the step reached; 0 after the last one.
    x0: the clean images that the model predicted, [n, H, W, C]; the last are the samples.
  """

  step: int
  t: int
  x0: np.ndarray


def to_floats(images: jax.Array) -> jax.Array:
  """Scales uint8 images to [-1, 1], and leaves floats as they are."""
  return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def to_levels(images: jax.Array, how: str) -> jax.Array:
  """Rounds images in [-1, 1], or a little beyond, to uint8; how="none" clips them to [-1, 1]."""
  images = jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
  return images if how == "none" else quantize(images, how).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Programs:
  """The programs `(weights, key, rows, **static) -> [B, ...]` of a model, and how they are run.

  `rows` is {name: [B, ...]} of a batch, with the places "index" of its images in the call, on which
  their random numbers depend. Static arguments are compiled into the program.

  Attributes:
    inference: the network with its path.
    codec: what the network sees pixels through.
    mesh: the devices, over which all arguments but the weights are split.
  """

  inference: Inference
  codec: Codec
  mesh: Mesh
  _compiled: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

  def represent(self, weights: Weights, key, rows, *, features: str, t: float):
    """Returns features [B, D] of rows {image}."""
    keys = fold(key, rows["index"])
    seen = self._encode(weights, keys, to_floats(rows["image"]))
    return self.inference.represent(weights.model, seen, keys, t)[features]

  def reconstruct(
    self, weights: Weights, key, rows, *, how: str, mask_ratio: float = 0.0, keep: int = 0
  ):
    """Fills in hidden patches of rows {image}; returns (images, where they were hidden [B, H, W]).

    It hides a random share of patches or, with `keep`, those that rows {hidden [B, N]} say, which
    leave so many visible.
    """
    keys, images = fold(key, rows["index"]), to_floats(rows["image"])
    mask = mask_from_noise(rows["hidden"], keep) if keep else None
    seen = self._encode(weights, keys, images)
    filled, masked = self.inference.reconstruct(weights.model, seen, keys, mask_ratio, 0, mask)
    where = self.codec.spread(masked)[..., :1] > 0
    made = jnp.where(where, self.codec.decode(weights.codec, filled), images)
    return to_levels(made, how), where[..., 0]

  def sample(self, weights: Weights, key, rows, *, how: str, sampling: Sampling):
    """Draws images [B, H, W, C] of rows {label}, or of rows without."""
    keys = fold(key, rows["index"])
    made = self.inference.sample(weights.model, keys, rows.get("label"), sampling)
    return to_levels(self.codec.decode(weights.codec, made), how)

  def trace(self, weights: Weights, key, rows, *, how: str, sampling: Sampling):
    """([B, S, H, W, C], [B, S + 1, H, W, C]): what `sample` passes, x0 and x_t."""
    keys = fold(key, rows["index"])
    passed = self.inference.trace(weights.model, keys, rows.get("label"), sampling)
    show = lambda x: to_levels(self.codec.decode(weights.codec, x), how)
    return tuple(jnp.moveaxis(jax.lax.map(show, frames), 0, 1) for frames in passed)

  def begin(self, weights: Weights, key, rows, *, sampling: Sampling) -> State:
    """Returns the state in which the sampler starts."""
    sampler = self.inference.make_sampler(weights.model, rows.get("label"), sampling)
    return self._placed(sampler.start(self.inference.noise(fold(key, rows["index"]))[0]))

  def advance(self, weights: Weights, key, rows, state: State, t, s, *, sampling: Sampling):
    """Takes a step from t to s, both scalars; returns (state at s, x0 as the model sees it)."""
    sampler = self.inference.make_sampler(weights.model, rows.get("label"), sampling)
    keys = self.inference.noise(fold(key, rows["index"]))[1]
    return self._placed(sampler.step(state, keys, t, s))

  def show(self, weights: Weights, x0, *, how: str):
    """Decodes what the model sees to images [B, H, W, C]."""
    return self._placed(to_levels(self.codec.decode(weights.codec, x0), how))

  def inpaint(self, weights: Weights, key, rows, *, how: str, resampling: int, sampling: Sampling):
    """Draws images of rows {image, mask [B, H, W], places} anew where the mask is 1.

    `places` [B, h, w, 1] is the mask of what the model sees.
    """
    keys, images = fold(key, rows["index"]), to_floats(rows["image"])
    known, labels = self._encode(weights, keys, images), rows.get("label")
    made = self.inference.inpaint(
      weights.model, keys, labels, known, rows["places"], sampling, resampling
    )
    made = self.codec.decode(weights.codec, made)
    return to_levels(jnp.where(rows["mask"][..., None], made, images), how)

  def _on_the_mesh(self, program: Callable, *args, **static):
    with on(self.mesh):
      return program(*args, **static)

  def _placed(self, tree):
    """Splits arrays over the devices, so that a step's output fits the next step's input."""
    split, whole = batch_sharding(self.mesh), replicated(self.mesh)
    place = lambda x: jax.lax.with_sharding_constraint(x, split if x.ndim else whole)
    return jax.tree.map(place, tree)

  def _encode(self, weights: Weights, keys, images):
    return encode_examples(self.codec, weights.codec, images, keys)

  def compiled(self, name: str, **static) -> Callable:
    """Returns a program, which compiles at its first call with rows of a new size."""
    if "how" in static:
      check(static["how"])
    key = name, *sorted(static.items())
    if key not in self._compiled:
      program = functools.partial(self._on_the_mesh, getattr(self, name), **static)
      # The programs of single steps also return scalars and say themselves where arrays go.
      placed = name in ("begin", "advance", "show")
      shardings = {} if placed else {"out_shardings": batch_sharding(self.mesh)}
      self._compiled[key] = jax.jit(program, **shardings)
    return self._compiled[key]

  def steps(
    self, weights: Weights, seed: int, rows: Mapping, how: str, every: int, sampling: Sampling
  ) -> Iterator[Denoised]:
    """Samples all rows {index, label} at once, and yields what is there after every so many steps.

    Each step is a call of one program, which does not depend on the number and the places of the
    steps. While the caller looks at one step, the next ones are computed.

    Args:
      weights: those of model and codec.
      seed: the seed of the noise.
      rows: the samples; without "label" for samples without labels.
      how: see `to_levels`.
      every: x0 is decoded and yielded after so many steps each, and after the last one.
      sampling: see `Inference.sample`.

    Raises:
      ValueError: the seed, `every` or the sampling makes no sense.
    """
    check(how)
    if every < 1:
      raise ValueError(f"every={every} must be at least 1: each step is shown.")
    key, n = _key(seed), len(rows["index"])
    rows = put_batch(_padded(rows, 0, self._size(n, n)), self.mesh)
    times = self.inference.make_sampler(weights.model, rows.get("label"), sampling).times
    # Number and places of the steps are no part of the program of one step.
    one = dataclasses.replace(sampling, steps=1, spacing="uniform")
    advance, show = self.compiled("advance", sampling=one), self.compiled("show", how=how)

    def walk():
      state, shown = self.compiled("begin", sampling=one)(weights, key, rows), None
      for step, (t, s) in enumerate(itertools.pairwise(times), 1):
        state, x0 = advance(weights, key, rows, state, t, s)
        if step % every and s:
          continue
        ahead = step, int(s), show(weights, x0)
        if shown:
          yield Denoised(*shown[:2], np.asarray(shown[2])[:n])
        shown = ahead
      yield Denoised(*shown[:2], np.asarray(shown[2])[:n])

    return walk()

  def each(
    self, program: Callable, weights: Weights, seed: int, rows: Mapping, batch_size: int
  ) -> Iterator[tuple[slice, jax.Array]]:
    """Runs a program over rows {name: [n, ...]}, batch by batch, the devices always ahead.

    Yields (the slice of the n rows, the output as NumPy).

    Raises:
      ValueError: the seed or the batch size makes no sense.
    """
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size} must be at least 1.")
    n = len(next(iter(rows.values())))
    rows = {"index": np.arange(n, dtype=np.int32), **rows}
    size, key, done = self._size(n, batch_size), _key(seed), 0
    batches = (_padded(rows, start, size) for start in range(0, n, size))
    for out in run_ahead(lambda batch: program(weights, key, batch), batches, self.mesh):
      count = min(size, n - done)
      yield slice(done, done + count), jax.tree.map(lambda x: np.asarray(x)[:count], out)  # noqa: B023
      done += count

  def all(self, program: Callable, weights: Weights, seed: int, rows: Mapping, batch_size: int):
    """Runs a program over all rows, as `each` does, and joins the outputs."""
    batches = self.each(program, weights, seed, rows, batch_size)
    return jax.tree.map(lambda *x: np.concatenate(x), *[out for _, out in batches])

  def fill(self, weights: Weights, seed: int, rows: Mapping, batch_size: int, how: str):
    """Reconstructs all rows {image, hidden [n, N]}, hidden being 1 or 0.

    The number of patches that the encoder sees is part of its shapes: images with equal numbers go
    together, and a new number is compiled.

    Raises:
      ValueError: all patches of an image are hidden; see also `each`.
    """
    if (rows["hidden"] != 0).all(axis=1).any():
      raise ValueError("the mask hides every patch of an image: the model has nothing to go by.")
    visible = (rows["hidden"] == 0).sum(axis=1)
    filled = None
    for keep in np.unique(visible):
      (places,) = np.nonzero(visible == keep)
      some = {name: x[places] for name, x in rows.items()} | {"index": places.astype(np.int32)}
      program = self.compiled("reconstruct", keep=int(keep), how=how)
      outputs = self.all(program, weights, seed, some, batch_size)
      if filled is None:
        filled = tuple(np.zeros((len(visible), *x.shape[1:]), x.dtype) for x in outputs)
      for whole, part in zip(filled, outputs, strict=True):
        whole[places] = part
    return filled

  def _size(self, n: int, batch_size: int) -> int:
    """Chooses rows per batch: a multiple of the devices, and few sizes, for each is compiled."""
    size = devices = self.mesh.size
    while size < n:
      size *= 2
    return min(size, -(-batch_size // devices) * devices)


def _key(seed: int) -> jax.Array:
  """Makes a key; raises ValueError for a seed of which JAX would take the last 32 bits only."""
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed} must be in [0, 2**32).")
  return jax.random.key(seed)


def _padded(rows: Mapping[str, np.ndarray], start: int, size: int) -> dict[str, np.ndarray]:
  """Cuts out rows start..start + size, and repeats the last one where there are no more."""
  parts = {name: x[start : start + size] for name, x in rows.items()}
  fill = lambda x: np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])
  return {name: fill(x) for name, x in parts.items()}

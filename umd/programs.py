"""What is compiled for a trained model: pixels in, pixels out, each image from its own key."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from umd.codec import Codec, Weights, encode_examples
from umd.inference import Inference
from umd.masking import mask_from_noise
from umd.placement import on
from umd.quantize import check, quantize
from umd.samplers import State
from umd.sharding import batch_sharding, put_batch, replicated, run_ahead


class Denoised(NamedTuple):
  """What is there after a step of a sampler.

  Attributes:
    step: of 1..S.
    t: the timestep that it reached; 0 is the last one.
    x0: what the model took x_t for, [n, H, W, C]; the last are the samples.
  """

  step: int
  t: int
  x0: np.ndarray


def to_floats(images: jax.Array) -> jax.Array:
  """uint8 images in [-1, 1]; floats as they are."""
  return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def to_levels(images: jax.Array, how: str) -> jax.Array:
  """Images in [-1, 1], or a little beyond, as uint8; how="none": float32 in [-1, 1]."""
  images = jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
  return images if how == "none" else quantize(images, how).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Programs:
  """Functions `(weights, key, rows, **static) -> [B, ...]` of rows {index [B], ...} of a batch.

  Attributes:
    inference: model and path.
    codec: what the model sees pixels through.
    mesh: devices; all arguments but the weights are split over them.
  """

  inference: Inference
  codec: Codec
  mesh: Mesh
  _compiled: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

  def represent(self, weights: Weights, key, rows, *, features: str, t: int):
    """[B, D] of rows {image}."""
    keys = self._keys(key, rows)
    seen = self._encode(weights, keys, to_floats(rows["image"]))
    return self.inference.represent(weights.model, seen, keys, t)[features]

  def reconstruct(
    self, weights: Weights, key, rows, *, how: str, mask_ratio: float = 0.0, keep: int = 0
  ):
    """(images, where they were filled in [B, H, W]) of rows {image}.

    Hides a random share of patches or, with `keep`, those that rows {hidden [B, N]} say, of which
    so many are not hidden.
    """
    keys, images = self._keys(key, rows), to_floats(rows["image"])
    mask = mask_from_noise(rows["hidden"], keep) if keep else None
    seen = self._encode(weights, keys, images)
    filled, masked = self.inference.reconstruct(weights.model, seen, keys, mask_ratio, 0, mask)
    where = self.codec.spread(masked)[..., :1] > 0
    made = jnp.where(where, self.codec.decode(weights.codec, filled), images)
    return to_levels(made, how), where[..., 0]

  def sample(self, weights: Weights, key, rows, *, how: str, **settings):
    """[B, H, W, C] of rows {label}, or without."""
    made = self.inference.sample(
      weights.model, self._keys(key, rows), rows.get("label"), **settings
    )
    return to_levels(self.codec.decode(weights.codec, made), how)

  def trace(self, weights: Weights, key, rows, *, how: str, **settings):
    """([B, S, H, W, C], [B, S + 1, H, W, C]): what `sample` passes, x0 and x_t."""
    passed = self.inference.trace(
      weights.model, self._keys(key, rows), rows.get("label"), **settings
    )
    show = lambda x: to_levels(self.codec.decode(weights.codec, x), how)
    return tuple(jnp.moveaxis(jax.lax.map(show, frames), 0, 1) for frames in passed)

  def begin(self, weights: Weights, key, rows, **settings) -> State:
    """Where the sampler starts, of rows {label}, or without."""
    sampler, _ = self.inference.make_sampler(weights.model, rows.get("label"), **settings)
    return self._placed(sampler.start(self.inference.noise(self._keys(key, rows))[0]))

  def advance(self, weights: Weights, key, rows, state: State, t, s, **settings):
    """(state at s, x0 as the model sees images) of a state at t, both int32 scalars."""
    sampler, _ = self.inference.make_sampler(weights.model, rows.get("label"), **settings)
    keys = self.inference.noise(self._keys(key, rows))[1]
    return self._placed(sampler.step(state, keys, t, s))

  def show(self, weights: Weights, x0, *, how: str):
    """[B, H, W, C] of what the model sees as x0."""
    return self._placed(to_levels(self.codec.decode(weights.codec, x0), how))

  def inpaint(self, weights: Weights, key, rows, *, how: str, resampling: int, **settings):
    """[B, H, W, C] of rows {image, mask [B, H, W], places}, drawn anew where the mask is 1.

    Places [B, h, w, 1] are those that the model sees.
    """
    keys, images = self._keys(key, rows), to_floats(rows["image"])
    known, labels = self._encode(weights, keys, images), rows.get("label")
    made = self.inference.inpaint(
      weights.model, keys, labels, known, rows["places"], resampling, **settings
    )
    made = self.codec.decode(weights.codec, made)
    return to_levels(jnp.where(rows["mask"][..., None], made, images), how)

  def _on_the_mesh(self, program: Callable, *args, **static):
    with on(self.mesh):
      return program(*args, **static)

  def _placed(self, tree):
    """Arrays split over the devices, scalars on all: so what comes out fits what goes in."""
    split, whole = batch_sharding(self.mesh), replicated(self.mesh)
    place = lambda x: jax.lax.with_sharding_constraint(x, split if x.ndim else whole)
    return jax.tree.map(place, tree)

  def _keys(self, key, rows):
    """As `umd.inference.example_keys`, of a key that is no constant of the program."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(rows["index"])

  def _encode(self, weights: Weights, keys, images):
    return encode_examples(self.codec, weights.codec, images, keys)

  def compiled(self, name: str, **static) -> Callable:
    """The function of that name; compiled at its first call with rows of a new size."""
    if "how" in static:
      check(static["how"])
    key = name, *sorted(static.items())
    if key not in self._compiled:
      program = functools.partial(self._on_the_mesh, getattr(self, name), **static)
      own = name in ("begin", "advance", "show")  # These say themselves where arrays go.
      given = {} if own else {"out_shardings": batch_sharding(self.mesh)}
      self._compiled[key] = jax.jit(program, **given)
    return self._compiled[key]

  def steps(
    self, weights: Weights, seed: int, rows: Mapping, how: str, every: int, settings: Mapping
  ) -> Iterator[Denoised]:
    """Samples of rows {index, label}, or without, all at once, and what is on the way.

    Each step is a call of one program, which does not depend on the number and the places of the
    steps. While the reader looks at what a step has left, the next ones are computed.

    Args:
      weights: of model and codec.
      seed: of the noise.
      rows: of the samples.
      how: see `to_levels`.
      every: x0 is decoded, and yielded, after so many steps each, and after the last one.
      settings: of `Inference.sample`.

    Raises:
      ValueError: a seed or `every` that makes no sense; see also `Inference.sample`.
    """
    check(how)
    if every < 1:
      raise ValueError(f"every={every} must be at least 1: each step is shown.")
    key, n = _key(seed), len(rows["index"])
    rows = put_batch(_padded(rows, 0, self._size(n, n)), self.mesh)
    sampler, steps = self.inference.make_sampler(weights.model, rows.get("label"), **settings)
    ts = sampler.timesteps(steps)
    fixed = {k: v for k, v in settings.items() if k not in ("steps", "spacing")}
    advance, show = self.compiled("advance", **fixed), self.compiled("show", how=how)

    def walk():
      state, shown = self.compiled("begin", **fixed)(weights, key, rows), None
      for step, (t, s) in enumerate(itertools.pairwise(ts), 1):
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

    Yields (which of the n, what came out as NumPy).

    Raises:
      ValueError: a seed or a batch size that makes no sense.
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
    """What a program makes of all rows, see `each`."""
    each = self.each(program, weights, seed, rows, batch_size)
    return jax.tree.map(lambda *x: np.concatenate(x), *[out for _, out in each])

  def fill(self, weights: Weights, seed: int, rows: Mapping, batch_size: int, how: str):
    """`reconstruct` of all rows {image, hidden [n, N]}, hidden being 1 or 0.

    How many patches the encoder sees is part of its shapes: images of a kind go together, and a new
    number is compiled.

    Raises:
      ValueError: an image of which all patches are hidden; or see `each`.
    """
    if (rows["hidden"] != 0).all(axis=1).any():
      raise ValueError("the mask hides every patch of an image: the model has nothing to go by.")
    kept, out = (rows["hidden"] == 0).sum(axis=1), None
    for keep in np.unique(kept):
      (places,) = np.nonzero(kept == keep)
      given = {name: x[places] for name, x in rows.items()} | {"index": places.astype(np.int32)}
      program = self.compiled("reconstruct", keep=int(keep), how=how)
      found = self.all(program, weights, seed, given, batch_size)
      out = out or tuple(np.zeros((len(kept), *x.shape[1:]), x.dtype) for x in found)
      for whole, part in zip(out, found, strict=True):
        whole[places] = part
    return out

  def _size(self, n: int, batch_size: int) -> int:
    """A multiple of the devices; for few rows a power of two of them, so that sizes are few."""
    size = devices = self.mesh.size
    while size < n:
      size *= 2
    return min(size, -(-batch_size // devices) * devices)


def _key(seed: int) -> jax.Array:
  """Raises ValueError for a seed of which JAX would take the last 32 bits."""
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed} must be in [0, 2**32).")
  return jax.random.key(seed)


def _padded(rows: Mapping[str, np.ndarray], start: int, size: int) -> dict[str, np.ndarray]:
  """Rows start..start + size, the last one repeated where there are no more."""
  parts = {name: x[start : start + size] for name, x in rows.items()}
  fill = lambda x: np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])
  return {name: fill(x) for name, x in parts.items()}

"""A trained model as a user meets it: pixels in, pixels out.

from umd import load
model = load("runs/quickstart")
images = model.sample(labels="all")
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from umd.codecs import codec
from umd.codecs.codec import Codec, Weights, encode_examples
from umd.devices.mesh import batch_sharding, make_mesh, put_batch, replicate, replicated, run_ahead
from umd.devices.placement import on
from umd.masks import mask_from_noise, num_kept
from umd.metrics.quantize import check, quantize
from umd.models.network import feature_widths, grid, num_tokens
from umd.samplers import Sampling, State, Trajectory
from umd.samplers.keys import fold
from umd.trained import inputs, saved
from umd.trained.inference import Inference
from umd.trained.inputs import Labels
from umd.weights import safetensors


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
    keys = fold(key, rows["index"])
    seen = self._encode(weights, keys, to_floats(rows["image"]))
    return self.inference.represent(weights.model, seen, keys, t)[features]

  def reconstruct(
    self, weights: Weights, key, rows, *, how: str, mask_ratio: float = 0.0, keep: int = 0
  ):
    """(images, where they were filled in [B, H, W]) of rows {image}.

    Hides a random share of patches or, with `keep`, those that rows {hidden [B, N]} say, of which
    so many are not hidden.
    """
    keys, images = fold(key, rows["index"]), to_floats(rows["image"])
    mask = mask_from_noise(rows["hidden"], keep) if keep else None
    seen = self._encode(weights, keys, images)
    filled, masked = self.inference.reconstruct(weights.model, seen, keys, mask_ratio, 0, mask)
    where = self.codec.spread(masked)[..., :1] > 0
    made = jnp.where(where, self.codec.decode(weights.codec, filled), images)
    return to_levels(made, how), where[..., 0]

  def sample(self, weights: Weights, key, rows, *, how: str, sampling: Sampling):
    """[B, H, W, C] of rows {label}, or without."""
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
    """Where the sampler starts, of rows {label}, or without."""
    sampler = self.inference.make_sampler(weights.model, rows.get("label"), sampling)
    return self._placed(sampler.start(self.inference.noise(fold(key, rows["index"]))[0]))

  def advance(self, weights: Weights, key, rows, state: State, t, s, *, sampling: Sampling):
    """(state at s, x0 as the model sees images) of a state at t, both scalars."""
    sampler = self.inference.make_sampler(weights.model, rows.get("label"), sampling)
    keys = self.inference.noise(fold(key, rows["index"]))[1]
    return self._placed(sampler.step(state, keys, t, s))

  def show(self, weights: Weights, x0, *, how: str):
    """[B, H, W, C] of what the model sees as x0."""
    return self._placed(to_levels(self.codec.decode(weights.codec, x0), how))

  def inpaint(self, weights: Weights, key, rows, *, how: str, resampling: int, sampling: Sampling):
    """[B, H, W, C] of rows {image, mask [B, H, W], places}, drawn anew where the mask is 1.

    Places [B, h, w, 1] are those that the model sees.
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
    """Arrays split over the devices, scalars on all: so what comes out fits what goes in."""
    split, whole = batch_sharding(self.mesh), replicated(self.mesh)
    place = lambda x: jax.lax.with_sharding_constraint(x, split if x.ndim else whole)
    return jax.tree.map(place, tree)

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
    self, weights: Weights, seed: int, rows: Mapping, how: str, every: int, sampling: Sampling
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
      sampling: see `Inference.sample`.

    Raises:
      ValueError: a seed or `every` that makes no sense; see also `Inference.sample`.
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


BATCH, RESAMPLING = 64, 10  # The latter as in the paper.
WITHOUT = 16  # Samples of a model without labels, if nobody says how many.


class Pretrained:
  """A model on all devices of this process.

  Images are given as uint8 or as floats in [-1, 1], [n, H, W, C], and come back as uint8: rounded
  to the nearest level, or as another key of `umd.metrics.quantize.QUANTIZERS` says; `quantize="none"` gives
  float32 in [-1, 1]. Everything random is a function of a seed and of an image's place in the call,
  so a batch size changes speed and memory, and results by no more than rounding. A function is
  compiled at the first call with new settings or sizes.

  Attributes:
    image_size: (H, W, C) of images.
    num_classes: number of labels, 0 for a model without.
    class_names: of the labels; () if the data did not say.
    sampling: the `umd.samplers.Sampling` of `sample`, unless other settings are given.
    folder, weights, step: where the weights are from, "ema" or "raw", and after how many steps.
  """

  def __init__(
    self, place: saved.Place, params: dict, weights: str, step: int, mesh: Mesh, dtype: str
  ):
    """See `load`."""
    self.folder, self.weights, self.step = place.folder, weights, step
    self.description = about = place.description
    inference = about.inference(**({"dtype": dtype} if dtype else {}))
    opened = codec.make(about.latents, mesh)
    if opened.sha256 != about.vae_sha256:
      raise ValueError(
        f"{place.folder!r}: the VAE {about.latents.get('vae')!r} is another one than in training "
        f"(SHA-256 {opened.sha256[:12]}, then {about.vae_sha256[:12]}). Bring back the one that it "
        "was trained with."
      )
    self.image_size = tuple(opened.pixel_size(inference.model.image_size))
    self.num_classes, self.class_names = inference.model.num_classes, about.class_names
    self.sampling = about.sampling
    self._model, self._timesteps = inference.model, inference.path.timesteps
    self._programs = Programs(inference, opened, mesh)
    self._weights = Weights(replicate(params, mesh), opened.params)

  def __repr__(self) -> str:
    size = " x ".join(map(str, self.image_size))
    what = f"{self._model.variant}, {size} px, {self.num_classes} classes"
    return f"<{what}; {self.folder}, step {self.step}, {self.weights} weights>"

  @functools.cached_property
  def sha256(self) -> str:
    """Of the model's parameters, in hexadecimal digits."""
    return safetensors.fingerprint(self._weights.model)

  def label_ids(self, labels: Labels) -> np.ndarray | None:
    """int32 [L] of labels by number or name, one or several, or "all"; None for None."""
    return inputs.label_ids(labels, self.class_names, self.num_classes)

  def represent(
    self, images, features: str = "class", t: int = 0, seed: int = 0, batch_size: int = BATCH
  ) -> np.ndarray:
    """Representations, float32 [n, D], of images noised to timestep t (0: clean).

    Args:
      images: see the class.
      features: "class", "mean" or "patches", see `umd.trained.inference.Inference.represent`.
      t: 0..T.
      seed: of the noise, and of the latents if the model sees those.
      batch_size: images at a time, over all devices.
    """
    images = inputs.as_images(images, self.image_size)
    if features not in (known := list(feature_widths(self._model))):
      raise ValueError(f"features={features!r} is not one of {known}.")
    if not 0 <= t <= self._timesteps:
      raise ValueError(f"t={t} must be in [0, timesteps={self._timesteps}].")
    program = self._programs.compiled("represent", features=features, t=t)
    return self._programs.all(program, self._weights, seed, {"image": images}, batch_size)

  def reconstruct(
    self,
    images,
    mask_ratio: float = 0.75,
    mask=None,
    seed: int = 0,
    batch_size: int = BATCH,
    quantize: str = "round",
  ) -> tuple[np.ndarray, np.ndarray]:
    """Fills in masked patches in one pass of the network, as a masked auto-encoder does.

    Args:
      images: see the class.
      mask_ratio: share of patches that the encoder does not see, chosen at random.
      mask: pixels that it is not to see instead, [H, W] or [n, H, W], True or 1 where they are to
        be filled in; whole patches are, if any of their pixels is.
      seed: of the random masks.
      batch_size, quantize: see the class.

    Returns (images, masks): filled in, [n, H, W, C], and where, bool [n, H, W].
    """
    self._check("reconstruct")
    images, model = inputs.as_images(images, self.image_size), self._model
    if mask is None:
      if num_kept(num_tokens(model), mask_ratio) == num_tokens(model):
        raise ValueError(f"mask_ratio={mask_ratio} masks none of {num_tokens(model)} patches.")
      program = self._programs.compiled("reconstruct", mask_ratio=mask_ratio, how=quantize)
      return self._programs.all(program, self._weights, seed, {"image": images}, batch_size)
    mask = inputs.as_mask(mask, self.image_size, len(images))
    hidden = inputs.tiles(mask, grid(model)).reshape(len(images), -1)
    given = {"image": images, "hidden": hidden.astype(np.float32)}
    return self._programs.fill(self._weights, seed, given, batch_size, quantize)

  def sample(
    self,
    labels: Labels = None,
    num: int | None = None,
    *,
    seed: int = 0,
    batch_size: int = BATCH,
    quantize: str = "round",
    **settings,
  ) -> np.ndarray:
    """Images [num, H, W, C] from noise. Sample i is a function of (seed, i), its label, the weights
    and the settings.

    Args:
      labels: classes by number or name, in turn: sample i gets labels[i mod L]. "all": every class.
        None: samples without labels, and without guidance.
      num: how many; by default one for each label, or 16 without.
      seed, batch_size, quantize: see the class.
      **settings: fields of `umd.samplers.Sampling`: sampler, steps, spacing, eta, head, cfg_scale,
        cfg_channels, guidance_interval, clip_x0. Those left out, or None, are as in `sampling`.
    """
    rows, sampling = self._to_sample(labels, num, settings)
    program = self._programs.compiled("sample", how=quantize, sampling=sampling)
    return self._programs.all(program, self._weights, seed, rows, batch_size)

  def draw(
    self,
    index: Sequence[int],
    labels: Labels,
    *,
    seed: int = 0,
    batch_size: int = BATCH,
    quantize: str = "round",
    **settings,
  ) -> Iterator[tuple[slice, np.ndarray]]:
    """Samples at places `index` of a long `sample`, batch by batch: (rows of index, images)."""
    rows, sampling = self._to_sample(labels, None, settings, np.asarray(index, np.int32))
    program = self._programs.compiled("sample", how=quantize, sampling=sampling)
    return self._programs.each(program, self._weights, seed, rows, batch_size)

  def check_sampling(self, labels: Labels = None, **settings) -> Sampling:
    """The settings that `sample` would use; ValueError if it would refuse. Compiles nothing."""
    rows, sampling = self._to_sample(labels, self._programs.mesh.size, settings)
    program = self._programs.compiled("sample", how="round", sampling=sampling)
    program.eval_shape(self._weights, jax.random.key(0), rows)
    return sampling

  def steps(
    self,
    labels: Labels = None,
    num: int | None = None,
    *,
    seed: int = 0,
    quantize: str = "round",
    every: int = 1,
    **settings,
  ) -> Iterator[Denoised]:
    """The steps of `sample`, as they are taken: (step, the t that it reached, x0 [num, H, W, C]).

    The x0 of the last one are the samples, up to rounding. All are drawn at once. Of so many steps
    as `every` says only the last is shown. Other numbers and spacings of steps compile nothing
    anew. Other arguments as in `sample`.
    """
    rows, sampling = self._to_sample(labels, num, settings)
    return self._programs.steps(self._weights, seed, rows, quantize, every, sampling)

  def trajectory(
    self,
    labels: Labels = None,
    num: int | None = None,
    *,
    seed: int = 0,
    quantize: str = "round",
    **settings,
  ) -> Trajectory:
    """What `sample` passes on its way, for animations: (x0 [S, n, H, W, C], x_t [S + 1, ...]).

    See `umd.samplers.Trajectory`. All n are drawn at once. Arguments as in `sample`.
    """
    rows, sampling = self._to_sample(labels, num, settings)
    program = self._programs.compiled("trace", how=quantize, sampling=sampling)
    found = self._programs.all(program, self._weights, seed, rows, len(rows["index"]))
    return Trajectory(*(np.moveaxis(x, 1, 0) for x in found))

  def inpaint(
    self,
    images,
    mask,
    labels: Labels = None,
    num: int | None = None,
    *,
    resampling: int = RESAMPLING,
    seed: int = 0,
    batch_size: int = BATCH,
    quantize: str = "round",
    **settings,
  ) -> np.ndarray:
    """Images with a part of them drawn anew by diffusion (RePaint: Lugmayr et al. 2022).

    Args:
      images: see the class. One image may be filled in `num` times.
      mask: [H, W] or [n, H, W]; True or 1 where it is to be filled in. All other pixels come back
        as they are. A place of a latent is drawn anew if any of its pixels is.
      labels: one for all, or one for each image; None for none.
      num: how many; by default one for each image.
      resampling: how often each step is taken; more agree better with what is known, and cost as
        many times as much.
      seed, batch_size, quantize, **settings: as in `sample`.
    """
    images = inputs.as_images(images, self.image_size)
    num = len(images) if num is None else num
    if len(images) not in (1, num):
      raise ValueError(f"num={num}, but {len(images)} images: give one image, or leave num out.")
    ids = self.label_ids(labels)
    if ids is not None and len(ids) not in (1, num):
      raise ValueError(f"{len(ids)} labels for {num} images: give one for all, or one for each.")
    rows, sampling = self._to_sample(labels, num, settings)
    rows["mask"] = inputs.as_mask(mask, self.image_size, num)
    places = inputs.tiles(rows["mask"], self._model.image_size[:2])
    rows["places"] = places[..., None].astype(np.float32)
    rows["image"] = np.broadcast_to(images, (num, *self.image_size))
    program = self._programs.compiled(
      "inpaint", how=quantize, resampling=resampling, sampling=sampling
    )
    return self._programs.all(program, self._weights, seed, rows, batch_size)

  def _check(self, task: str) -> None:
    if reason := self.description.lacks(task):
      raise ValueError(f"{self.folder!r}: {reason}.")

  def _to_sample(self, labels, num, settings, index=None) -> tuple[dict, Sampling]:
    """(rows {index, label} of samples, settings of sampling)."""
    self._check("sample")
    ids = self.label_ids(labels)
    if index is None:
      num = (WITHOUT if ids is None else len(ids)) if num is None else num
      if num < 1:
        raise ValueError(f"num={num} must be at least 1.")
      index = np.arange(num, dtype=np.int32)
    rows = {"index": index} | ({} if ids is None else {"label": ids[index % len(ids)]})
    return rows, self.description.settings(settings, guided=ids is not None)


def load(
  path: str,
  *,
  weights: str = "",
  step: int | str = saved.NEWEST,
  dtype: str = "",
  devices: Sequence[jax.Device] | None = None,
) -> Pretrained:
  """Opens a trained model; nothing but its own files is needed, no config and no data.

  Args:
    path: a run's workdir; one with stages, of which the last that has a checkpoint is taken; or a
      folder that tools.export wrote.
    weights: "ema" or "raw"; "" for the average, or for what an exported folder holds.
    step: of a run's checkpoints: a number, "newest", or "best" by its checkpoint.best.
    dtype: of the computation, "float32" or "bfloat16"; "" for the one it was trained in.
    devices: of this process; by default all.

  Raises:
    FileNotFoundError: there is no trained model, or not that checkpoint, or its VAE is not there.
    ValueError: what is there is damaged; or see above.
  """
  if dtype not in ("", "float32", "bfloat16"):
    raise ValueError(f"dtype={dtype!r} must be 'float32', 'bfloat16', or '' for the trained one.")
  place = saved.find(path)
  params, weights, step = saved.read(place, weights, step)
  mesh = make_mesh(jax.local_devices() if devices is None else devices)
  return Pretrained(place, params, weights, step, mesh, dtype)

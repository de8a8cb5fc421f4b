"""A trained model as a user meets it: pixels in, pixels out.

from umd import load
model = load("runs/quickstart")
images = model.sample(labels="all")
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from umd.codecs.codec import Weights
from umd.devices.mesh import make_mesh, replicate
from umd.masks import num_kept
from umd.models.network import feature_widths, grid, num_tokens
from umd.samplers import Sampling, Trajectory
from umd.trained import inputs, saved
from umd.trained.inputs import Labels
from umd.trained.programs import Denoised, Programs
from umd.weights import safetensors

BATCH = 64  # Images at a time, over all devices.
RESAMPLING = 10  # Of inpainting, as in RePaint's paper.
WITHOUT = 16  # Samples of a model without labels, if nobody says how many.


def load(
  path: str,
  *,
  weights: str = "",
  step: int | str = saved.NEWEST,
  dtype: str = "",
  devices: Sequence[jax.Device] | None = None,
) -> "Pretrained":
  """Opens a trained model; nothing but its own files is needed, no config and no data.

  Args:
    path: a run's workdir; one with stages, of which the last that has a checkpoint is taken; or a
      folder that tools.export wrote.
    weights: "ema" or "raw"; "" for the average, or for what an exported folder holds.
    step: of a run's checkpoints: a number, "newest", or "best" by its checkpoint.best.
    dtype: the type of the computation, "float32" or "bfloat16"; "" for that of training.
    devices: devices of this process; by default all.

  Raises:
    FileNotFoundError: there is no trained model, or not that checkpoint, or its VAE is not there.
    ValueError: what is there is damaged, or an argument makes no sense.
  """
  if dtype not in ("", "float32", "bfloat16"):
    raise ValueError(f"dtype={dtype!r} must be 'float32', 'bfloat16', or '' for the trained one.")
  run = saved.open_run(path, **({"dtype": dtype} if dtype else {}))
  mesh = make_mesh(jax.local_devices() if devices is None else devices)
  return Pretrained(run, *run.params(weights, step), mesh)


class Pretrained:
  """A model on all devices of this process.

  Images are given as uint8 or as floats in [-1, 1], [n, H, W, C], and come back as uint8: rounded
  to the nearest level, or as another key of `umd.metrics.quantize.QUANTIZERS` says;
  `quantize="none"` gives float32 in [-1, 1]. Everything random is a function of a seed and of an
  image's place in the call, so a batch size changes speed and memory, and results by no more than
  rounding. A function is compiled at the first call with new settings or sizes.

  Attributes:
    image_size: (H, W, C) of images.
    num_classes: number of labels, 0 for a model without.
    class_names: of the labels; () if the data did not say.
    sampling: the `umd.samplers.Sampling` of `sample`, unless other settings are given.
    folder, weights, step: where the weights are from, "ema" or "raw", and after how many steps.
  """

  def __init__(self, run: saved.TrainedRun, params: dict, weights: str, step: int, mesh: Mesh):
    """Takes what `load` reads."""
    self.folder, self.weights, self.step = run.folder, weights, step
    self.description = run.description
    self.class_names = run.description.class_names
    self.sampling = run.description.sampling
    self.num_classes = run.model.num_classes
    codec = run.open_codec(mesh)
    self.image_size = tuple(codec.pixel_size(run.model.image_size))
    self._model, self._end = run.model, run.inference.path.end
    self._programs = Programs(run.inference, codec, mesh)
    self._weights = Weights(replicate(params, mesh), codec.params)

  def __repr__(self) -> str:
    size = " x ".join(map(str, self.image_size))
    network = self.description.model.get("variant", self.description.model["name"])
    what = f"{network}, {size} px, {self.num_classes} classes"
    return f"<{what}; {self.folder}, step {self.step}, {self.weights} weights>"

  @functools.cached_property
  def sha256(self) -> str:
    """The SHA-256 of the model's parameters, in hexadecimal digits."""
    return safetensors.fingerprint(self._weights.model)

  def label_ids(self, labels: Labels) -> np.ndarray | None:
    """Returns int32 [L] of labels by number or name, one or several, or "all"; None for None."""
    return inputs.label_ids(labels, self.class_names, self.num_classes)

  def represent(
    self, images, features: str = "class", t: float = 0, seed: int = 0, batch_size: int = BATCH
  ) -> np.ndarray:
    """Computes representations, float32 [n, D], of images noised to time t (0: clean).

    Args:
      images: see the class.
      features: "class", "mean" or "patches", see `umd.trained.inference.Inference.represent`.
      t: a time of the noise path.
      seed: of the noise, and of the latents if the model sees those.
      batch_size: images at a time, over all devices.
    """
    images = inputs.as_images(images, self.image_size)
    if features not in (known := list(feature_widths(self._model))):
      raise ValueError(f"features={features!r} is not one of {known}.")
    if not 0 <= t <= self._end:
      raise ValueError(f"t={t} must be in [0, {self._end}], where the noise path ends.")
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
    """Draws images [num, H, W, C] from noise.

    Sample i is a function of (seed, i), its label, the weights and the settings.

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
    """Draws samples at places `index` of a long `sample`, and yields (rows of index, images)."""
    rows, sampling = self._to_sample(labels, None, settings, np.asarray(index, np.int32))
    program = self._programs.compiled("sample", how=quantize, sampling=sampling)
    return self._programs.each(program, self._weights, seed, rows, batch_size)

  def check_sampling(self, labels: Labels = None, **settings) -> Sampling:
    """Returns the settings that `sample` would use, and raises what it would; compiles nothing."""
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
    """Yields the steps of `sample` as they are taken: (step, the t it reached, x0 [num, H, W, C]).

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
    """Returns what `sample` passes on its way: (x0 [S, n, H, W, C], x_t [S + 1, ...]).

    See `umd.samplers.Trajectory`. All n are drawn at once. Arguments as in `sample`.
    """
    rows, sampling = self._to_sample(labels, num, settings)
    program = self._programs.compiled("trace", how=quantize, sampling=sampling)
    frames = self._programs.all(program, self._weights, seed, rows, len(rows["index"]))
    return Trajectory(*(np.moveaxis(x, 1, 0) for x in frames))

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
    """Draws a part of images anew by diffusion (RePaint: Lugmayr et al. 2022).

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
    """Makes (rows {index, label} of samples, settings of sampling)."""
    self._check("sample")
    ids = self.label_ids(labels)
    if index is None:
      num = (WITHOUT if ids is None else len(ids)) if num is None else num
      if num < 1:
        raise ValueError(f"num={num} must be at least 1.")
      index = np.arange(num, dtype=np.int32)
    rows = {"index": index} | ({} if ids is None else {"label": ids[index % len(ids)]})
    return rows, self.description.settings(settings, guided=ids is not None)

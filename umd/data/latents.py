"""Latents that were stored once: data "latents:DIR", as tools/encode_latents writes it.

DIR is a TFDS data set of ArrayRecord files. Of each image it holds the moments of its latents, the
mean and the logarithm of the variance, in several views: the image as it is evaluated, its mirror
image, and crops as in training. DIR/metadata.json says how they were made.
"""

import dataclasses
import functools
import hashlib
import json
import os

import numpy as np

from umd.data.host import tensorflow
from umd.data.records import split_names
from umd.data.tfds import ArrayRecords, split_info
from umd.runs import sharded, workdir

NAME = "latents"  # Of the TFDS data set.
VERSION = 1  # Of what the metadata hold.
METADATA = "metadata.json"
TOOL = "python -m tools.encode_latents"


@dataclasses.dataclass(frozen=True)
class LatentInfo:
  """How stored latents were made.

  Attributes:
    path: the folder.
    vae: name of the auto-encoder.
    sha256: hash of the file of its weights.
    scaling: a model sees (latent - shift) * scaling.
    shift: see scaling.
    factor: pixels per latent pixel, along each axis.
    pixel_size: (H, W, C) of the images.
    shape: (V, h, w, 2c) of the moments; mean | logvar on the last axis, unscaled.
    dtype: the type in which they are stored.
    views: V.
    preprocessing: how each of the views was made of an image.
    seed: from which the random ones were drawn.
    data: where the images come from, per split.
    fingerprint: fingerprints of these.
    mean: of each channel of the scaled latents, over all images of these splits and all views.
    std: likewise.
  """

  path: str
  vae: str
  sha256: str
  scaling: float
  shift: float
  factor: int
  pixel_size: tuple[int, int, int]
  shape: tuple[int, int, int, int]
  dtype: str
  views: int
  preprocessing: tuple[str, ...]
  seed: int
  data: tuple[str, ...]
  fingerprint: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]


class LatentRecords(ArrayRecords):
  """Records of stored latents, read at random; `info` says how they were made."""

  def __init__(self, name, files, features, label, info: LatentInfo):
    import tensorflow_datasets as tfds

    super().__init__(name, files, features, "moments", label)
    self.info = info
    self._decoders = {"moments": tfds.decode.SkipDecoding()}

  def parse(self, row):
    tf, example = tensorflow(), super().parse(row)
    # What TFDS would do, but for a warning about itself.
    moments = tf.reshape(tf.io.decode_raw(example["image"], self.dtype), self.shape)
    return {**example, "image": moments}

  def fingerprint(self):
    """Returns a hash of how the latents were made and of what is taken, but not of the place."""
    parts = [(os.path.basename(os.fspath(f.filename)), f.skip, f.take) for f in self.files]
    made = dataclasses.replace(self.info, path="", vae="")
    return hashlib.sha256(repr((parts, made)).encode()).hexdigest()


def latents(folder: str, split: str) -> LatentRecords:
  """Returns a split of stored latents, e.g. ("/data/latents", "train[:99%]").

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it holds no latents, not that split, or they are not all there yet.
  """
  what, path = f"data 'latents:{folder}'", os.path.expanduser(folder)
  metadata = _metadata(path, what)
  names = list(dict.fromkeys(split_names(split, what)))
  for name in names:
    if name not in metadata["splits"]:
      raise ValueError(_missing(path, what, name, metadata))
  builder = _builder(path, workdir.read_bytes(workdir.join(path, "dataset_info.json")))
  files = split_info(builder, split, what).file_instructions
  features = builder.info.features
  label = "label" if "label" in features else None
  info = _info(path, metadata, [metadata["splits"][name] for name in names])
  return LatentRecords(f"latents:{folder}:{split}", files, features, label, info)


@functools.lru_cache(maxsize=8)
def _builder(path: str, contents: bytes):
  del contents  # They change with the data set: one that was read before may have got more splits.
  tensorflow()  # Before TFDS imports it.
  import tensorflow_datasets as tfds

  return tfds.builder_from_directory(path)


def _metadata(path: str, what: str) -> dict:
  """Returns what metadata.json says; ValueError, beginning with `what`, if it is not ours."""
  if not workdir.exists(path):
    raise FileNotFoundError(
      f"{what}: there is no such folder. Make it: {TOOL} --data ... --size ... --out {path}"
    )
  text = workdir.read_bytes(workdir.join(path, METADATA))
  is_tfds = workdir.exists(workdir.join(path, "dataset_info.json"))
  if not (text and is_tfds):
    for split in sharded.begun(path):
      raise ValueError(f"{what}: split {sharded.unfinished(path, split)}")
    kind = f"Is it 'tfds:NAME' with data_dir={path!r}?" if is_tfds else "Choose another folder."
    raise ValueError(f"{what} holds no latents of {TOOL}: it has no {METADATA}. {kind}")
  try:
    metadata = json.loads(text)
    version = metadata["latents"]
  except (ValueError, KeyError, TypeError):
    raise ValueError(f"{what}: {METADATA} is not of {TOOL}. Choose another folder.") from None
  if version != VERSION:
    raise ValueError(
      f"{what} is of version {version} of stored latents, and only {VERSION} can be read here. "
      "Update the code or encode again."
    )
  return metadata


def _missing(path: str, what: str, split: str, metadata: dict) -> str:
  if split in sharded.begun(path):
    return f"{what}: split {sharded.unfinished(path, split)}"
  sizes = ", ".join(f"{name} ({of['count']} images)" for name, of in metadata["splits"].items())
  made = next(iter(metadata["splits"].values()))["command"]
  return (
    f"{what} has no split {split!r}; it has {sizes}. Add it with the command that made these, with "
    f"other --data (and --split {split}); it was: {made}"
  )


def _info(path: str, metadata: dict, parts: list[dict]) -> LatentInfo:
  """Returns the info of these splits together: mean and deviation are those of all their images."""
  encoding = metadata["encoding"]
  share = np.array([part["count"] for part in parts]) / sum(part["count"] for part in parts)
  means, deviations = (np.array([part[key] for part in parts]) for key in ("mean", "std"))
  mean = share @ means
  variance = share @ (deviations**2 + (means - mean) ** 2)
  return LatentInfo(
    path=path,
    **{key: encoding[key] for key in ("vae", "sha256", "scaling", "shift", "factor", "dtype")},
    pixel_size=tuple(encoding["pixel_size"]),
    shape=tuple(encoding["shape"]),
    views=encoding["shape"][0],
    preprocessing=tuple(encoding["views"]),
    seed=encoding["seed"],
    data=tuple(part["data"] for part in parts),
    fingerprint=tuple(part["fingerprint"] for part in parts),
    mean=tuple(mean.tolist()),
    std=tuple(np.sqrt(variance).tolist()),
  )


def check(info: LatentInfo, sha256: str, scaling: float, shift: float) -> None:
  """Raises ValueError unless latents were made by the auto-encoder of these properties."""
  if sha256 != info.sha256:
    raise ValueError(
      f"the latents in {info.path!r} were made with the VAE {info.vae!r} (SHA-256 "
      f"{info.sha256[:12]}...), but the one given has SHA-256 {sha256[:12]}.... Give that VAE, or "
      f"encode the images with this one: {TOOL} --vae ... --out ANOTHER_FOLDER"
    )
  for key, stored, given in (("scaling", info.scaling, scaling), ("shift", info.shift, shift)):
    if stored != given:
      raise ValueError(
        f"the latents in {info.path!r} were stored for {key}_factor={stored!r}, but the VAE given "
        f"has {given!r}, with the same weights. Bring its config.json back, or encode again."
      )

"""Latents that were stored once: data "latents:DIR", as tools/encode_latents writes it.

DIR is a TFDS data set of ArrayRecord files. Of each image it holds the moments of its latents, the
mean and the logarithm of the variance, in several views: the image as it is evaluated, its mirror
image, and crops as in training. How they were made is in its metadata.json.
"""

import dataclasses
import functools
import hashlib
import json
import os

from umd.data import records
from umd.data.host import tensorflow
from umd.data.tfds import ArrayRecords

NAME, VERSION = "latents", 1  # Of the TFDS data set, and of what its metadata holds.
METADATA = "metadata.json"
PROGRESS = "encoding"  # Folder in DIR: of each split its settings, and what is done of it.
TOOL = "python -m tools.encode_latents"


@dataclasses.dataclass(frozen=True)
class LatentInfo:
  """How stored latents were made.

  Attributes:
    path: the folder.
    vae: name of the auto-encoder, and
    sha256: of the file of its weights.
    scaling, shift: a model sees (latent - shift) * scaling.
    factor: pixels per latent pixel, along each axis.
    pixel_size: (H, W, C) of the images.
    shape: (V, h, w, 2c) of the moments; mean | logvar on the last axis, unscaled.
    dtype: in which they are stored.
    views: V, and
    preprocessing: how each of them was made of an image.
    seed: of the random ones.
    data: where the images come from, and
    fingerprint: of these.
    mean, std: of each channel of the scaled latents, over all images of these splits and all views.
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
    """Of how the latents were made, and of what is taken of each file; not of where they are."""
    parts = [(os.path.basename(os.fspath(f.filename)), f.skip, f.take) for f in self._files]
    made = dataclasses.replace(self.info, path="", vae="")
    return hashlib.sha256(repr((parts, made)).encode()).hexdigest()


def latents(folder: str, split: str) -> LatentRecords:
  """A split of stored latents, e.g. ("/data/latents", "train[:99%]").

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it holds no latents, not that split, or they are not all there yet.
  """
  what, path = f"data 'latents:{folder}'", os.path.expanduser(folder)
  metadata = _metadata(path, what)
  names = list(dict.fromkeys(records.names(split, what)))
  for name in names:
    if name not in metadata["splits"]:
      raise ValueError(_missing(path, what, name, metadata))
  info = _info(path, metadata, [metadata["splits"][name] for name in names])
  builder = _builder(path)
  try:
    found = builder.info.splits[split]
  except (ValueError, KeyError) as error:
    raise ValueError(f"{what} has no split {split!r}: {str(error).splitlines()[0]}") from None
  if not found.num_examples:
    raise ValueError(f"{what}: split {split!r} holds no images; there are {_sizes(metadata)}.")
  label = "label" if "label" in builder.info.features else None
  files = found.file_instructions
  return LatentRecords(f"latents:{folder}:{split}", files, builder.info.features, label, info)


@functools.lru_cache(maxsize=8)
def _opened(path: str, stamp: str):
  del stamp  # Changes with the data set: one that was read before may have got more splits.
  tensorflow()  # Before TFDS imports it.
  import tensorflow_datasets as tfds

  return tfds.builder_from_directory(path)


def _builder(path: str):
  return _opened(path, _read(os.path.join(path, "dataset_info.json")))


def _read(file: str) -> str | None:
  """The text of a file, None if there is none."""
  tf = tensorflow()
  if not tf.io.gfile.exists(file):
    return None
  with tf.io.gfile.GFile(file) as f:
    return f.read()


def _metadata(path: str, what: str) -> dict:
  tf = tensorflow()
  if not tf.io.gfile.isdir(path):
    raise FileNotFoundError(
      f"{what}: there is no such folder. Make it: {TOOL} --data ... --size ... --out {path}"
    )
  text, whole = _read(os.path.join(path, METADATA)), _read(os.path.join(path, "dataset_info.json"))
  if not (text and whole):
    if begun := plans(path):
      raise ValueError(unfinished(path, what, next(iter(begun))))
    kind = f"Is it 'tfds:NAME' with data_dir={path!r}?" if whole else "Choose another folder."
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


def progress_file(path: str, split: str, shard: str = "") -> str:
  """The JSON file that says how a split is made; with `shard` ("00001-of-00016"), what is in it."""
  return os.path.join(path, PROGRESS, f"{split}-{shard}.json" if shard else f"{split}.json")


def _listed(path: str) -> list[str]:
  """Names without .json of the files in the folder that says how latents are made."""
  tf, folder = tensorflow(), os.path.join(path, PROGRESS)
  found = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
  return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


def plans(path: str) -> dict[str, dict]:
  """{split: {settings, command}} of all splits that were begun."""
  names = [name for name in _listed(path) if "-" not in name]
  return {name: json.loads(_read(progress_file(path, name))) for name in names}


def unfinished(path: str, what: str, split: str) -> str:
  """Says how much of a split is there, and how to go on."""
  plan = json.loads(_read(progress_file(path, split)))
  done = sum(name.startswith(f"{split}-") for name in _listed(path))
  return (
    f"{what}: split {split!r} is not finished, {done} of {plan['settings']['shards']} shards are "
    f"there. Go on with the same command: {plan['command']}"
  )


def _sizes(metadata) -> str:
  return ", ".join(f"{name} ({s['count']} images)" for name, s in metadata["splits"].items())


def _missing(path: str, what: str, split: str, metadata: dict) -> str:
  if _read(progress_file(path, split)):
    return unfinished(path, what, split)
  made = next(iter(metadata["splits"].values()))["command"]
  return (
    f"{what} has no split {split!r}; it has {_sizes(metadata)}. Add it with the command that made "
    f"these, with other --data (and --split {split}); it was: {made}"
  )


def _info(path: str, metadata: dict, parts: list[dict]) -> LatentInfo:
  """Of the splits `parts`; their means and deviations are those of all their images together."""
  encoding = metadata["encoding"]
  total = sum(part["count"] for part in parts)
  channels = range(len(parts[0]["mean"]))
  average = lambda of: [sum(p["count"] * of(p, c) for p in parts) / total for c in channels]
  mean = average(lambda p, c: p["mean"][c])
  square = average(lambda p, c: p["std"][c] ** 2 + (p["mean"][c] - mean[c]) ** 2)
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
    mean=tuple(mean),
    std=tuple(s**0.5 for s in square),
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

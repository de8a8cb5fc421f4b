"""Weights of KL auto-encoders: found on this machine or the Hugging Face hub, checked, written.

They come as diffusers writes them: a folder of config.json and diffusion_pytorch_model.safetensors.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from umd.codecs.vae import Architecture, from_diffusers, to_diffusers
from umd.runs import workdir
from umd.weights import download

CONFIG, TENSORS = "config.json", "diffusion_pytorch_model.safetensors"

PUBLISHED = {
  "sd-vae-ft-mse": "hf:stabilityai/sd-vae-ft-mse",
  "sd-vae-ft-ema": "hf:stabilityai/sd-vae-ft-ema",
  "sd-1.5": "hf:stable-diffusion-v1-5/stable-diffusion-v1-5/vae",
  "sd3": "hf:stabilityai/stable-diffusion-3-medium-diffusers/vae",  # 16 channels, gated
  "flux": "hf:black-forest-labs/FLUX.1-schnell/vae",  # 16 channels
}

# What diffusers takes where config.json is silent and Architecture has another default.
DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1}
ONLY = {"_class_name": "AutoencoderKL", "act_fn": "silu"}  # The only values that are known here.
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
HARMLESS = {"sample_size", "force_upcast"}  # They are of diffusers' own tiling and number formats.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class VaeWeights(NamedTuple):
  """Weights of a KL auto-encoder.

  Attributes:
    name: what was asked for.
    architecture: its sizes.
    params: NumPy float32, read-only.
    sha256: hash of the safetensors file, in hexadecimal digits.
  """

  name: str
  architecture: Architecture
  params: dict
  sha256: str


def find(name: str) -> str:
  """Returns the folder that holds config.json and diffusion_pytorch_model.safetensors.

  Args:
    name: a name of PUBLISHED, "hf:ORG/REPO[/SUBFOLDER][@REVISION]" on the Hugging Face hub, or a
      folder. Files of the hub are downloaded if its cache ($HF_HOME) does not hold them.

  Raises:
    FileNotFoundError: there is no such folder, or the hub cannot be reached or refuses.
    ValueError: the address on the hub is malformed.
  """
  address = PUBLISHED.get(name, name)
  if address.startswith(download.SCHEME):
    return download.fetch(address, (CONFIG, TENSORS))
  folder = name if workdir.scheme(name) else os.path.abspath(os.path.expanduser(name))
  missing = [file for file in (CONFIG, TENSORS) if not workdir.exists(workdir.join(folder, file))]
  if not missing:
    return folder
  if workdir.exists(workdir.join(folder, "vae", CONFIG)):
    hint = f"Its subfolder vae has one: give {workdir.join(name, 'vae')!r}."
  else:
    hint = (
      f"Give a folder that holds {CONFIG} and {TENSORS}, one of {', '.join(PUBLISHED)}, or "
      "hf:ORG/REPO[/SUBFOLDER][@REVISION]."
    )
  what = f"lacks {' and '.join(missing)}" if workdir.exists(folder) else "does not exist"
  raise FileNotFoundError(f"vae={name!r}: the folder {folder} {what}. {hint}")


def load(name: str) -> VaeWeights:
  """Returns the weights of that name, as `find` finds them; read once unless the files change.

  Raises:
    FileNotFoundError, ValueError: as `find` and `read` do.
  """
  folder = find(name)
  stamps = ()
  if not workdir.scheme(folder):
    stats = [os.stat(os.path.join(folder, file)) for file in (CONFIG, TENSORS)]
    stamps = tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
  return _read_once(folder, stamps)._replace(name=name)


@functools.lru_cache(maxsize=2)
def _read_once(folder: str, stamps: tuple) -> VaeWeights:
  del stamps  # Other files make another entry.
  return read(folder)


def read(folder: str) -> VaeWeights:
  """Returns the weights in a folder of config.json and diffusion_pytorch_model.safetensors.

  Raises:
    FileNotFoundError: one of the files is not there.
    ValueError: a file is damaged, or describes or holds something else than an AutoencoderKL.
  """
  paths = [workdir.join(folder, file) for file in (CONFIG, TENSORS)]
  contents = [workdir.read_bytes(path) for path in paths]
  for path, content in zip(paths, contents, strict=True):
    if content is None:
      raise FileNotFoundError(f"{path}: there is no such file. Put {CONFIG} and {TENSORS} there.")
  config, tensors = contents
  architecture = _parse_config(paths[0], config)
  try:
    params = from_diffusers(_parse_tensors(tensors), architecture)
  except ValueError as error:
    raise ValueError(
      f"{paths[1]} cannot be used: {error} Download it again, together with the {CONFIG} that "
      "belongs to it."
    ) from None
  _freeze(params)
  return VaeWeights(folder, architecture, params, hashlib.sha256(tensors).hexdigest())


def _freeze(tree: dict) -> None:
  """Makes all arrays read-only: callers share them."""
  for value in tree.values():
    if isinstance(value, dict):
      _freeze(value)
    else:
      value.flags.writeable = False


def save(folder: str, architecture: Architecture, params: Mapping) -> str:
  """Writes a folder that `read` and diffusers' AutoencoderKL.from_pretrained understand.

  The config comes last: a folder of which a killed process wrote a part is none of weights. Of
  several processes, one is to call this.

  Args:
    folder: made if it is not there; on this machine or gs://bucket/folder.
    architecture: its sizes.
    params: of `KLAutoEncoder`, written in float32.

  Returns:
    The SHA-256 of the safetensors file.

  Raises:
    ValueError: the parameters are not of this architecture, or not finite.
  """
  import safetensors.numpy

  tensors = to_diffusers(params, architecture)
  bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
  if bad:
    raise ValueError(f"{folder}: {bad[0]} is not finite ({len(bad)} tensors): the training failed.")
  levels = len(architecture.block_out_channels)
  blocks = {key: [kind] * levels for key, kind in BLOCKS.items()}
  config = {**ONLY, **blocks, "force_upcast": True, **dataclasses.asdict(architecture)}
  contents = safetensors.numpy.save(tensors, {"format": "pt"})
  path = workdir.join(folder, CONFIG)
  if workdir.exists(path):
    workdir.remove(path)
  workdir.write_bytes(workdir.join(folder, TENSORS), contents)
  workdir.write_json(path, config)
  return hashlib.sha256(contents).hexdigest()


def _parse_config(path: str, contents: bytes) -> Architecture:
  """Returns what a config.json says, with diffusers' defaults for what it leaves out.

  Raises:
    ValueError: it is damaged, or of another network than this one.
  """
  try:
    given = json.loads(contents)
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}). Download it again.") from None
  if not isinstance(given, dict):
    raise ValueError(f"{path} holds a {type(given).__name__}, not the settings of a model.")
  values = {**dataclasses.asdict(Architecture()), **DEFAULTS, **given}
  if values["shift_factor"] is None:
    values["shift_factor"] = 0.0

  def check(key: str, holds: bool, expected: str) -> None:
    if not holds:
      raise ValueError(
        f"{path}: {key}={given[key]!r}, but only {expected} is known here. Use the {CONFIG} of "
        "an AutoencoderKL of Stable Diffusion's kind."
      )

  is_count = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0
  is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
  widths = values["block_out_channels"]
  counted = isinstance(widths, list) and widths and all(map(is_count, widths))
  check("block_out_channels", counted, "a list of positive widths")
  expected = {**ONLY, **{key: [kind] * len(widths) for key, kind in BLOCKS.items()}}
  rules = {
    int: (is_count, "a positive integer"),
    bool: (lambda x: isinstance(x, bool), "true or false"),
    float: (is_number, "a number"),
  }
  fields = {field.name: field.type for field in dataclasses.fields(Architecture)}
  for key, value in given.items():
    if key in expected:
      check(key, value == expected[key], repr(expected[key]))
    elif fields.get(key) in rules:
      holds, meaning = rules[fields[key]]
      check(key, holds(values[key]), meaning)
    elif key not in {*fields, *HARMLESS}:
      check(key, key.startswith("_") or value is None, "null")
  try:
    settings = {key: values[key] for key in fields}
    return Architecture(**{**settings, "block_out_channels": tuple(widths)})
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def _parse_tensors(contents: bytes) -> dict[str, np.ndarray]:
  """Returns the tensors of a safetensors file, float32; ValueError if it is damaged."""
  import ml_dtypes
  import safetensors

  if contents.startswith(b"version https://git-lfs"):
    raise ValueError("it is a pointer of Git LFS, not the file itself: git lfs pull fetches that.")
  try:
    entries = safetensors.deserialize(contents)
  except safetensors.SafetensorError as error:
    what = f"it is damaged, truncated or no safetensors file ({error}; {len(contents)} bytes)."
    raise ValueError(what) from None
  tensors = {}
  for name, entry in entries:
    if entry["dtype"] not in DTYPES:
      raise ValueError(f"{name} has dtype {entry['dtype']}, not one of {', '.join(DTYPES)}.")
    dtype = DTYPES[entry["dtype"]]
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tensor = np.frombuffer(entry["data"], dtype).reshape(entry["shape"]).astype(np.float32)
    if not np.isfinite(tensor).all():
      raise ValueError(f"{name} holds values that are not finite.")
    tensors[name] = tensor
  return tensors

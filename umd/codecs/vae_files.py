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

# What diffusers takes where config.json is silent: other values than Architecture's own.
DEFAULTS = {
  **{"_class_name": "AutoencoderKL", "act_fn": "silu"},
  **{"in_channels": 3, "out_channels": 3, "block_out_channels": [64], "layers_per_block": 1},
  **{"latent_channels": 4, "norm_num_groups": 32, "scaling_factor": 0.18215, "shift_factor": None},
  **{"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True},
  **{"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]},
}
ONLY = {"_class_name": "AutoencoderKL", "act_fn": "silu"}  # all that is known here
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
HARMLESS = {"sample_size", "force_upcast"}  # of diffusers' own tiling and number formats
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}  # safetensors' names


class Weights(NamedTuple):
  """Weights of a KL auto-encoder.

  Attributes:
    name: what was asked for.
    architecture: its sizes.
    params: NumPy float32, read-only.
    sha256: of the safetensors file, in hexadecimal digits.
  """

  name: str
  architecture: Architecture
  params: dict
  sha256: str


def find(name: str) -> str:
  """The folder that holds config.json and diffusion_pytorch_model.safetensors.

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
    hint = f"Give a folder that holds {CONFIG} and {TENSORS}"
    hint += f", one of {', '.join(PUBLISHED)}, or hf:ORG/REPO[/SUBFOLDER][@REVISION]."
  what = f"lacks {' and '.join(missing)}" if workdir.exists(folder) else "does not exist"
  raise FileNotFoundError(f"vae={name!r}: the folder {folder} {what}. {hint}")


def load(name: str) -> Weights:
  """The weights of that name, as `find` finds them; read once unless the files change.

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
def _read_once(folder: str, stamps: tuple) -> Weights:
  del stamps  # Other files, another entry.
  return read(folder)


def read(folder: str) -> Weights:
  """The weights in a folder that holds config.json and diffusion_pytorch_model.safetensors.

  Raises:
    FileNotFoundError: one of the files is not there.
    ValueError: a file is damaged, or describes or holds something else than an AutoencoderKL.
  """
  paths = [workdir.join(folder, file) for file in (CONFIG, TENSORS)]
  config, tensors = (workdir.read_bytes(path) for path in paths)
  if config is None or tensors is None:
    path = paths[0] if config is None else paths[1]
    raise FileNotFoundError(f"{path}: there is no such file. Put {CONFIG} and {TENSORS} there.")
  architecture = _parse_config(paths[0], config)
  digest = hashlib.sha256(tensors).hexdigest()
  remedy = f"Download it again, together with the {CONFIG} that belongs to it."
  try:
    params = from_diffusers(_parse_tensors(tensors), architecture)
  except ValueError as error:
    raise ValueError(f"{paths[1]} cannot be used: {error} {remedy}") from None
  _freeze(params)
  return Weights(folder, architecture, params, digest)


def _freeze(tree: dict) -> None:
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
  """What a config.json says, with diffusers' defaults for what it leaves out."""
  try:
    given = json.loads(contents)
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}). Download it again.") from None
  if not isinstance(given, dict):
    raise ValueError(f"{path} holds a {type(given).__name__}, not the settings of a model.")
  config = {**DEFAULTS, **given}

  def check(key: str, holds: bool, expected: str) -> None:
    if not holds:
      raise ValueError(
        f"{path}: {key}={config[key]!r}, but only {expected} is known here. Use the {CONFIG} of "
        "an AutoencoderKL of Stable Diffusion's kind."
      )

  for key, value in ONLY.items():
    check(key, config[key] == value, repr(value))
  is_count = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0
  is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
  widths = config["block_out_channels"]
  counted = isinstance(widths, list) and widths and all(map(is_count, widths))
  check("block_out_channels", counted, "a list of positive widths")
  for key, kind in BLOCKS.items():
    check(key, config[key] == [kind] * len(widths), f"{kind!r} once per block_out_channels")
  config["shift_factor"] = 0.0 if config["shift_factor"] is None else config["shift_factor"]
  rules = {
    int: (is_count, "a positive integer"),
    bool: (lambda x: isinstance(x, bool), "true or false"),
    float: (is_number, "a number"),
  }
  fields = {field.name: field.type for field in dataclasses.fields(Architecture)}
  for key, kind in fields.items():
    if kind in rules:
      holds, expected = rules[kind]
      check(key, holds(config[key]), expected)
  for key in config.keys() - fields.keys() - DEFAULTS.keys() - HARMLESS:
    check(key, key.startswith("_") or config[key] is None, "null")
  values = {key: config[key] for key in fields}
  try:
    return Architecture(**{**values, "block_out_channels": tuple(widths)})
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def _parse_tensors(contents: bytes) -> dict[str, np.ndarray]:
  """The tensors of a safetensors file, float32."""
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
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensor = np.frombuffer(entry["data"], dtype).reshape(entry["shape"]).astype(np.float32)
    if not np.isfinite(tensor).all():
      raise ValueError(f"{name} holds values that are not finite.")
    tensors[name] = tensor
  return tensors

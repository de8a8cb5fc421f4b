"""Parameters as a safetensors file, which is read without executing anything."""

import hashlib

import ml_dtypes
import numpy as np

from umd.runs import workdir

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {"F32": DTYPES["float32"], "BF16": DTYPES["bfloat16"]}  # As safetensors spells them.


def flatten(tree: dict, prefix: str = "") -> dict:
  """Returns {"a.b": x} for {"a": {"b": x}}."""
  flat = {}
  for name, value in tree.items():
    nested = isinstance(value, dict)
    flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
  return flat


def fingerprint(params: dict) -> str:
  """Returns the SHA-256 of all names and values of a tree, in hexadecimal digits."""
  digest = hashlib.sha256()
  for name, value in sorted(flatten(params).items()):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(value).data)
  return digest.hexdigest()


def write(path: str, params: dict, dtype: str = "float32") -> str:
  """Writes a tree of arrays in one piece; returns the SHA-256 of the file.

  Args:
    path: of the file.
    params: nested dicts of arrays, whose names hold no dots.
    dtype: "float32" or "bfloat16".

  Raises:
    ValueError: a value is not finite.
  """
  import safetensors.numpy

  flat = {name: np.asarray(value) for name, value in flatten(params).items()}
  if bad := [name for name, value in flat.items() if not np.isfinite(value).all()]:
    raise ValueError(f"{bad[0]} holds values that are not finite: the training failed.")
  flat = {name: np.ascontiguousarray(x.astype(DTYPES[dtype])) for name, x in flat.items()}
  contents = safetensors.numpy.save(flat, {"format": "np"})
  workdir.write_bytes(path, contents)
  return hashlib.sha256(contents).hexdigest()


def read(path: str, sha256: str) -> dict:
  """Returns the tree of arrays that `write` wrote, in float32.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not the one with that SHA-256.
  """
  import safetensors

  contents = workdir.read_bytes(path)
  if contents is None:
    raise FileNotFoundError(f"{path}: there is no such file. Copy the whole folder.")
  if (digest := hashlib.sha256(contents).hexdigest()) != sha256:
    hint = " (It is a pointer of Git LFS: git lfs pull.)" if contents[:7] == b"version" else ""
    raise ValueError(
      f"{path} is not the file that was exported: its SHA-256 begins with {digest[:12]}, in "
      f"config.json with {sha256[:12]}. Copy both again, from the same export.{hint}"
    )
  tree = {}
  for name, entry in safetensors.deserialize(contents):  # Its numpy reader knows no bfloat16.
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    values = np.frombuffer(entry["data"], NAMES[entry["dtype"]])
    node[leaf] = values.reshape(entry["shape"]).astype(np.float32)
  return tree

"""PyTorch's files of weights, read without PyTorch and without running what they say.

A .pth file holds a pickle, and a pickle is a program: `pickle.load` calls whatever it names. This
reader carries out the few instructions that a state dict needs and refuses all others, so that a
file from the internet is data and nothing else. It reads both formats: the zip archive that
`torch.save` writes since PyTorch 1.6, and the stream of pickles that it wrote before, in which the
Inception weights that FID needs are published.
"""

import io
import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES = {
  "torch.DoubleStorage": np.dtype(np.float64),
  "torch.FloatStorage": np.dtype(np.float32),
  "torch.HalfStorage": np.dtype(np.float16),
  "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch.LongStorage": np.dtype(np.int64),
  "torch.IntStorage": np.dtype(np.int32),
  "torch.ShortStorage": np.dtype(np.int16),
  "torch.CharStorage": np.dtype(np.int8),
  "torch.ByteStorage": np.dtype(np.uint8),
  "torch.BoolStorage": np.dtype(np.bool_),
}
CALLS = {
  "collections.OrderedDict",
  "torch._utils._rebuild_tensor_v2",
  "torch._utils._rebuild_parameter",
}
# Instructions (names of `pickletools`) that push their argument, and those that push a constant.
LITERALS = {
  "BININT",
  "BININT1",
  "BININT2",
  "LONG1",
  "BINFLOAT",
  "BINUNICODE",
  "SHORT_BINUNICODE",
  "BINSTRING",  # This and the next are strings of Python 2.
  "SHORT_BINSTRING",
}
CONSTANTS = {
  "EMPTY_DICT": dict,
  "EMPTY_LIST": list,
  "EMPTY_TUPLE": tuple,
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
}


@dataclass(frozen=True)
class Global:
  """Something that a pickle names; only its name is kept, and it is never imported."""

  name: str


@dataclass(frozen=True)
class Storage:
  """A flat array: the raw bytes named `key` hold `numel` elements of `dtype`."""

  key: str
  dtype: np.dtype
  numel: int


@dataclass(frozen=True)
class Tensor:
  """A view of a storage as the file describes it, unchecked; offset and strides count elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def unpickle(file: BinaryIO, storages: dict[str, Storage]) -> Any:
  """Returns the value of the pickle at the file's position, and leaves the file at its end.

  The storages that the pickle names are added to `storages`, by key.
  """
  machine = Machine(storages)
  try:
    for op, argument, _ in pickletools.genops(file):
      if op.name == "STOP":
        break
      machine.step(op.name, argument)
    return machine.stack.pop()
  except (IndexError, KeyError):  # It pops more than it pushed, or recalls what it never stored.
    raise ValueError("its pickle is malformed or truncated.") from None


class Machine:
  """A stack machine for the instructions of a pickle that make dicts, lists, tuples and tensors.

  What `pickle` would import is a name here, and the calls that state dicts contain are the branches
  of `_call`. A file can reach nothing else.
  """

  def __init__(self, storages: dict[str, Storage]):
    self.stack: list = []
    self.marked: list[list] = []  # Stacks put aside by MARK.
    self.memo: dict[int, Any] = {}
    self.storages = storages

  def step(self, op: str, argument: Any) -> None:
    """Carries out one instruction, named as in `pickletools`."""
    if op in LITERALS:
      self.stack.append(argument)
    elif op in CONSTANTS:
      self.stack.append(CONSTANTS[op]())
    elif op == "MARK":
      self.marked.append(self.stack)
      self.stack = []
    elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
      self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
    elif op in ("BINGET", "LONG_BINGET"):
      self.stack.append(self.memo[argument])
    elif op in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
      items = self._pop(int(op[-1]) if op[-1].isdigit() else None)
      self.stack.append(tuple(items))
    elif op in ("APPEND", "APPENDS"):
      items = self._pop(None if op == "APPENDS" else 1)
      self._top(list).extend(items)
    elif op in ("SETITEM", "SETITEMS"):
      items = self._pop(None if op == "SETITEMS" else 2)
      _fill(self._top(dict), items)
    elif op == "GLOBAL":
      self.stack.append(_global(*argument.split(" ", 1)))
    elif op == "STACK_GLOBAL":
      self.stack.append(_global(*self._pop(2)))
    elif op == "BINPERSID":
      self.stack.append(self._storage(self.stack.pop()))
    elif op == "REDUCE":
      self.stack.append(_call(*self._pop(2)))
    elif op == "BUILD":  # Attributes of a state dict: its `_metadata`, versions of modules.
      self.stack.pop()
      self._top(OrderedDict)
    elif op not in ("PROTO", "FRAME"):
      raise _refusal(f"the instruction {op}")

  def _pop(self, count: int | None) -> list:
    """Removes and returns the last `count` values; all since the last mark if it is None."""
    if count is None:
      items, self.stack = self.stack, self.marked.pop()
      return items
    return [self.stack.pop() for _ in range(count)][::-1]

  def _top(self, kind: type) -> Any:
    """Returns the value on the stack that an instruction is about to change."""
    if not isinstance(self.stack[-1], kind):
      raise _refusal(f"a change of a {type(self.stack[-1]).__name__}")
    return self.stack[-1]

  def _storage(self, described: Any) -> Storage:
    match described:
      # Before 1.6 there is a last entry, a view of another storage; in published files it is None.
      case ("storage", Global(kind), str(key), str(), int(numel), *view) if (
        kind in DTYPES and numel >= 0 and view in ([], [None])
      ):
        storage = Storage(key, DTYPES[kind], numel)
      case _:
        raise _refusal("a storage of unknown form")
    if self.storages.setdefault(key, storage) != storage:
      raise ValueError(f"it describes storage {key!r} in two ways.")
    return storage


def _global(module: Any, name: Any) -> Global:
  known = Global(f"{module}.{name}") if type(module) is type(name) is str else None
  if known is None or known.name not in DTYPES.keys() | CALLS:
    raise _refusal(known.name if known else "a name that is none")
  return known


def _fill(target: dict, items: list) -> dict:
  if len(items) % 2:
    raise IndexError
  for key, value in zip(items[::2], items[1::2], strict=True):
    if type(key) not in (str, int):  # Hashing a deeply nested tuple would overflow the C stack.
      raise _refusal(f"a {type(key).__name__} as a key")
    target[key] = value
  return target


def _call(function: Any, arguments: Any) -> Any:
  name = function.name if isinstance(function, Global) else "what is no function"
  match name, arguments:
    case "collections.OrderedDict", ():
      return OrderedDict()
    case "collections.OrderedDict", ([*pairs],) if all(
      type(pair) is list and len(pair) == 2
      for pair in pairs  # As Python 2 writes it.
    ):
      return _fill(OrderedDict(), [item for pair in pairs for item in pair])
    case "torch._utils._rebuild_parameter", (Tensor() as tensor, _, _):
      return tensor
    case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, shape, strides, *rest):
      if len(rest) in (2, 3) and _ints((offset,)) and _ints(shape) and _ints(strides):
        return Tensor(storage, offset, shape, strides)
  raise _refusal(f"a call of {name} in an unknown way")


def _ints(value: Any) -> bool:
  return type(value) is tuple and all(type(n) is int for n in value)


def _refusal(what: str) -> ValueError:
  return ValueError(
    f"its pickle asks for {what[:120]}, which no state dict needs; nothing of it was executed. If "
    "you trust the file, load it with PyTorch and save the state dict alone: "
    "torch.save(model.state_dict(), new)."
  )


# These two begin a file of the format before PyTorch 1.6.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MAX_DIMS = 64  # The limit of PyTorch and of NumPy.

Load = Callable[[Storage], bytes]


def read(path: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a state dict that `torch.save` wrote, by name.

  The arrays are read-only and keep shape and dtype (bfloat16 is that of ml_dtypes). Tensors that
  share a storage in the file share their memory.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no PyTorch file, is damaged, holds something other than one state dict, or
      asks for anything that a state dict does not need.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f"{path!r}: there is no such file of PyTorch weights.")
  try:
    with open(path, "rb") as file:
      tree, load = _open(file)
      return {name: _array(name, tensor, load) for name, tensor in _state_dict(tree).items()}
  except ValueError as error:
    raise ValueError(f"{path!r} cannot be read as PyTorch weights: {error}") from None


def _open(file: BinaryIO) -> tuple[Any, Load]:
  """Returns the value of the file's pickle, and a function that loads the bytes of a storage."""
  head = file.read(16)
  file.seek(0)
  if head[:1] == b"\x80":
    return _open_stream(file)
  if head[:4] != b"PK\x03\x04":
    raise ValueError(f"it is neither a zip archive nor a pickle, but begins with {head!r}.")
  try:
    return _open_zip(file)
  except zipfile.BadZipFile as error:
    raise ValueError(f"its zip archive is damaged or truncated ({error}).") from None


def _open_zip(file: BinaryIO) -> tuple[Any, Load]:
  """Opens the format of PyTorch >= 1.6: ROOT/data.pkl and raw storages as ROOT/data/KEY."""
  archive = zipfile.ZipFile(file)
  members = archive.infolist()
  # Before anything is read, the sum of what may be read is bounded by the size of the file.
  if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
    raise ValueError("its zip archive is compressed or encrypted, which torch.save never does.")
  if any(m.file_size != m.compress_size for m in members) or (
    sum(m.file_size for m in members) > os.fstat(file.fileno()).st_size
  ):
    raise ValueError("its zip archive declares more bytes than the file has.")
  names = archive.NameToInfo
  roots = [n.removesuffix("/data.pkl") for n in names if n.endswith("/data.pkl")]
  if len(roots) != 1:
    raise ValueError(f"its zip archive holds {len(roots)} files data.pkl, not one.")
  (root,) = roots
  if f"{root}/constants.pkl" in names:
    raise ValueError(
      "it is a TorchScript program. Save its weights alone with PyTorch: "
      "torch.save(torch.jit.load(old).state_dict(), new)."
    )
  if f"{root}/byteorder" in names:
    _check_order(_member(archive, f"{root}/byteorder") == b"little")

  def load(storage: Storage) -> bytes:
    name = f"{root}/data/{storage.key}"
    if name not in names:
      raise ValueError(f"it names a storage {storage.key!r}, but the archive has no {name!r}.")
    if names[name].file_size != storage.numel * storage.dtype.itemsize:
      raise ValueError(
        f"storage {storage.key!r} has {names[name].file_size} bytes, but must have "
        f"{storage.numel} elements of {storage.dtype}."
      )
    return _member(archive, name)

  return unpickle(io.BytesIO(_member(archive, f"{root}/data.pkl")), {}), _cached(load)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
  try:
    return archive.read(name)  # Checks the CRC, too.
  except (zipfile.BadZipFile, EOFError, struct.error, OSError, NotImplementedError) as error:
    raise ValueError(f"{name!r} in its zip archive is damaged ({error}).") from None


def _open_stream(file: BinaryIO) -> tuple[Any, Load]:
  """Opens the format before PyTorch 1.6: five pickles, then storages as int64 numel and bytes."""
  storages: dict[str, Storage] = {}
  # A pickle may ask for any number of bytes. `file.read` would allocate them all, a map does not.
  file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  if unpickle(file, {}) != MAGIC:
    raise ValueError("it is a pickle, but not one of torch.save.")
  if (version := unpickle(file, {})) != PROTOCOL:
    shown = version if type(version) is int else type(version).__name__
    raise ValueError(f"its protocol is {shown}, but only {PROTOCOL} is known.")
  system = unpickle(file, {})
  _check_order(isinstance(system, dict) and system.get("little_endian") is True)
  tree, keys = unpickle(file, storages), unpickle(file, {})
  places = {}
  for key in keys if type(keys) is list else ():
    if type(key) is not str or key not in storages:
      raise ValueError("it holds a storage that no tensor names.")
    header, expected = file.read(8), storages[key].numel
    if len(header) == 8 and (numel := struct.unpack("<q", header)[0]) != expected:
      raise ValueError(f"storage {key!r} has {numel} elements, but must have {expected}.")
    places[key] = file.tell(), expected * storages[key].dtype.itemsize
    if len(header) < 8 or sum(places[key]) > len(file):
      raise ValueError(f"it is truncated: it ends within storage {key!r}.")
    file.seek(sum(places[key]))

  def load(storage: Storage) -> bytes:
    if storage.key not in places:
      raise ValueError(f"it names a storage {storage.key!r}, but does not hold it.")
    position, nbytes = places[storage.key]
    file.seek(position)
    return file.read(nbytes)

  return tree, _cached(load)


def _check_order(little: bool) -> None:
  if not little:
    raise ValueError(
      "it is not little-endian. Load it with PyTorch on a little-endian machine and save it again."
    )


def _cached(load: Load) -> Load:
  loaded: dict[Storage, bytes] = {}
  return lambda storage: loaded.get(storage) or loaded.setdefault(storage, load(storage))


def _state_dict(tree: Any) -> dict[str, Tensor]:
  """Returns the tree if it maps names to tensors, else raises ValueError saying what it is."""
  if not isinstance(tree, dict):
    raise ValueError(f"it holds a {type(tree).__name__.lower()}, not a state dict.")
  other = [k for k, v in tree.items() if type(k) is not str or not isinstance(v, Tensor)]
  if other:
    raise ValueError(
      f"it is no state dict, as {str(other[0])[:80]!r} is not the name of a tensor. Its keys are "
      f"{[str(k)[:80] for k in list(tree)[:20]]}{'...' if len(tree) > 20 else ''}. Save the state "
      "dict alone with PyTorch, for example torch.save(torch.load(old)['state_dict'], new)."
    )
  return dict(tree)


def _array(name: str, tensor: Tensor, load: Load) -> np.ndarray:
  """Returns a read-only view of the storage, after checking that no element lies outside of it."""
  storage, shape, strides, offset = tensor.storage, tensor.shape, tensor.strides, tensor.offset
  what = (
    f"tensor {name!r} of shape {shape[:MAX_DIMS]}, strides {strides[:MAX_DIMS]}, offset {offset}"
  )
  if len(shape) != len(strides) or len(shape) > MAX_DIMS or min((offset, *shape, *strides)) < 0:
    raise ValueError(f"{what} is malformed.")
  count, itemsize = math.prod(shape), storage.dtype.itemsize
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if count and last >= storage.numel:
    raise ValueError(f"{what} reaches beyond its storage of {storage.numel} elements.")
  contents = load(storage)
  try:
    if not count:
      return np.empty(shape, storage.dtype)
    # An axis of length 1 may have a stride that fits no machine word, but is never stepped along.
    strides = tuple(
      s * itemsize if n > 1 else itemsize for n, s in zip(shape, strides, strict=True)
    )
    return np.ndarray(shape, storage.dtype, contents, offset * itemsize, strides)
  except (ValueError, OverflowError, MemoryError) as error:
    raise ValueError(f"{what} fits no array ({error}).") from None

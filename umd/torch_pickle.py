"""The pickles inside PyTorch's files, carried out without importing or calling what they name.

A pickle is a program. Of its instructions the machine here knows those that make dicts, lists,
tuples and tensors, and refuses all others.
"""

import pickletools
from collections import OrderedDict
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
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
LITERALS |= {"BINSTRING", "SHORT_BINSTRING"}  # Python 2's strings.
CONSTANTS = {
  **{"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple},
  **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
}


@dataclass(frozen=True)
class Global:
  """Something that a pickle names: a name alone, never the thing."""

  name: str


@dataclass(frozen=True)
class Storage:
  """Where elements lie: `key` of the raw bytes, `numel` elements of `dtype`."""

  key: str
  dtype: np.dtype
  numel: int


@dataclass(frozen=True)
class Tensor:
  """What a file says of a tensor, unchecked; offset and strides count elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def unpickle(file: BinaryIO, storages: dict[str, Storage]) -> Any:
  """The value of the pickle that starts at the file's position; leaves the file at its end.

  Adds the storages that it names to `storages`, by key.
  """
  machine = Machine(storages)
  try:
    for op, argument, _ in pickletools.genops(file):
      if op.name == "STOP":
        break
      machine.step(op.name, argument)
    return machine.stack.pop()
  except (IndexError, KeyError):  # More popped than pushed, more recalled than memorised.
    raise ValueError("its pickle is malformed or truncated.") from None


class Machine:
  """Carries out the instructions of a pickle that make dicts, lists, tuples and tensors.

  What `pickle` would import is a name here, and the three calls that state dicts contain are the
  three branches of `_call`: there is nothing else that a file could reach.
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
    """The last `count` values, all since the last mark if None."""
    if count is None:
      items, self.stack = self.stack, self.marked.pop()
      return items
    return [self.stack.pop() for _ in range(count)][::-1]

  def _top(self, kind: type) -> Any:
    if not isinstance(self.stack[-1], kind):
      raise _refusal(f"a change of a {type(self.stack[-1]).__name__}")
    return self.stack[-1]

  def _storage(self, described: Any) -> Storage:
    match described:
      # The last is of PyTorch before 1.6: where in another storage this one lies, ever None.
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
    if type(key) not in (str, int):  # Hashing what is nested deeply would end the process.
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

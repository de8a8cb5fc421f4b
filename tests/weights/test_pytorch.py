"""PyTorch files against PyTorch where it is installed, hand-made ones elsewhere; hostile ones."""

import io
import os
import pickle
import re
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from umd.weights.pytorch import read

# Files are made without PyTorch by Python's own pickler, which is told that these are torch's.
FAKES = {}


def fake(module, name, value):
  value.__module__, value.__name__, value.__qualname__ = module, name, name
  FAKES.setdefault(module, types.ModuleType(module)).__dict__[name] = value
  return value


KINDS = {"Float": "f4", "Double": "f8", "Half": "f2", "Long": "i8", "Int": "i4", "Short": "i2"}
KINDS |= {"Char": "i1", "Byte": "u1", "Bool": "?", "BFloat16": ml_dtypes.bfloat16}
CLASSES = {np.dtype(v): fake("torch", f"{k}Storage", type(k, (), {})) for k, v in KINDS.items()}
rebuild_tensor = fake("torch._utils", "_rebuild_tensor_v2", lambda *args: None)
rebuild_parameter = fake("torch._utils", "_rebuild_parameter", lambda *args: None)


class Stored:
  """A storage: what the pickle says of it may differ from what there is."""

  def __init__(self, values, key="0", **claims):
    self.values, self.key = np.asarray(values), key
    self.id = ("storage", CLASSES[self.values.dtype], key, "cpu", self.values.size)
    if "id" in claims:
      self.id = claims["id"]
    if "numel" in claims:
      self.id = (*self.id[:4], claims["numel"])


class Calls:
  """Pickled as a call of `function`, with attributes if `state` is given."""

  def __init__(self, function, *args, state=None):
    self.reduced = (function, args) if state is None else (function, args, state)

  def __reduce__(self):
    return self.reduced


def tensor(storage, shape, strides, offset=0):
  return Calls(rebuild_tensor, storage, offset, shape, strides, False, OrderedDict())


def whole(values, key="0"):
  """A contiguous tensor with a storage of its own."""
  values = np.asarray(values)
  strides = tuple(s // values.itemsize for s in values.strides)
  return tensor(Stored(values.ravel(), key), values.shape, strides)


def dumps(tree, protocol=2, extra_id=()):
  """(pickle, {key: raw bytes}) of a tree."""
  storages = {}

  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      if not isinstance(value, Stored):
        return None
      storages[value.key] = value
      return (*value.id, *extra_id)

  file, real = io.BytesIO(), {name: sys.modules.get(name) for name in FAKES}
  sys.modules.update(FAKES)
  try:
    Pickler(file, protocol).dump(tree)
  finally:
    for name, module in real.items():
      sys.modules.pop(name)
      if module is not None:
        sys.modules[name] = module
  return file.getvalue(), storages


def write(path, members, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, contents in members.items():
      archive.writestr(name, contents)
  return str(path)


def save(path, tree, root="archive", protocol=2, **changes):
  """Writes a tree as PyTorch >= 1.6 does; `changes` are further or other members."""
  data, storages = dumps(tree, protocol)
  members = {f"{root}/data.pkl": data, f"{root}/byteorder": b"little"}
  members |= {f"{root}/data/{key}": s.values.tobytes() for key, s in storages.items()}
  members |= {f"{root}/version": b"3\n", f"{root}/.data/serialization_id": b"1" * 40}
  return write(path, members | {f"{root}/{name}": value for name, value in changes.items()})


def save_stream(path, tree, system=None, magic=0x1950A86A20F9469CFC6C, version=1001):
  """Writes a tree as PyTorch < 1.6 does."""
  data, storages = dumps(tree, extra_id=(None,))
  system = system or {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
  keys = sorted(storages)
  before, after = [magic, version, system], [keys]
  contents = b"".join(pickle.dumps(v, 2) for v in before) + data
  contents += b"".join(pickle.dumps(v, 2) for v in after)
  for key in keys:
    contents += struct.pack("<q", storages[key].values.size) + storages[key].values.tobytes()
  path.write_bytes(contents)
  return str(path)


FORMATS = pytest.mark.parametrize("save", [save, save_stream], ids=["zip", "stream"])


def check_equal(found, expected):
  assert list(found) == list(expected)
  for name, value in expected.items():
    assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@FORMATS
def test_every_dtype_and_shape_comes_back(save, tmp_path):
  rng = np.random.default_rng(0)
  values = {
    f"layer.{i}": (4 * rng.standard_normal((2, 3))).astype(d) for i, d in enumerate(CLASSES)
  }
  values |= {"scalar": np.float32(7).reshape(()), "one": np.ones((1, 1), np.int64)}
  values |= {"none": np.zeros((0, 3), np.float32), "deep": np.arange(720.0).reshape(6, 5, 4, 3, 2)}
  tree = OrderedDict((k, whole(v, str(i))) for i, (k, v) in enumerate(values.items()))
  check_equal(read(save(tmp_path / "w.pth", tree)), values)
  check_equal(read(save(tmp_path / "w.pth", dict(tree))), values)


@FORMATS
def test_views_have_their_offsets_and_strides_and_share_memory(save, tmp_path):
  base = np.arange(24, dtype=np.float32)
  stored = Stored(base)
  tree = {
    "transposed": tensor(stored, (4, 6), (1, 4)),
    "part": tensor(stored, (2, 3), (6, 2), 7),
    "last": tensor(stored, (1,), (2**70,), 23),  # Never stepped, whatever the stride.
    "expanded": tensor(stored, (5, 2), (0, 1), 22),
    "empty": tensor(stored, (0, 2), (2, 1), 999),
  }
  found = read(save(tmp_path / "w.pth", tree))
  expected = {
    "transposed": base.reshape(6, 4).T,
    "part": np.array([[7, 9, 11], [13, 15, 17]], np.float32),
    "last": base[23:],
    "expanded": np.tile(base[22:], (5, 1)),
    "empty": np.zeros((0, 2), np.float32),
  }
  check_equal(found, expected)
  assert np.shares_memory(found["transposed"], found["part"])
  with pytest.raises(ValueError, match="read-only"):
    found["part"][0, 0] = 1


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_parameters_and_newer_pickles_are_understood(protocol, tmp_path):
  """Module.state_dict() is an OrderedDict with an attribute `_metadata`."""
  values = np.arange(3.0)
  tree = OrderedDict(weight=Calls(rebuild_parameter, whole(values), True, OrderedDict()))
  tree["_tied"] = tree["weight"]
  tree._metadata = OrderedDict({"": {"version": 1}, "a": {"version": 2, "x": [1.5, None, True]}})
  path = save(tmp_path / "w.pth", tree, root="some name", protocol=protocol)
  check_equal(read(path), {"weight": values, "_tied": values})


def test_a_dict_as_python_2_pickles_it(tmp_path):
  """OrderedDict is called with pairs, and its names are byte strings."""
  data, _ = dumps(Calls(OrderedDict, [["weight", whole(np.arange(3.0))]], state={"_metadata": 1}))
  old = data.replace(b"X\6\0\0\0weight", b"U\6weight")
  assert len(old) == len(data) - 3
  path = save(tmp_path / "w.pth", {"a": whole(np.arange(3.0))}, **{"data.pkl": old})
  check_equal(read(path), {"weight": np.arange(3.0)})


class Touch:
  """Pickled as a command that makes a file."""

  def __init__(self, path, function=os.system):
    self.path, self.function = path, function

  def __reduce__(self):
    command = {os.system: f"touch {self.path}", eval: f"open({str(self.path)!r}, 'w')"}
    return self.function, (command[self.function],)


@FORMATS
@pytest.mark.parametrize("function, named", [(os.system, "system"), (eval, "builtin.*eval")])
@pytest.mark.parametrize(
  "place",
  [
    lambda evil: evil,
    lambda evil: {"a": whole([1.0]), "b": evil},
    lambda evil: Calls(OrderedDict, state={"_metadata": evil}),
    lambda evil: {"a": Calls(rebuild_tensor, Stored([1.0]), 0, (1,), (1,), False, evil)},
  ],
  ids=["all", "value", "attribute", "argument"],
)
def test_nothing_that_a_file_names_is_executed(save, function, named, place, tmp_path):
  victim = tmp_path / "victim"
  path = save(tmp_path / "w.pth", place(Touch(victim, function)))
  with pytest.raises(ValueError, match=f"{named}.*nothing of it was executed"):
    read(path)
  assert not victim.exists()
  # The same file does its work where pickles are trusted.
  pickle.loads(pickle.dumps(Touch(victim, function)))
  assert victim.exists()


HOSTILE = {
  "numpy": (lambda: {"a": np.arange(3)}, "numpy.*nothing of it"),
  "a getattr": (lambda: Calls(getattr, OrderedDict, "fromkeys"), r"getattr.*nothing of it"),
  "a class": (lambda: Calls(types.SimpleNamespace), "SimpleNamespace.*nothing of it"),
  "a storage called": (lambda: Calls(CLASSES[np.dtype("f4")], 3), "call of torch.FloatStorage"),
  "a dict of numbers": (lambda: Calls(OrderedDict, 3), "call of collections.OrderedDict"),
  "a dict of tuples": (lambda: Calls(OrderedDict, [(1, 2)]), "call of collections.OrderedDict"),
  "too few": (lambda: Calls(rebuild_tensor, Stored([1.0])), "call of .*_rebuild_tensor_v2"),
  "no storage": (lambda: tensor("0", (1,), (1,)), "call of .*_rebuild_tensor_v2"),
  "floats as shape": (lambda: tensor(Stored([1.0]), (1.0,), (1,)), "call of .*_rebuild_tensor_v2"),
  "a parameter": (lambda: Calls(rebuild_parameter, "a", True, 0), "call of .*_rebuild_parameter"),
  "attributes": (lambda: Calls(rebuild_tensor, Stored([1.0]), 0, (1,), (1,), 0, 0, state={"a": 1}),
                 "change of a Tensor"),
  "a tuple as key": (lambda: {(1,): 2}, "tuple as a key"),
  "a set": (lambda: {"a": {1, 2}}, "set"),
  "no storage id": (lambda: whole_of(Stored([1.0], id=("module", 1))), "storage of unknown form"),
  "an odd key": (lambda: whole_of(Stored([1.0], id=("storage", CLASSES[np.dtype("f4")], 1, "", 1))),
                 "storage of unknown form"),
  "negative numel": (lambda: whole_of(Stored([1.0], numel=-1)), "storage of unknown form"),
  "two numels": (lambda: {"a": whole_of(Stored([1.0])), "b": whole_of(Stored([1.0, 2.0]))},
                 "storage '0' in two ways"),
}  # fmt: skip


def whole_of(stored):
  return tensor(stored, (1,), (1,))


@pytest.mark.parametrize("make, message", HOSTILE.values(), ids=HOSTILE)
def test_odd_pickles_are_refused(make, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    read(save(tmp_path / "w.pth", make()))


@pytest.mark.parametrize(
  "shape, strides, offset, message",
  [
    ((3,), (1,), 0, "beyond its storage of 2"),
    ((2,), (1,), 1, "beyond"),
    ((2,), (2,), 0, "beyond"),
    ((1,), (1,), 2, "beyond"),
    ((), (), 2, "beyond"),
    ((2**62, 8), (0, 2**62), 0, "beyond"),  # In machine words the reach would be 0 again.
    ((-1,), (1,), 0, "malformed"),
    ((2,), (-1,), 1, "malformed"),
    ((1,), (1,), -1, "malformed"),
    ((1,), (1, 1), 0, "malformed"),
    ((1,) * 65, (1,) * 65, 0, "malformed"),
    ((2**40, 2**40), (0, 0), 0, "fits no array"),
    ((0, 2**70), (1, 1), 0, "fits no array"),
  ],
)
def test_no_tensor_reaches_outside_its_storage(shape, strides, offset, message, tmp_path):
  good = tensor(Stored([1.0, 2.0]), (2,), (1,))
  bad = tensor(Stored([1.0, 2.0]), shape, strides, offset)
  assert read(save(tmp_path / "good.pth", {"a": good}))["a"].tolist() == [1, 2]
  with pytest.raises(ValueError, match=f"tensor 'b'.*{message}"):
    read(save(tmp_path / "bad.pth", {"b": bad}))


def test_storages_that_are_missing_or_of_another_size_are_errors(tmp_path):
  outside = tmp_path / "x"
  outside.write_bytes(bytes(8))
  with pytest.raises(ValueError, match=r"storage '\.\./\.\./x', but the archive has no"):
    data, _ = dumps({"a": whole_of(Stored([1.0], "../../x"))})
    read(save(tmp_path / "w.pth", {}, **{"data.pkl": data}))
  with pytest.raises(ValueError, match=r"storage '0' has 8 bytes.* 1000000 elements of float64"):
    read(save(tmp_path / "w.pth", {"a": whole_of(Stored([1.0], numel=10**6))}))
  with pytest.raises(ValueError, match="storage '0' has 1 elements, but must have 1000000"):
    read(save_stream(tmp_path / "w.pth", {"a": whole_of(Stored([1.0], numel=10**6))}))


def test_only_one_state_dict_is_accepted_and_others_are_named(tmp_path):
  nested = {"state_dict": {"a": whole([1.0])}, "epoch": 3}
  with pytest.raises(ValueError, match=r"'state_dict', 'epoch'.*torch.save\(torch.load"):
    read(save(tmp_path / "w.pth", nested))
  with pytest.raises(ValueError, match="'epoch' is not the name of a tensor"):
    read(save(tmp_path / "w.pth", {"a": whole([1.0]), "epoch": 3}))
  for tree, kind in [(whole([1.0]), "tensor"), ([1], "list"), (3, "int")]:
    with pytest.raises(ValueError, match=f"holds a {kind}, not a state dict"):
      read(save(tmp_path / "w.pth", tree))


def test_zip_archives_that_pytorch_does_not_write_are_refused(tmp_path):
  path, tree = tmp_path / "w.pth", {"a": whole(np.zeros(1000))}
  with pytest.raises(ValueError, match="little-endian"):
    read(save(path, tree, byteorder=b"big"))
  with pytest.raises(ValueError, match="TorchScript"):
    read(save(path, tree, **{"constants.pkl": b""}))
  with pytest.raises(ValueError, match=r"0 files data.pkl"):
    read(write(path, {"a/b": b""}))
  with pytest.raises(ValueError, match=r"2 files data.pkl"):
    read(write(path, {"a/data.pkl": b"", "b/data.pkl": b""}))
  with zipfile.ZipFile(save(path, tree)) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  with pytest.raises(ValueError, match="compressed"):
    read(write(path, members, zipfile.ZIP_DEFLATED))


def test_an_archive_that_declares_more_than_it_has_is_refused_before_it_is_read(tmp_path):
  path = save(tmp_path / "w.pth", {"a": whole_of(Stored(np.zeros(3), numel=2**28))})
  contents = bytearray(Path(path).read_bytes())
  entry = contents.rindex(b"archive/data/0") - 46  # Sizes are at 20 and 24 of a directory entry.
  assert contents[entry : entry + 4] == b"PK\1\2"
  contents[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
  (tmp_path / "w.pth").write_bytes(contents)
  with pytest.raises(ValueError, match="more bytes than the file has"):
    read(path)


@FORMATS
def test_every_truncation_is_an_error(save, tmp_path):
  path = save(tmp_path / "w.pth", {"a": whole(np.arange(3.0)), "b": whole(np.arange(5), "1")})
  contents = Path(path).read_bytes()
  for n in range(0, len(contents) - 1, 7):
    (tmp_path / "w.pth").write_bytes(contents[:n])
    with pytest.raises(ValueError, match=r"w\.pth' cannot be read as PyTorch weights"):
      read(path)


def test_a_flipped_bit_in_an_archive_is_found(tmp_path):
  path = save(tmp_path / "w.pth", {"a": whole(np.arange(100.0))})
  contents = bytearray(Path(path).read_bytes())
  contents[contents.index(np.float64(50).tobytes())] ^= 1
  (tmp_path / "w.pth").write_bytes(contents)
  with pytest.raises(ValueError, match="damaged"):
    read(path)


@pytest.mark.parametrize("save", [save, save_stream], ids=["zip", "stream"])
def test_random_damage_to_the_pickle_gives_tensors_or_one_kind_of_error(save, tmp_path):
  rng, path = np.random.default_rng(0), tmp_path / "w.pth"
  tree = OrderedDict(a=whole(np.arange(4.0)), b=whole(np.arange(3), "1"))
  tree._metadata = OrderedDict({"": {"version": 1}})
  data, good = dumps(tree)[0], Path(save_stream(path, tree)).read_bytes()
  failed = 0
  for _ in range(400):
    original = data if save is not save_stream else good
    damaged = bytearray(original)
    for at in rng.integers(len(original), size=rng.integers(1, 4)):
      damaged[at] = rng.integers(256)
    if save is save_stream:
      path.write_bytes(damaged)
    else:
      save(path, tree, **{"data.pkl": bytes(damaged)})
    try:
      found = read(str(path))
    except ValueError:
      failed += 1
    else:
      assert all(isinstance(value, np.ndarray) for value in found.values())
  assert 50 < failed < 400


BOMBS = {
  "a string of 2^31 bytes": b"\x80\x02X\xff\xff\xff\x7fa.",
  "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.",
  "a long of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7fa.",
  "a deep tuple as key": b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"Ns.",
  "a deep value": b"\x80\x02}X\1\0\0\0a)" + b"\x85" * 10**5 + b"s.",
  "no stop": b"\x80\x02}",
  "nothing to pop": b"\x80\x02\x85.",
  "an empty stack": b"\x80\x02.",
  "no mark": b"\x80\x02}u.",
  "nothing remembered": b"\x80\x02h\x07.",
  "half an item": b"\x80\x02}(X\1\0\0\0au.",
  "an unknown instruction": b"\x80\x02\xff.",
  "inst": b"(S'touch x'\nios\nsystem\n.",
  "an extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_malformed_pickles_end_in_an_error_at_once(data, tmp_path):
  with pytest.raises(ValueError, match="cannot be read as PyTorch weights"):
    read(save(tmp_path / "w.pth", {}, **{"data.pkl": data}))


def test_a_distant_place_to_remember_costs_nothing(tmp_path):
  data = b"\x80\x02}r\xff\xff\xff\x7f."  # Place 2^31 - 1: `pickle` would allocate 34 GB.
  assert read(save(tmp_path / "w.pth", {}, **{"data.pkl": data})) == {}


def test_streams_that_are_not_pytorchs_are_refused(tmp_path):
  path, tree = tmp_path / "w.pth", {"a": whole(np.arange(3.0))}
  with pytest.raises(ValueError, match=r"not one of torch.save"):
    read(save_stream(path, tree, magic=1))
  with pytest.raises(ValueError, match="protocol is 1002"):
    read(save_stream(path, tree, version=1002))
  with pytest.raises(ValueError, match="little-endian"):
    read(save_stream(path, tree, system={"little_endian": False}))


def test_what_is_no_pytorch_file_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no\.pth"):
    read(str(tmp_path / "no.pth"))
  with pytest.raises(FileNotFoundError):
    read(str(tmp_path))
  path = tmp_path / "w.pth"
  path.write_bytes(b"<html>not found</html>")
  with pytest.raises(ValueError, match=re.escape("begins with b'<html>not found<'")):
    read(str(path))


# Against PyTorch itself.


@pytest.fixture
def torch():
  return pytest.importorskip("torch", reason="PyTorch is no dependency; only this oracle needs it")


def as_numpy(value):
  value = value.detach()
  if str(value.dtype) == "torch.bfloat16":  # NumPy has none; all values fit in float32.
    return value.float().numpy().astype(ml_dtypes.bfloat16)
  return value.numpy()


def compare(torch, tree, path, **options):
  torch.save(tree, path, **options)
  expected = {k: as_numpy(v) for k, v in torch.load(path, weights_only=True).items()}
  check_equal(read(str(path)), expected)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_files_that_pytorch_writes(torch, new, tmp_path):
  torch.manual_seed(0)
  module = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4, bias=False)
  )
  module.append(torch.nn.Linear(4, 4))
  module[3].weight = module[2].weight  # Tied.
  base = torch.arange(60.0).reshape(3, 4, 5)
  kinds = ["float64", "float32", "float16", "bfloat16", "bool"]
  kinds += ["int64", "int32", "int16", "int8", "uint8"]
  views = {
    **{kind: (4 * torch.randn(2, 3)).to(getattr(torch, kind)) for kind in kinds},
    **{"base": base, "view": base[1:, ::2, 1:4], "transposed": base.permute(2, 0, 1)},
    **{
      "scalar": torch.tensor(3.0),
      "empty": torch.zeros(0, 3),
      "expanded": base[0, 0].expand(7, 5),
    },
    "parameter": torch.nn.Parameter(torch.randn(3)),
  }
  for tree in (module.state_dict(), dict(module.named_parameters()), views):
    compare(torch, tree, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
  found = read(str(tmp_path / "w.pth"))
  assert np.shares_memory(found["base"], found["view"])
  with pytest.raises(ValueError, match=r"Sequential.*nothing of it was executed"):
    torch.save(module, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    read(str(tmp_path / "w.pth"))


def test_hand_made_files_are_what_pytorch_reads(torch, tmp_path):
  """The tests above rest on the writers of this file."""
  values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.arange(3)}
  tree = {
    "a": tensor(Stored(np.arange(6, dtype="f4")), (3, 2), (1, 3)),
    "b": whole(values["b"], "1"),
  }
  for write_file in (save, save_stream):
    loaded = torch.load(write_file(tmp_path / "w.pth", tree), weights_only=True)
    check_equal({k: v.numpy() for k, v in loaded.items()}, values)

"""TFDS data sets, undecoded: read as a stream from TFRecord files, at random from ArrayRecord."""

import bisect
import difflib
import functools
import hashlib
import os
from pathlib import PurePath
from typing import Any

import numpy as np

from umd.data.host import in_graph, process_count, tensorflow
from umd.data.records import Records


@functools.cache
def builder_of(name: str, data_dir: str):
  """The builder of a prepared data set.

  What is not prepared is downloaded and prepared now, if there is one process and it can be.

  Args:
    name: as TFDS writes it: NAME, NAME/CONFIG, NAME:VERSION.
    data_dir: where TFDS keeps its data, or the folder of one prepared data set; "": the default.

  Raises:
    ValueError: there is no such data set, or it is not prepared and cannot be here.
  """
  tf = tensorflow()  # Before TFDS imports it.
  import tensorflow_datasets as tfds

  if data_dir and tf.io.gfile.exists(os.path.join(data_dir, "dataset_info.json")):
    return tfds.builder_from_directory(data_dir)
  try:
    builder = tfds.builder(name, data_dir=data_dir or None)
  except (ValueError, AssertionError) as error:  # Not found; no such version.
    raise ValueError(_unknown(name, data_dir, tfds.list_builders(), error)) from None
  if not builder.is_prepared():
    _prepare(name, builder)
  return builder


def _unknown(name, data_dir, with_code, error) -> str:
  tf = tensorflow()
  prepared = []
  if data_dir and tf.io.gfile.isdir(data_dir):
    prepared = [folder.rstrip("/") for folder in tf.io.gfile.listdir(data_dir)]
  base = name.split(":")[0].split("/")[0]
  if base in with_code or base in prepared:
    reason = str(error).strip().split("\n")[0]
    return f"data 'tfds:{name}' cannot be had from {data_dir or 'the default folder'}: {reason}"
  near = difflib.get_close_matches(base, sorted({*with_code, *prepared}), n=3, cutoff=0.6)
  hint = f" Did you mean {' or '.join(near)}?" if near else ""
  return (
    f"data 'tfds:{name}': TFDS has no such data set, and none is prepared in "
    f"{data_dir or 'its default folder'} (data_dir, TFDS_DATA_DIR).{hint}"
  )


def _prepare(name: str, builder):
  """Downloads and prepares a data set; ValueError if that cannot be done here."""
  root = os.fspath(builder._data_dir_root)
  where = f"data 'tfds:{name}' is not prepared in {root!r}"
  remedy = (
    "Set data_dir or TFDS_DATA_DIR to where it is, or prepare it once: .venv/bin/python -c "
    f"\"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{root}')"
    '.download_and_prepare()"'
  )
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    needed = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
    folder = os.path.join(root, "downloads", "manual")
    raise ValueError(
      f"{where}, and its files must be downloaded by hand. {remedy} with the downloads in "
      f"{folder}. TFDS: {needed}"
    )
  if process_count() > 1:
    raise ValueError(f"{where}, and {process_count()} processes cannot all prepare it. {remedy}")
  print(f"[data] tfds:{name} is not prepared: downloading it to {root}", flush=True)
  try:
    builder.download_and_prepare()
  except Exception as error:  # Whatever TFDS, the network or the disk raise.
    reason = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
    raise ValueError(f"{where} and could not be: {reason} {remedy}") from error


CYCLE, BLOCK = 16, 16  # Files read side by side, and records from each in turn.
READ_AHEAD = 1 << 23  # Bytes of a file: what remote storage likes.


def tfds(name: str, split: str, data_dir: str, shuffle_buffer: int) -> Records:
  """A split of a TFDS data set, e.g. ("cifar10:3.0.2", "train[:99%]").

  Raises:
    ValueError: no such data set or split, no images, or it is not prepared and cannot be here.
  """
  what = f"data 'tfds:{name}'"
  builder = builder_of(name, data_dir)
  info = _split(builder.info.splits, split, what)
  files = info.file_instructions
  image, label = image_and_label(builder.info, what)
  name = f"tfds:{name}:{split}"
  if builder.info.file_format.value == "array_record":
    return ArrayRecords(name, files, builder.info.features, image, label)
  return TFRecords(name, files, builder.info.features, image, label, shuffle_buffer)


def _split(known, split: str, what: str):
  sizes = ", ".join(f"{name} ({of.num_examples} images)" for name, of in known.items())
  try:
    found = known[split]
  except (ValueError, KeyError) as error:
    reason = str(error).split("\n")[0]
    raise ValueError(f"{what} has no split {split!r}; it has {sizes}. TFDS: {reason}") from None
  if not found.num_examples:
    raise ValueError(f"{what}: split {split!r} holds no images; there are {sizes}.")
  return found


def image_and_label(info, what: str) -> tuple[str, str | None]:
  """Names of the features that hold the image and the class; None if there are no classes.

  They are `image` and `label`, or else what TFDS calls the supervised keys.
  """
  import tensorflow_datasets as tfds

  features, supervised = info.features, info.supervised_keys or (None, None)
  arrays = (tfds.features.Image, tfds.features.Tensor)
  is_image = lambda feature: isinstance(feature, arrays) and len(feature.shape) == 3
  is_label = lambda feature: isinstance(feature, tfds.features.ClassLabel)
  find = lambda names, fits: next(
    (n for n in names if isinstance(n, str) and n in features and fits(features[n])), None
  )
  image = find(("image", supervised[0]), is_image)
  if image is None:
    raise ValueError(f"{what} has no image feature; it has {', '.join(features)}.")
  if isinstance(features[image], tfds.features.Image) and features[image].np_dtype != np.uint8:
    kind = features[image].np_dtype.__name__
    raise ValueError(f"{what} holds {kind} images; only those of uint8 can be decoded.")
  return image, find(("label", supervised[-1]), is_label)


class TfdsRecords(Records):
  """Serialized examples in the files of a split."""

  def __init__(self, name, files, features, image, label):
    import tensorflow_datasets as tfds

    encoded = isinstance(features[image], tfds.features.Image)
    classes = features[label] if label else None
    super().__init__(
      name,
      "string" if encoded else np.dtype(features[image].np_dtype).name,
      features[image].shape,
      classes.num_classes if label else 0,
      (classes.names or ()) if label else (),
    )
    self._image, self._label, self._files = image, label, files
    # Only what is needed is taken out of the records.
    self._features = tfds.features.FeaturesDict({k: features[k] for k in (image, label) if k})
    self._decoders = {image: tfds.decode.SkipDecoding()} if encoded else None
    self._ends = np.cumsum([file.take for file in files])

  def __len__(self):
    return int(self._ends[-1])

  def parse(self, row):
    example = self._features.deserialize_example(row["record"], decoders=self._decoders)
    label = example[self._label] if self._label else 0
    return {"image": example[self._image], "label": tensorflow().cast(label, "int32")}

  def fingerprint(self):
    """Of the files' names, with the data set's name and version, and of what is taken of each."""
    parts = [("/".join(PurePath(f.filename).parts[-4:]), f.skip, f.take) for f in self._files]
    return hashlib.sha256(repr((parts, self._image, self._label)).encode()).hexdigest()

  def describe(self, index):
    file = self._files[bisect.bisect_right(self._ends, index)]
    return f"record {index} of data {self.name!r} (in {os.fspath(file.filename)!r})"


class ArrayRecords(TfdsRecords):
  """Records of ArrayRecord files, which can be read at random."""

  @functools.cached_property
  def _source(self):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(self._files)

  def fetch(self, ids):
    found = np.empty(len(ids), object)
    found[:] = self._source.__getitems__([int(i) for i in ids])
    return {"record": found}


class TFRecords(TfdsRecords):
  """Records of TFRecord files, which can be read from their beginnings only."""

  random_access = False

  def __init__(self, name, files, features, image, label, shuffle_buffer):
    super().__init__(name, files, features, image, label)
    if shuffle_buffer < 1:
      raise ValueError(f"data {name!r}: shuffle_buffer={shuffle_buffer} must be positive.")
    self._buffer = shuffle_buffer

  def stream(self, low: int, high: int, seed: int | None = None, epoch: Any = None):
    tf = tensorflow()
    files = self._cut(low, high)
    if seed is not None:
      count = len(files["name"])
      order, shuffle_seed = tf.numpy_function(
        lambda epoch: _draw(seed, epoch, count), [epoch], [tf.int64, tf.int64], stateful=False
      )
      files = {k: tf.gather(v, tf.ensure_shape(order, [count])) for k, v in files.items()}
    rows = tf.data.Dataset.from_tensor_slices(files).interleave(
      in_graph(_read_file),
      cycle_length=CYCLE,
      block_length=BLOCK,
      num_parallel_calls=tf.data.AUTOTUNE,
      deterministic=True,
    )
    if seed is None:
      return rows
    shuffle_seed = tf.ensure_shape(shuffle_seed, [])
    buffer = min(self._buffer, high - low)
    return rows.shuffle(buffer, seed=shuffle_seed, reshuffle_each_iteration=False)

  def _cut(self, low: int, high: int) -> dict[str, np.ndarray]:
    """Which records of which files are low..high - 1, and the index of the first of each file."""
    parts = []
    for file, end in zip(self._files, self._ends, strict=True):
      start = int(end) - file.take
      first, last = max(low, start), min(high, int(end))
      if first < last:
        skip = file.skip + first - start
        parts.append((os.fspath(file.filename), skip, last - first, first))
    names, *numbers = zip(*parts, strict=True)
    numbers = [np.array(column, np.int64) for column in numbers]
    return dict(zip(("name", "skip", "take", "index"), [np.array(names), *numbers], strict=True))


def _read_file(file):
  """tf.data of {record, index} of one file's part."""
  tf = tensorflow()
  records = tf.data.TFRecordDataset(file["name"], buffer_size=READ_AHEAD)
  records = records.skip(file["skip"]).take(file["take"])
  indices = tf.data.Dataset.range(file["index"], file["index"] + file["take"])
  return tf.data.Dataset.zip({"record": records, "index": indices})


def _draw(seed: int, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """(order of `count` files, seed of the shuffle buffer), from NumPy's fixed Philox stream."""
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count + 1)
  return np.argsort(bits[:count], kind="stable"), np.int64(bits[count] >> np.uint64(1))

"""TFDS data sets, undecoded: read as a stream from TFRecord files, at random from ArrayRecord."""

import bisect
import difflib
import functools
import hashlib
import os
from pathlib import PurePath
from typing import Any

import numpy as np

from umd.data.host import in_graph, tensorflow
from umd.data.records import Records

CYCLE, BLOCK = 16, 16  # Files read side by side, and records from each in turn.
READ_AHEAD = 1 << 23  # Bytes of a file: what remote storage likes.


def tfds(name: str, split: str, data_dir: str, shuffle_buffer: int) -> Records:
  """Returns a split of a TFDS data set, e.g. ("cifar10:3.0.2", "train[:99%]").

  A data set that is not prepared is downloaded and prepared, if there is one process and it can be.

  Args:
    name: as TFDS writes it: NAME, NAME/CONFIG, NAME:VERSION.
    split: as TFDS writes it.
    data_dir: where TFDS keeps its data, or the folder of one prepared data set; "": the default.
    shuffle_buffer: records to shuffle among, where the files are TFRecord.

  Raises:
    ValueError: no such data set or split, no images, or it is not prepared and cannot be here.
  """
  what = f"data 'tfds:{name}'"
  builder = _builder(name, data_dir)
  files = split_info(builder, split, what).file_instructions
  image, label = image_and_label(builder.info, what)
  name = f"tfds:{name}:{split}"
  if builder.info.file_format.value == "array_record":
    return ArrayRecords(name, files, builder.info.features, image, label)
  return TFRecords(name, files, builder.info.features, image, label, shuffle_buffer)


@functools.cache
def _builder(name: str, data_dir: str):
  """Returns the builder of a data set that is prepared by then."""
  tf = tensorflow()  # Before TFDS imports it.
  import tensorflow_datasets as tfds

  if data_dir and tf.io.gfile.exists(os.path.join(data_dir, "dataset_info.json")):
    return tfds.builder_from_directory(data_dir)
  try:
    builder = tfds.builder(name, data_dir=data_dir or None)
  except (ValueError, AssertionError) as error:  # Not found; no such version.
    prepared = []
    if data_dir and tf.io.gfile.isdir(data_dir):
      prepared = [folder.rstrip("/") for folder in tf.io.gfile.listdir(data_dir)]
    known = {*tfds.list_builders(), *prepared}
    reason = str(error).strip().split("\n")[0]
    raise ValueError(_unknown(name, data_dir, known, reason)) from None
  if not builder.is_prepared():
    _prepare(name, builder)
  return builder


def _unknown(name: str, data_dir: str, known: set[str], reason: str) -> str:
  base = name.split(":")[0].split("/")[0]
  if base in known:
    return f"data 'tfds:{name}' cannot be had from {data_dir or 'the default folder'}: {reason}"
  near = difflib.get_close_matches(base, sorted(known), n=3, cutoff=0.6)
  hint = f" Did you mean {' or '.join(near)}?" if near else ""
  return (
    f"data 'tfds:{name}': TFDS has no such data set, and none is prepared in "
    f"{data_dir or 'its default folder'} (data_dir, TFDS_DATA_DIR).{hint}"
  )


def _prepare(name: str, builder):
  """Downloads and prepares a data set; ValueError if that cannot be done here."""
  import jax  # Data can be read without it.

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
  if jax.process_count() > 1:
    raise ValueError(
      f"{where}, and {jax.process_count()} processes cannot all prepare it. {remedy}"
    )
  print(f"[data] tfds:{name} is not prepared: downloading it to {root}", flush=True)
  try:
    builder.download_and_prepare()
  except Exception as error:  # Whatever TFDS, the network or the disk raise.
    reason = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
    raise ValueError(f"{where} and could not be: {reason} {remedy}") from error


def split_info(builder, split: str, what: str):
  """Returns what TFDS knows of a split; ValueError if there is none or it holds no images."""
  splits = builder.info.splits
  sizes = ", ".join(f"{name} ({of.num_examples} images)" for name, of in splits.items())
  try:
    info = splits[split]
  except (ValueError, KeyError) as error:
    reason = str(error).split("\n")[0]
    raise ValueError(f"{what} has no split {split!r}; it has {sizes}. TFDS: {reason}") from None
  if not info.num_examples:
    raise ValueError(f"{what}: split {split!r} holds no images; there are {sizes}.")
  return info


def image_and_label(info, what: str) -> tuple[str, str | None]:
  """Returns the names of the features that hold the image and the class; None for no classes.

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
    self.files = files
    self._image, self._label = image, label
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
    """Returns a hash of the files' names, with name and version, and of what each contributes."""
    parts = [("/".join(PurePath(f.filename).parts[-4:]), f.skip, f.take) for f in self.files]
    return hashlib.sha256(repr((parts, self._image, self._label)).encode()).hexdigest()

  def describe(self, index):
    file = self.files[bisect.bisect_right(self._ends, index)]
    return f"record {index} of data {self.name!r} (in {os.fspath(file.filename)!r})"


class ArrayRecords(TfdsRecords):
  """Records of ArrayRecord files, which can be read at random."""

  @functools.cached_property
  def _source(self):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(self.files)

  def fetch(self, ids):
    records = np.empty(len(ids), object)
    records[:] = self._source.__getitems__([int(i) for i in ids])
    return {"record": records}


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
    """Returns which records of which files are low..high - 1, and each file's first index."""
    columns = {"name": [], "skip": [], "take": [], "index": []}
    for file, end in zip(self.files, self._ends, strict=True):
      start = int(end) - file.take
      first, last = max(low, start), min(high, int(end))
      if first < last:
        columns["name"].append(os.fspath(file.filename))
        columns["skip"].append(file.skip + first - start)
        columns["take"].append(last - first)
        columns["index"].append(first)
    return {key: np.array(values) for key, values in columns.items()}


def _read_file(file):
  """Returns tf.data of {record, index} of one file's part."""
  tf = tensorflow()
  records = tf.data.TFRecordDataset(file["name"], buffer_size=READ_AHEAD)
  records = records.skip(file["skip"]).take(file["take"])
  indices = tf.data.Dataset.range(file["index"], file["index"] + file["take"])
  return tf.data.Dataset.zip({"record": records, "index": indices})


def _draw(seed: int, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (order of `count` files, seed of the shuffle buffer), from NumPy's Philox stream."""
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count + 1)
  return np.argsort(bits[:count], kind="stable"), np.int64(bits[count] >> np.uint64(1))

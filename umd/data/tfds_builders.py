"""TFDS builders: data sets found, prepared where that is possible, or an error that says how."""

import difflib
import functools
import os

from umd.data.host import process_count, tensorflow


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

"""The folder of stored latents, as it is written: shard by shard, so that it can be gone on with.

  latents-SPLIT.array_record-00000-of-00016   the records, and so on
  dataset_info.json, features.json, ...       TFDS's, last: with them the splits are whole
  metadata.json                               how the latents were made, see `umd.data.latents`
  encoding/SPLIT.json                         the settings of a split and the command, first
  encoding/SPLIT-00000-of-00016.json          what is in a shard that is whole

A shard is written under another name and renamed, so that a killed process leaves nothing that
passes for a shard. Folders may be gs://bucket/folder.
"""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from umd.data.host import tensorflow
from umd.data.latents import METADATA, NAME, PROGRESS, VERSION, plans, progress_file
from umd.runs import workdir

OPTIONS = "group_size:1,zstd:1"  # A record at a time; 8 % smaller than as it is, at 250 MB/s.
NAMES = ("vae",)  # Settings of the encoding that tell what something was called: may differ.
PATIENCE = 60.0  # Seconds until what one process writes is seen by all.


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a split is to hold.

  Attributes:
    folder: where it is written.
    split: its name.
    settings: {encoding: {...} the same for all splits, data, fingerprint, num_images, shards}.
    command: that makes it.
    class_names: of the labels; their number is encoding's num_classes, 0: there are no labels.
  """

  folder: str
  split: str
  settings: dict
  command: str
  class_names: tuple[str, ...] = ()

  @property
  def shards(self) -> int:
    """Number of files."""
    return self.settings["shards"]

  def progress(self, shard: int | None = None) -> str:
    """The JSON file of the split's settings, or of what is in a shard."""
    return progress_file(self.folder, self.split, "" if shard is None else self._of(shard))

  def data(self, shard: int) -> str:
    """The file of a shard's records."""
    return workdir.join(self.folder, f"{NAME}-{self.split}.array_record-{self._of(shard)}")

  def _of(self, shard: int) -> str:
    return f"{shard:05d}-of-{self.shards:05d}"


def check_out(folder: str) -> None:
  """Raises ValueError unless files can be written there."""
  probe = workdir.join(folder, PROGRESS, ".writable")
  if not workdir.scheme(folder) and os.path.isfile(folder):
    raise ValueError(f"--out={folder!r} is a file. Give the name of a folder.")
  try:
    workdir.write_bytes(probe, b"")
    workdir.remove(probe)
  except (OSError, tensorflow().errors.OpError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"--out={folder!r} cannot be written: {reason}. Choose another.") from None


def begin(plan: Plan, is_main: bool = True) -> None:
  """Writes the split's settings down, or compares them with those that are there.

  Args:
    plan: of the split.
    is_main: whether this process writes; the others wait until it has.

  Raises:
    ValueError: the folder holds this or other splits with other settings; lists the differences.
      Or the main process writes elsewhere.
  """
  for split, found in plans(plan.folder).items():
    if split == plan.split:
      old, new = found["settings"], plan.settings
    else:
      old, new = ({"encoding": of["encoding"]} for of in (found["settings"], plan.settings))
    differ = workdir.differences(old, new)
    differ = {key: values for key, values in differ.items() if key.split(".")[-1] not in NAMES}
    if differ:
      lines = "\n".join(f"  {key}: there {a!r}, now {b!r}" for key, (a, b) in differ.items())
      raise ValueError(
        f"--out={plan.folder!r} holds split {split!r} with other settings:\n{lines}\n"
        f"Choose another folder, or give the old settings; the command was: {found['command']}"
      )
  if is_main and not workdir.exists(plan.progress()):
    about = {"settings": plan.settings, "command": plan.command}
    workdir.write_json(plan.progress(), about)
  until = time.monotonic() + PATIENCE
  while not workdir.exists(plan.progress()):
    if time.monotonic() > until:
      raise ValueError(
        f"--out={plan.folder!r}: what process 0 writes there is not seen by all processes. Choose "
        "a folder on a file system that all machines share, or gs://..."
      )
    time.sleep(0.5)


def done(plan: Plan) -> dict[int, dict]:
  """{shard: report} of the shards that are whole."""
  found = {shard: workdir.read_json(plan.progress(shard)) for shard in range(plan.shards)}
  whole = lambda shard, report: report and _size(plan.data(shard)) == report["bytes"]
  return {shard: report for shard, report in found.items() if whole(shard, report)}


def _size(path: str) -> int:
  """Bytes of a file, -1 if there is none."""
  gfile = tensorflow().io.gfile
  return gfile.stat(path).length if gfile.exists(path) else -1


def check_space(plan: Plan, record_bytes: int) -> None:
  """Raises ValueError if the shards that are missing will not fit on the disk (of gs: nothing)."""
  if workdir.scheme(plan.folder):
    return
  images = plan.settings["num_images"] - sum(report["count"] for report in done(plan).values())
  needed, free = images * record_bytes, shutil.disk_usage(plan.folder).free
  if needed > free:
    raise ValueError(
      f"--out={plan.folder!r}: {images} images need {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB "
      "are free. Choose another disk, fewer --views, or --dtype float16."
    )


def features(plan: Plan):
  """TFDS's features of a record: moments [V, h, w, 2c], index, and label if there are labels."""
  tensorflow()  # Before TFDS imports it.
  import tensorflow_datasets as tfds

  encoding, classes = plan.settings["encoding"], {}
  if number := encoding["num_classes"]:
    names = list(plan.class_names)
    label = tfds.features.ClassLabel(**({"names": names} if names else {"num_classes": number}))
    classes = {"label": label}
  moments = dict(shape=tuple(encoding["shape"]), dtype=np.dtype(encoding["dtype"]).type)
  return tfds.features.FeaturesDict(
    {
      "moments": tfds.features.Tensor(**moments, encoding="bytes"),  # tf.Example has no float16.
      "index": tfds.features.Scalar(np.int64),
      **classes,
    }
  )


def serialize(features, example: Mapping) -> bytes:
  """A record; the same bytes for the same example, whichever process asks (TFDS's are not)."""
  message = tensorflow().train.Example.FromString(features.serialize_example(example))
  return message.SerializeToString(deterministic=True)


def write_shard(plan: Plan, shard: int, records: Sequence[bytes], report: dict) -> None:
  """Writes a shard and then its report, {count, bytes, and what `finish` is given}."""
  from array_record.python import array_record_module

  remote = workdir.scheme(plan.folder)
  local = tempfile.mkdtemp() if remote else os.path.join(plan.folder, PROGRESS)
  temporary = os.path.join(local, os.path.basename(plan.data(shard)) + ".tmp")
  try:
    writer = array_record_module.ArrayRecordWriter(temporary, OPTIONS)
    for record in records:
      writer.write(record)
    writer.close()
    size = os.path.getsize(temporary)
    if remote:
      tensorflow().io.gfile.copy(temporary, plan.data(shard), overwrite=True)
    else:
      os.replace(temporary, plan.data(shard))
  finally:
    if remote:
      shutil.rmtree(local, ignore_errors=True)
  report = {**report, "count": len(records), "bytes": size}
  workdir.write_json(plan.progress(shard), report)


def wait(plan: Plan, is_main: bool, tell: Callable[[str], None], pause: float = 5.0) -> None:
  """Returns when all shards are there or, of processes that do not write it, the metadata.

  Nothing else keeps the processes together: each writes its shards at its own pace.
  """
  told = None
  while True:
    if not is_main:
      known = workdir.read_json(workdir.join(plan.folder, METADATA)) or {"splits": {}}
      if plan.split in known["splits"]:
        return
    elif not (missing := plan.shards - len(done(plan))):
      return
    elif missing != told:
      told = missing
      tell(f"waiting for {missing} of {plan.shards} shards, which other processes write")
    time.sleep(pause)


def finish(plan: Plan, summarize: Callable[[Sequence[dict], dict], dict]) -> dict:
  """Writes TFDS's files and the metadata, with all splits that are whole.

  Args:
    plan: of a split whose shards are all there; the other splits are found in the folder.
    summarize: (reports of a split's shards, encoding) -> what the metadata says of the split.

  Returns what the metadata says of this split.
  """
  import tensorflow_datasets as tfds

  splits, infos = {}, []
  for split, found in plans(plan.folder).items():
    of = dataclasses.replace(plan, split=split, **found)
    reports = list(done(of).values())
    if len(reports) < of.shards:
      continue
    lengths, size = [r["count"] for r in reports], sum(r["bytes"] for r in reports)
    about = {key: of.settings[key] for key in ("data", "fingerprint", "num_images")}
    about |= {"count": sum(lengths), "bytes": size, "command": of.command}
    splits[split] = about | summarize(reports, of.settings["encoding"])
    template = tfds.core.ShardedFileTemplate(
      data_dir=plan.folder, dataset_name=NAME, split=split, filetype_suffix="array_record"
    )
    infos.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
      )
    )
  about = {"latents": VERSION, "encoding": plan.settings["encoding"], "splits": splits}
  _publish(plan, infos, about)
  return splits[plan.split]


def _publish(plan: Plan, infos: list, about: dict) -> None:
  """Lets TFDS write its files elsewhere, and brings each into the folder in one piece."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.dataset_info import DatasetIdentity

  identity = DatasetIdentity(
    name=NAME, version=tfds.core.Version("1.0.0"), data_dir=plan.folder, module_name=""
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description="Moments of latents, made by tools/encode_latents: see metadata.json.",
    features=features(plan),
    metadata=tfds.core.MetadataDict(about),
  )
  info.set_file_format("array_record")
  info.set_splits(tfds.core.SplitDict(infos))
  with tempfile.TemporaryDirectory() as folder:
    info.write_to_directory(folder)
    workdir.write_json(os.path.join(folder, METADATA), about)  # Indented, for people.
    last = "dataset_info.json"  # Whoever sees it must find the others.
    for name in [*sorted(set(os.listdir(folder)) - {last}), last]:
      contents = workdir.read_bytes(os.path.join(folder, name))
      workdir.write_bytes(workdir.join(plan.folder, name), contents)

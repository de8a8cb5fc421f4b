"""The folder of stored latents, as it is written.

latents-SPLIT.array_record-00000-of-00016   the records, and so on
dataset_info.json, features.json, ...       TFDS's files, last: with them the splits are whole
metadata.json                               how the latents were made, see `umd.data.latents`
progress/                                   what is there already, see `umd.runs.sharded`
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from umd.data.host import tensorflow
from umd.data.latents import METADATA, NAME, VERSION
from umd.runs import sharded, workdir

OPTIONS = "group_size:1,zstd:1"  # A record at a time; 8 % smaller than as it is, at 250 MB/s.


@dataclasses.dataclass(frozen=True)
class LatentPlan(sharded.Plan):
  """What a split is to hold.

  `name` is the split's, and `settings` are {encoding: {...} the same for all splits, data,
  fingerprint, num_images, shards}.

  Attributes:
    class_names: names of the labels; their number is encoding's num_classes, 0 if there are none.
  """

  class_names: tuple[str, ...] = ()

  def file(self, shard: int) -> str:
    file = f"{NAME}-{self.name}.array_record-{shard:05d}-of-{self.shards:05d}"
    return workdir.join(self.folder, file)


def begin(plan: LatentPlan, is_main: bool = True) -> None:
  """Writes the split's settings down, or compares them; see `umd.runs.sharded.begin`."""
  # The same VAE may be called by another name or path: its hash is compared.
  sharded.begin(plan, is_main, shared="encoding", harmless=("vae",))


def features(plan: LatentPlan):
  """Returns TFDS's features: moments [V, h, w, 2c], index, and label if there are labels."""
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
  """Returns a record: equal bytes for equal examples, whichever process asks (TFDS's are not)."""
  message = tensorflow().train.Example.FromString(features.serialize_example(example))
  return message.SerializeToString(deterministic=True)


def write_shard(plan: LatentPlan, shard: int, records: Sequence[bytes], report: dict) -> None:
  """Writes a shard and then its report: what `finish` is given, with `count` and `bytes`."""
  from array_record.python import array_record_module

  def write(path):
    writer = array_record_module.ArrayRecordWriter(path, OPTIONS)
    for record in records:
      writer.write(record)
    writer.close()

  sharded.write_shard(plan, shard, write, count=len(records), **report)


def finish(plan: LatentPlan, summarize: Callable[[Sequence[dict], dict], dict]) -> dict:
  """Writes TFDS's files and the metadata, with all splits that are whole.

  Args:
    plan: of a split whose shards are all there; the other splits are read from the folder.
    summarize: (reports of a split's shards, encoding) -> what the metadata say of the split.

  Returns:
    What the metadata say of this split.
  """
  import tensorflow_datasets as tfds

  splits, infos = {}, []
  for split, work in sharded.begun(plan.folder).items():
    settings, command = work["settings"], work["command"]
    other = dataclasses.replace(plan, name=split, settings=settings, command=command)
    reports = list(sharded.done(other).values())
    if len(reports) < other.shards:
      continue
    lengths, size = [r["count"] for r in reports], sum(r["bytes"] for r in reports)
    splits[split] = {
      **{key: settings[key] for key in ("data", "fingerprint", "num_images")},
      **{"count": sum(lengths), "bytes": size, "command": command},
      **summarize(reports, settings["encoding"]),
    }
    template = tfds.core.ShardedFileTemplate(
      data_dir=plan.folder, dataset_name=NAME, split=split, filetype_suffix="array_record"
    )
    infos.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
      )
    )
  metadata = {"latents": VERSION, "encoding": plan.settings["encoding"], "splits": splits}
  _publish(plan, infos, metadata)
  return splits[plan.name]


def _publish(plan: LatentPlan, infos: list, metadata: dict) -> None:
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
    metadata=tfds.core.MetadataDict(metadata),
  )
  info.set_file_format("array_record")
  info.set_splits(tfds.core.SplitDict(infos))
  with tempfile.TemporaryDirectory() as folder:
    info.write_to_directory(folder)
    workdir.write_json(os.path.join(folder, METADATA), metadata)  # Indented, for people.
    last = "dataset_info.json"  # Whoever sees it must find the others.
    for name in [*sorted(set(os.listdir(folder)) - {last}), last]:
      contents = workdir.read_bytes(os.path.join(folder, name))
      workdir.write_bytes(workdir.join(plan.folder, name), contents)

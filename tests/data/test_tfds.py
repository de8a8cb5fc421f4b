"""TFDS data sets: TFRecord as a stream, cached and ArrayRecord at random, and the errors."""

import itertools
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from umd.data import eval_batches, load, pipeline, train_batches
from umd.data import tfds as module
from umd.data import tfds as tfds_builders
from umd.data.host import tensorflow
from umd.objectives import Stream, period, stream_rows

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tensorflow_datasets"
N, T, SHARDS = 37, 6, 5
PP = "decode|value_range(0, 255)"
RANDOM = "decode|random_crop(3, padding=1)|flip_lr|value_range(-1, 1)"


def prepare(folder, kind):
  """A data set of N images (T in split "test"), each as bright as its label, which is never 0."""
  tf = tensorflow()
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(3, 4, 3), encoding_format="png"),
      "label": tfds.features.ClassLabel(names=[f"number {i}" for i in range(N + 1)]),
      "more": tfds.features.Text(),
    }
  )
  numbers = tf.data.Dataset.range(1, N + 1)
  image = lambda i: tf.fill([3, 4, 3], tf.cast(i, tf.uint8))
  examples = numbers.map(lambda i: {"image": image(i), "label": i, "more": "x"})
  splits = {"train": examples, "test": examples.take(T)}
  builder = tfds.dataset_builders.TfDataBuilder(
    name="numbered",
    version="1.2.3",
    features=features,
    split_datasets=splits,
    data_dir=folder,
    file_format=kind,
  )
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=SHARDS))
  return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """{kind: data_dir} with the same data set as TFRecord and as ArrayRecord files."""
  kinds = ("tfrecord", "array_record")
  return {kind: prepare(str(tmp_path_factory.mktemp(kind)), kind) for kind in kinds}


@pytest.fixture(scope="module", params=["stream", "cache", "array_record"])
def kind(request, folders):
  """`kind(split, pp)` loads the data set in one of the three ways it can be read."""
  folder = folders["array_record" if request.param == "array_record" else "tfrecord"]
  cache = request.param == "cache"

  def open_(split="train", pp=PP, **settings):
    return load("tfds:numbered", split, pp, data_dir=folder, cache=cache, **settings)

  open_.stream = request.param == "stream"
  return open_


def take(source, size, count, **settings):
  stream = train_batches(source, size, **{"seed": 0, **settings})
  return list(itertools.islice(stream, count))


def order(source, size, count, **settings):
  return np.concatenate([b["label"] for b in take(source, size, count, **settings)])


def shares(source, processes):
  """How many records each process reads of a stream."""
  ends = [len(source) * i // processes for i in range(processes + 1)]
  return np.diff(ends)


def test_a_split_knows_its_size_and_classes(kind):
  source = kind()
  assert len(source) == N
  assert source.image_size == (3, 4, 3)
  assert source.num_classes == N + 1
  assert source.class_names[2] == "number 2"
  assert len(kind("train[:10]")) == 10
  assert len(kind("train[50%:]+test")) == N - round(N / 2) + T


def test_slices_are_parts_of_the_whole(kind):
  parts = [kind(split).arrays()[1] for split in ("train[:10]", "train[10:25]", "train[25:]")]
  np.testing.assert_array_equal(np.concatenate(parts), kind().arrays()[1])


def test_images_and_labels_stay_together(kind):
  for batch in [*take(kind(), 8, 6), *eval_batches(kind("test"), 3)]:
    np.testing.assert_allclose(batch["image"].mean((1, 2, 3)), batch["label"], rtol=1e-6)
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("size", [8, 50])
def test_every_epoch_of_one_process_is_a_permutation(kind, size):
  numbers = order(kind(), size, -(-3 * N // size))[: 3 * N].reshape(3, N)
  np.testing.assert_array_equal(np.sort(numbers), np.tile(np.arange(1, N + 1), (3, 1)))
  assert len(np.unique(numbers, axis=0)) == 3


def test_orders_differ_between_seeds_and_are_mixed(kind):
  orders = np.stack([order(kind(), N, 1, seed=seed) for seed in range(4)])
  assert len(np.unique(orders, axis=0)) == 4
  # Examples that follow one another in the files do so seldom in an epoch.
  place = {number: i for i, number in enumerate(kind().arrays()[1])}
  steps = np.diff([[place[number] for number in row] for row in orders])
  assert (steps == 1).mean() < 0.2


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_of_a_stream_reads_its_own_part_once_an_epoch(folders, processes):
  source = load("tfds:numbered", "train", PP, data_dir=folders["tfrecord"])
  parts, size = [], 6 // processes
  for i, n in enumerate(shares(source, processes)):
    place = dict(process_index=i, process_count=processes)
    numbers = order(source, 6, -(-3 * n // size), **place)[: 3 * n].reshape(3, n)
    assert len({tuple(row) for row in np.sort(numbers)}) == 1
    assert len({tuple(row) for row in numbers}) == 3
    parts.append(numbers[0])
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1, N + 1))


@pytest.mark.parametrize("processes", [4])
def test_what_can_be_read_at_random_has_one_order_for_all_processes(kind, processes):
  if kind.stream:
    return  # Has parts instead: see above.
  source, place = kind(pp=RANDOM), dict(process_count=processes)
  whole = take(source, 8, 6)
  parts = [take(source, 8, 6, process_index=i, **place) for i in range(processes)]
  for batch, *of_processes in zip(whole, *parts, strict=True):
    for key in batch:
      np.testing.assert_array_equal(np.concatenate([b[key] for b in of_processes]), batch[key])


@pytest.mark.parametrize("processes", [1, 2])
def test_each_example_is_clean_as_often_as_it_is_noised(kind, processes):
  """Rows of a batch are dealt to streams by their place, and examples to rows by chance."""
  streams = [Stream(name, {}, rows) for name, rows in [("clean", (0, 0.5)), ("noised", (0.5, 1))]]
  size, steps = period(streams, 8), 400
  clean = slice(*stream_rows(streams[0], size))
  place = dict(process_count=processes)
  parts = [take(kind(), 8, steps, process_index=i, **place) for i in range(processes)]
  count = np.zeros((2, N + 1))
  for batches in zip(*parts, strict=True):
    rows = np.concatenate([b["label"] for b in batches]).reshape(-1, size)
    np.add.at(count[0], rows, 1)
    np.add.at(count[1], rows[:, clean], 1)
  share = count[1, 1:] / count[0, 1:]  # Of some 86 epochs: half, give or take .054.
  assert np.abs(share - 0.5).max() < 0.27


@pytest.mark.parametrize("start, processes", [(1, 1), (5, 1), (23, 2), (4, 4)])
def test_resuming_gives_the_batches_of_a_run_that_went_on(kind, start, processes):
  place = dict(process_index=processes - 1, process_count=processes)
  source = kind(pp=RANDOM, shuffle_buffer=10)
  whole = take(source, 8, start + 3, **place)
  resumed = take(source, 8, 3, start_step=start, **place)
  for expected, batch in zip(whole[start:], resumed, strict=True):
    for key in expected:
      np.testing.assert_array_equal(batch[key], expected[key])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_reads_every_example_once(kind, processes):
  source = kind()
  labels = source.arrays()[1]
  found = []
  for i in range(processes):
    found.append(list(eval_batches(source, 12, process_index=i, process_count=processes)))
  assert len({len(batches) for batches in found}) == 1
  flat = [batch for batches in found for batch in batches]
  joined = {key: np.concatenate([batch[key] for batch in flat]) for key in flat[0]}
  real = joined["_mask"] > 0
  np.testing.assert_array_equal(np.sort(joined["index"][real]), np.arange(N))
  np.testing.assert_array_equal(labels[joined["index"][real]], joined["label"][real])
  assert not joined["image"][~real].any()


def test_more_processes_than_examples_is_fine_for_evaluation_only(kind):
  source = kind("train[:3]")
  found = [list(eval_batches(source, 5, process_index=i, process_count=5)) for i in range(5)]
  assert [len(batches) for batches in found] == [1] * 5
  assert sum(batch["_mask"].sum() for batches in found for batch in batches) == 3
  if kind.stream:
    with pytest.raises(ValueError, match="3 records for 5 processes"):
      train_batches(source, 5, seed=0, process_index=0, process_count=5)


def test_examples_of_all_processes_have_places_of_their_own_in_the_stream(folders):
  """What is drawn for an example depends on it."""
  source = load("tfds:numbered", "train", PP, data_dir=folders["tfrecord"])
  found = []
  for i in range(3):
    rows = pipeline._streamed(source, 12, 0, 2, pipeline.Share(i, 3)).take(8)
    found.append([int(row["position"]) for row in rows])
  steps = np.array(found).reshape(3, 2, 4).transpose(1, 0, 2)
  np.testing.assert_array_equal(steps.ravel(), np.arange(24, 48))


def test_cached_records_keep_their_places_though_files_are_read_side_by_side(folders, monkeypatch):
  settings = dict(data_dir=folders["tfrecord"])
  expected = load("tfds:numbered", "train", PP, **settings).arrays()[1]
  monkeypatch.setattr(module, "BLOCK", 2)
  cached = load("tfds:numbered", "train[:36]", PP, cache=True, **settings)
  came = [int(row["index"]) for row in cached.records._records.stream(0, 36)]
  assert came != sorted(came)
  np.testing.assert_array_equal(cached.labels, expected[:36])
  images, labels = cached.arrays()
  np.testing.assert_array_equal(labels, expected[:36])
  np.testing.assert_allclose(images.mean((1, 2, 3)), labels, rtol=1e-6)


def test_after_an_unreadable_record_all_others_are_still_read_once(folders, monkeypatch):
  monkeypatch.setattr(module, "BLOCK", 2)
  settings = dict(data_dir=folders["tfrecord"], max_bad=1)
  source, tf = load("tfds:numbered", "train[:36]", PP, **settings), tensorflow()
  honest = source.records.parse

  def parse(row):
    example = honest(row)
    image = tf.where(tf.equal(row["index"], 9), b"rotten", example["image"])
    return {**example, "image": image}

  monkeypatch.setattr(source.records, "parse", parse)
  batches = list(eval_batches(source, 4))
  read = np.concatenate([b["index"][b["_mask"] > 0] for b in batches])
  assert sorted(read) == [i for i in range(36) if i != 9]
  source.bad.clear()


def test_labels_are_known_where_they_need_no_reading(folders, capsys):
  load_ = lambda **settings: load("tfds:numbered", "test[:5]", PP, **settings)
  assert load_(data_dir=folders["tfrecord"]).labels is None
  cached = load_(data_dir=folders["tfrecord"], cache=True)
  assert capsys.readouterr().out == ""  # Nothing is read before it is needed.
  np.testing.assert_array_equal(cached.labels, cached.arrays()[1])
  np.testing.assert_array_equal(cached.labels, load_(data_dir=folders["tfrecord"]).arrays()[1])
  assert "tfds:numbered:test[:5]: 5 records" in capsys.readouterr().out


def test_sources_that_differ_in_ops_share_the_cache(folders, capsys):
  settings = dict(data_dir=folders["tfrecord"], cache=True)
  for pp in ("decode|value_range(0, 1)", "decode|value_range(0, 2)"):
    assert len(load("tfds:numbered", "train[:7]", pp, **settings).arrays()[0]) == 7
  assert capsys.readouterr().out.count("read into memory") == 1


@pytest.mark.parametrize("low, high", [(0, N), (0, 1), (5, 30), (36, 37), (7, 15), (14, 15)])
def test_a_part_is_cut_out_of_the_files(folders, low, high):
  source = load("tfds:numbered", "train", PP, data_dir=folders["tfrecord"])
  expected = source.arrays()[1]
  rows = source.records.stream(low, high).as_numpy_iterator()
  found = {int(row["index"]): int(source.records.parse(row)["label"]) for row in rows}
  assert found == {i: expected[i] for i in range(low, high)}


def test_a_prepared_data_set_is_found_by_version_and_by_folder(folders):
  folder = folders["tfrecord"]
  assert len(load("tfds:numbered:1.2.3", "train", PP, data_dir=folder)) == N
  assert len(load("tfds:numbered", "train", PP, data_dir=f"{folder}/numbered/1.2.3")) == N


def test_the_environment_names_the_default_folder(folders, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", folders["array_record"])
  assert len(load("tfds:numbered", "test", PP)) == T


@pytest.mark.parametrize(
  "name, split, needed",
  [
    ("numberd", "train", ["tfds:numberd", "Did you mean numbered", "TFDS_DATA_DIR"]),
    ("imagnet2012", "train", ["tfds:imagnet2012", "imagenet2012"]),
    ("numbered:7.0.0", "train", ["tfds:numbered:7.0.0"]),
    ("mnist:7.0.0", "train", ["tfds:mnist:7.0.0", "only: 3.0.1"]),
    ("numbered", "trian", ["'trian'", "train (37 images)", "test (6 images)"]),
    ("numbered", "train[:x]", ["'train[:x]'", "train (37 images)"]),
    ("numbered", "train[40:]", ["'train[40:]'", "train (37 images)"]),
    ("numbered", "train[:0]", ["'train[:0]'", "no images"]),
  ],
)
def test_what_is_not_there_is_an_error_that_lists_what_is(folders, name, split, needed):
  with pytest.raises(ValueError) as error:
    load(f"tfds:{name}", split, PP, data_dir=folders["tfrecord"])
  for word in needed:
    assert word in str(error.value)


def test_a_data_set_to_be_downloaded_by_hand_is_an_error_that_says_how(tmp_path):
  with pytest.raises(ValueError) as error:
    load("tfds:imagenet2012", "train", PP, data_dir=str(tmp_path))
  for word in [
    "tfds:imagenet2012",
    str(tmp_path),
    "TFDS_DATA_DIR",
    "download_and_prepare()",
    f"{tmp_path}/downloads/manual",
    "ILSVRC2012_img_train.tar",
  ]:
    assert word in str(error.value)


class Unprepared:
  """A builder of which nothing is on disk."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = None
  _data_dir_root = "/data"

  def __init__(self, error=None):
    self.error, self.calls = error, 0

  def download_and_prepare(self):
    self.calls += 1
    if self.error:
      raise self.error


def test_what_can_be_downloaded_is_and_says_so(capsys):
  builder = Unprepared()
  tfds_builders._prepare("mnist", builder)
  assert builder.calls == 1
  assert "tfds:mnist is not prepared: downloading it to /data" in capsys.readouterr().out


def test_a_failed_download_is_one_error_with_the_remedy():
  with pytest.raises(ValueError) as error:
    tfds_builders._prepare("mnist", Unprepared(OSError("no route to host\nmore")))
  for word in ["tfds:mnist", "'/data'", "OSError: no route to host", "TFDS_DATA_DIR"]:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


def test_several_processes_do_not_download(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  builder = Unprepared()
  with pytest.raises(ValueError, match="4 processes cannot all prepare it"):
    tfds_builders._prepare("mnist", builder)
  assert not builder.calls


def info(features, supervised=None):
  return types.SimpleNamespace(features=features, supervised_keys=supervised)


def test_images_and_labels_of_other_names_are_found():
  import tensorflow_datasets as tfds

  image, label, text = tfds.features.Image(), tfds.features.ClassLabel(num_classes=2), "text"
  text = tfds.features.Text()
  find = lambda *args: module.image_and_label(info(*args), "data 'x'")
  assert find({"image": image, "label": label, "id": text}) == ("image", "label")
  assert find({"photo": image, "kind": label}, ("photo", "kind")) == ("photo", "kind")
  assert find({"image": image, "kind": label}, ("image", "kind")) == ("image", "kind")
  assert find({"image": image, "label": text}, ("image", "label")) == ("image", None)
  assert find({"image": image}) == ("image", None)
  with pytest.raises(ValueError, match="data 'x' has no image feature; it has id"):
    find({"id": text})
  with pytest.raises(ValueError, match="float32"):
    find({"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)})


def test_records_may_hold_arrays_such_as_latents(tmp_path):
  tf = tensorflow()
  import tensorflow_datasets as tfds

  latents = np.random.default_rng(0).normal(size=(6, 2, 2, 4)).astype(np.float32)
  features = tfds.features.FeaturesDict(
    {"image": tfds.features.Tensor(shape=(2, 2, 4), dtype=np.float32)}
  )
  builder = tfds.dataset_builders.TfDataBuilder(
    name="latents",
    version="1.0.0",
    features=features,
    split_datasets={"train": tf.data.Dataset.from_tensor_slices({"image": latents})},
    data_dir=str(tmp_path),
  )
  builder.download_and_prepare()
  for cache in (False, True):
    source = load("tfds:latents", "train", data_dir=str(tmp_path), cache=cache)
    assert (source.image_size, source.num_classes) == ((2, 2, 4), 0)
    found = {x.tobytes() for x in take(source, 6, 1)[0]["image"]}
    assert found == {x.tobytes() for x in latents}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_reads_its_part_of_tiny_imagenet_once(processes):
  if not (SHARED / "tiny_imagenet").is_dir():
    pytest.skip(f"{SHARED} is not here")
  source = load("tfds:tiny_imagenet", "train", PP, data_dir=str(SHARED))
  n, seen = len(source), []
  for i in range(processes):
    low, high = n * i // processes, n * (i + 1) // processes
    epoch = source.records.stream(low, high, seed=0, epoch=np.int64(3))
    indices = epoch.map(lambda row: row["index"]).batch(1000)
    seen.append(np.concatenate(list(indices.as_numpy_iterator())))
    assert (np.diff(seen[-1]) < 0).mean() > 0.4
  np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(n))

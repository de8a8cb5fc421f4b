"""Folders of images: classes, splits, names and files that trip readers."""

import itertools
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from umd.data import eval_batches, load, train_batches
from umd.data.host import tensorflow

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "folders"
PP = "decode|resize(4)|value_range(-1, 1)"


def write(root, files):
  """Image files that are not black; every name is one relative to root."""
  png = tensorflow().io.encode_png(np.full((5, 6, 3), 200, np.uint8)).numpy()
  for name in files:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)


def names(source):
  """The files in the order of the source."""
  return [eval(source.records.describe(i).removeprefix("file ")) for i in range(len(source))]


def read(source):
  return {Path(name).name: label for name, label in zip(names(source), source.labels, strict=True)}


def shared(name):
  if not (SHARED / name).is_dir():
    pytest.skip(f"{SHARED / name} is not here")
  return SHARED / name


def test_classes_are_the_folders_by_name_however_deep_the_files_lie(tmp_path):
  write(tmp_path, ["b/2.PNG", "a/1.png", "a/deep/er/3.png", "c d/é 画 (1).Png"])
  (tmp_path / "a" / "notes.txt").write_text("no image")
  (tmp_path / ".hidden").mkdir()
  (tmp_path / "a" / "._4.png").write_text("what some systems leave behind")
  source = load(f"folder:{tmp_path}", "all", PP)
  assert source.class_names == ("a", "b", "c d")
  assert read(source) == {"1.png": 0, "3.png": 0, "2.PNG": 1, "é 画 (1).Png": 2}
  images, labels = source.arrays()
  np.testing.assert_allclose(images, 200 / 127.5 - 1, atol=1e-5)
  np.testing.assert_array_equal(labels, source.labels)


def test_files_without_folders_have_no_labels(tmp_path):
  write(tmp_path, ["1.png", "2.jpeg", "3.jpg", "4.bmp", "5.gif", "6.webp"])
  source = load(f"folder:{tmp_path}", "all", PP)
  assert (source.num_classes, source.class_names, len(source)) == (0, (), 6)
  assert not source.labels.any()


def test_split_folders_share_their_classes(tmp_path):
  write(tmp_path, ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png", "test/5.png"])
  train, val, test = (load(f"folder:{tmp_path}", s, PP) for s in ("train", "val", "test"))
  assert train.class_names == val.class_names == ("a", "b", "c")
  assert read(val) == {"4.png": 2}
  assert read(load(f"folder:{tmp_path}", "train+val", PP)) == {
    **read(train),
    **read(val),
  }
  assert test.num_classes == 0
  with pytest.raises(ValueError, match="no folders of classes in 'test'"):
    load(f"folder:{tmp_path}", "train+test", PP)
  with pytest.raises(ValueError, match="has no split 'all'; it has test, train, val"):
    load(f"folder:{tmp_path}", "all", PP)


def test_splits_of_other_names_share_the_classes_of_folders_like_them(tmp_path):
  write(tmp_path, ["mine/a/1.png", "mine/b/2.png", "yours/b/3.png", "notes/x/4.png"])
  assert load(f"folder:{tmp_path}", "yours", PP).class_names == ("a", "b")
  assert load(f"folder:{tmp_path}", "notes", PP).class_names == ("x",)


def test_slices_are_disjoint_and_mix_the_classes(tmp_path):
  write(tmp_path, [f"{c}/{i}_{c}.png" for c in "abcd" for i in range(100)])
  parts = [load(f"folder:{tmp_path}", s, PP) for s in ("all[:80%]", "all[80%:]")]
  first, second = (set(names(part)) for part in parts)
  assert len(first) == 320
  assert len(second) == 80
  assert len(first | second) == 400
  # 20 of each class are expected in the second; their number varies by 3.5.
  assert np.bincount(parts[1].labels, minlength=4).min() >= 6
  assert names(parts[0]) == names(load(f"folder:{tmp_path}", "all", PP))[:320]


def test_the_order_does_not_depend_on_where_the_folder_is(tmp_path):
  files = [f"{c}/{i}_{c}.png" for c in "ab" for i in range(20)]
  write(tmp_path / "one", files)
  write(tmp_path / "two", reversed(files))
  found = [
    [Path(f).name for f in names(load(f"folder:{tmp_path / p}", "all", PP))] for p in ("one", "two")
  ]
  assert found[0] == found[1] != sorted(found[0])


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
  write(tmp_path / "elsewhere", ["1.png"])
  (tmp_path / "root").mkdir()
  (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
  assert read(load(f"folder:{tmp_path / 'root'}", "all", PP)) == {"1.png": 0}


@pytest.mark.parametrize(
  "files, empty, split, needed",
  [
    ([], [], "all", ["no images", ".jpg"]),
    (["a/1.png"], ["b"], "all", ["no images of class 'b'"]),
    (["a/1.png", "2.png"], [], "all", ["'2.png'", "'a'", "both images"]),
    (["a/1.png"], [], "train", ["no split 'train'", "all"]),
    (["train/a/1.png"], [], "val", ["no split 'val'", "train"]),
    (["a/1.png"], [], "all[5:]", ["all[5:]", "all has 1"]),
    (["a/1.png"], [], "all[", ["'all['", "NAME[:90%]"]),
  ],
)
def test_what_is_wrong_with_a_folder_is_said(files, empty, split, needed, tmp_path):
  write(tmp_path, files)
  for name in empty:
    (tmp_path / name).mkdir()
  with pytest.raises(ValueError) as error:
    load(f"folder:{tmp_path}", split, PP)
  for word in [str(tmp_path), *needed]:
    assert word in str(error.value)


def test_a_missing_folder_is_an_error_that_names_it():
  with pytest.raises(FileNotFoundError, match=r"folder:/nowhere.*no such folder"):
    load("folder:/nowhere", "all", PP)


@pytest.mark.parametrize("cache", [False, True])
def test_an_unreadable_file_is_an_error_that_names_it(cache, tmp_path):
  write(tmp_path, [f"{i}.png" for i in range(5)])
  (tmp_path / "rotten.png").write_bytes(b"no image at all")
  source = load(f"folder:{tmp_path}", "all", PP, cache=cache)
  for batches in (eval_batches(source, 2), train_batches(source, 4, seed=0)):
    with pytest.raises(ValueError, match=r"rotten\.png' is not readable: Unknown image file"):
      list(itertools.islice(batches, 5))


def test_readable_images_of_unusual_kinds_are_read():
  """What each of them should look like: the file README.txt beside them."""
  root = shared("broken")
  source = load(f"folder:{root}", "all", "decode|value_range(0, 255)|resize(96)")
  found, unreadable = {}, set()
  for i, name in enumerate(names(source)):
    row = {key: value[0] for key, value in source.records.fetch(np.array([i])).items()}
    try:
      example = source.preprocess(source.records.parse(row), 0, i)
      found[unicodedata.normalize("NFC", Path(name).name)] = example["image"].numpy()
    except tensorflow().errors.OpError:
      unreadable.add(Path(name).name)
  assert unreadable == {"truncated.jpg", "empty.jpg", "text_renamed.jpg"}
  assert len(found) == 7
  ramp = found["gray_16bit.png"][..., 0]
  np.testing.assert_allclose(ramp[50], np.linspace(0, 255, 96), atol=2)
  np.testing.assert_allclose(found["one_pixel.png"][40, 40], [200, 30, 120], atol=1e-3)
  gray = found["grayscale.png"]
  np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
  # The same picture twice, once as inverted CMYK.
  plain = next(image for name, image in found.items() if name.startswith("café"))
  assert np.abs(found["cmyk.jpg"] - plain).mean() < 12


def test_ten_classes_of_twenty_jpegs():
  source = load(f"folder:{shared('cifar10_mini')}", "all", "decode|resize(32)|value_range(-1, 1)")
  assert len(source.class_names) == 10
  np.testing.assert_array_equal(np.bincount(source.labels), 20)
  batch = next(train_batches(source, 50, seed=0))
  assert len(np.unique(batch["label"])) > 5
  assert -1 <= batch["image"].min() < batch["image"].max() <= 1.0001

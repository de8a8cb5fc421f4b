"""Data as it comes: odd images, unreadable ones, labels that are none, and sets of one image."""

import io
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest

from umd.data import Source, eval_batches, from_arrays, load, train_batches
from umd.data.host import tensorflow
from umd.data.records import rows

BROKEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "folders" / "broken"
PLAIN = "decode|expect_size(6, 7)|value_range(0, 255)"
RANDOM = "decode|random_crop((4, 5))|flip_lr|value_range(0, 255)"
N = 12
ROTTEN = {2: b"", 5: b"no image", 9: None}  # None: half of a JPEG.


def image(number, height=6, width=7):
  """uint8 [height, width, 3]: random pixels, whose first says which image it is."""
  pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
  pixels[:, :, 0] = number
  return pixels


def png(pixels):
  return tensorflow().io.encode_png(pixels).numpy()


def half_a_jpeg():
  whole = tensorflow().io.encode_jpeg(image(0, 60, 60)).numpy()
  return whole[: len(whole) // 2]


def folder(path, n=N, bad=ROTTEN, classes=3):
  """n images in folders of classes; the file of those in `bad` holds what is there."""
  for i in range(n):
    file = path / f"class {i % classes}" / f"{i}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
      (bad[i] if bad[i] is not None else half_a_jpeg()) if i in bad else png(image(i))
    )
  return f"folder:{path}"


def number_of(source, index):
  """Which of `image`'s numbers the example at a place of the source has."""
  return int(re.search(r"(\d+)\.png", source.records.describe(index))[1])


def take(source, count, size=8, **settings):
  return list(itertools.islice(train_batches(source, size, **{"seed": 3, **settings}), count))


def numbers(batches):
  return np.concatenate([b["image"][:, 0, 0, 0] for b in batches]).astype(int)


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


# What a viewer shows.


def saved(picture, kind, **settings):
  file = io.BytesIO()
  picture.save(file, kind, **settings)
  return file.getvalue()


def over_white(rgba):
  """The pixels of a picture with transparency on a white page, by arithmetic."""
  pixels = np.asarray(rgba.convert("RGBA"), float)
  alpha = pixels[..., 3:] / 255
  return pixels[..., :3] * alpha + 255 * (1 - alpha)


def odd_images():
  """{name: (bytes, pixels [H, W, 3] that a viewer shows)}."""
  pil = pytest.importorskip("PIL.Image")
  y, x = np.mgrid[:24, :32]
  ramp = np.stack([255 * y / 24, 255 * x / 32, 127 + 90 * np.sin(x / 9)], -1).astype(np.uint8)
  rgb = pil.fromarray(ramp)
  alpha = np.where((x - 16) ** 2 + (y - 12) ** 2 < 60, 255, 0).astype(np.uint8)
  alpha[:4] = 100
  rgba, gray = pil.fromarray(np.dstack([ramp, alpha])), rgb.convert("L")
  la = pil.merge("LA", [gray, pil.fromarray(alpha)])
  palette, bits = rgb.convert("P", palette=pil.Palette.ADAPTIVE), rgb.convert("1")
  turned = rgb.rotate(180)
  sixteen = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(24, 0)
  clear_sixteen = np.where(sixteen == sixteen[0, 0], 65535, sixteen)
  dark = int(np.asarray(gray)[5, 5])

  def clear(picture, value):
    """The picture, the pixels of this value white."""
    pixels = np.array(picture.convert("RGB"))
    pixels[np.asarray(picture) == value] = 255
    return pixels

  plain = lambda picture: np.asarray(picture.convert("RGB"))
  return {
    "png RGBA": (saved(rgba, "PNG"), over_white(rgba)),
    "png gray and alpha": (saved(la, "PNG"), over_white(la)),
    "png palette": (saved(palette, "PNG"), plain(palette)),
    "png transparent palette": (saved(palette, "PNG", transparency=3), clear(palette, 3)),
    "png transparent gray": (saved(gray, "PNG", transparency=dark), clear(gray, dark)),
    "png 1 bit": (saved(bits, "PNG"), plain(bits)),
    "png 16 bits": (saved(pil.fromarray(sixteen), "PNG"), np.stack([sixteen / 257] * 3, -1)),
    "png transparent 16 bits": (
      saved(pil.fromarray(sixteen), "PNG", transparency=0),
      np.stack([clear_sixteen / 257] * 3, -1),
    ),
    "gif transparent": (saved(palette, "GIF", transparency=3), clear(palette, 3)),
    "gif moving": (
      saved(palette, "GIF", save_all=True, append_images=[turned.convert("P")]),
      plain(palette),
    ),
    "webp RGBA": (saved(rgba, "WEBP", lossless=True, exact=True), over_white(rgba)),
    "webp moving": (
      saved(rgb, "WEBP", lossless=True, save_all=True, append_images=[turned]),
      ramp,
    ),
    "bmp 1 bit": (saved(bits, "BMP"), plain(bits)),
    "bmp palette": (saved(palette, "BMP"), plain(palette)),
    "bmp": (saved(rgb, "BMP"), ramp),
    "jpeg CMYK": (saved(rgb.convert("CMYK"), "JPEG", quality=98), ramp),
    "jpeg gray": (saved(gray, "JPEG", quality=98), plain(gray)),
    "1 x 1": (saved(rgb.crop((0, 0, 1, 1)), "PNG"), ramp[:1, :1]),
  }


def test_odd_images_are_decoded_to_what_a_viewer_shows(tmp_path):
  odd = odd_images()
  for name, (data, _) in odd.items():
    (tmp_path / f"{name}.png").write_bytes(data)
  source = load(f"folder:{tmp_path}", "all", "decode|value_range(0, 255)|resize((24, 32))")
  assert len(source) == len(odd)
  for batch in eval_batches(source, 4):
    for i, found in zip(batch["index"], batch["image"], strict=True):
      if i < len(source):
        name = Path(eval(source.records.describe(i).removeprefix("file "))).stem
        expected = np.broadcast_to(odd[name][1], (24, 32, 3))
        # Lossy ones differ by what JPEG leaves out.
        limit = 9 if name.startswith("jpeg") else 1
        assert np.abs(found - expected).max() <= limit, name
  assert source.bad == {}


def test_the_alpha_channel_is_kept_on_demand():
  pil = pytest.importorskip("PIL.Image")
  from umd.data.ops import OpContext, decode

  pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
  data = tensorflow().constant(saved(pil.fromarray(pixels), "PNG"))
  found = decode(4)({"image": data}, OpContext(None, (None, None, None)))["image"]
  np.testing.assert_array_equal(found, pixels)


def test_the_given_broken_files():
  """The file README.txt beside them says which are readable."""
  if not BROKEN.is_dir():
    pytest.skip(f"{BROKEN} is not here")
  source = load(f"folder:{BROKEN}", "all", "decode|value_range(0, 255)|resize(8)", max_bad=3)
  assert len(source.arrays()[0]) == 7
  report = source.bad_report()
  for name in ("truncated.jpg", "empty.jpg", "text_renamed.jpg"):
    assert report.count(name) == 1
  assert report.count("\n") == len(source.bad) == 3


NAMES = ["a b.png", "per%20cent.png", "st*r?.png", "[x]{y}.png", "quote'\".png", "new\nline.png"]
NAMES += ["画 é Ω.png", "back\\slash.png", "-rf.png", os.fsdecode(b"\xff\xfe latin.png")]


def test_files_of_any_name_are_read_and_named(tmp_path, monkeypatch):
  for i, name in enumerate(NAMES):
    (tmp_path / name).write_bytes(png(image(i)))
    (tmp_path / f"bad {name}").write_bytes(b"rotten")
  out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # Knows none of the letters.
  monkeypatch.setattr("sys.stdout", out)
  source = load(
    f"folder:{tmp_path}", "all", "decode|resize(4)|value_range(0, 255)", max_bad=len(NAMES)
  )
  images = source.arrays()[0]
  assert sorted(images[:, 0, 0, 0].astype(int)) == list(range(len(NAMES)))
  out.seek(0)
  printed = out.read()
  assert printed.count("[data] skipped file") == printed.count("\n") == len(NAMES)


# What is not readable.


def test_an_unreadable_image_is_replaced_and_everything_else_is_as_without(tmp_path, capsys):
  """The oracle: the same files, all of them whole, and ops that draw by the place in the stream."""
  bad, whole = load(folder(tmp_path / "bad"), "all", RANDOM, max_bad=3), None
  whole = load(folder(tmp_path / "whole", bad={}), "all", RANDOM)
  place = {number_of(whole, i): i for i in range(N)}
  assert [number_of(bad, i) for i in range(N)] == [number_of(whole, i) for i in range(N)]
  substitutes = {}
  for step, (found, expected) in enumerate(zip(take(bad, 6), take(whole, 6), strict=True)):
    for row in range(8):
      wanted = int(expected["image"][row, 0, 0, 0])
      got = int(found["image"][row, 0, 0, 0])
      if wanted in ROTTEN:
        assert got not in ROTTEN
        assert substitutes.setdefault(wanted, got) == got  # The same one in every epoch.
        index, position = place[got], step * 8 + row
        one = next(iter(rows(whole.records, index, index + 1)))
        drawn = whole.preprocess(whole.records.parse(one), 3, position)
        np.testing.assert_array_equal(found["image"][row], drawn["image"])
        assert found["label"][row] == got % 3
      else:
        np.testing.assert_array_equal(found["image"][row], expected["image"][row])
        assert found["label"][row] == expected["label"][row]
  assert substitutes.keys() == ROTTEN.keys()
  assert {number_of(bad, i) for i in bad.bad} == set(ROTTEN)
  printed = capsys.readouterr().out
  for i in ROTTEN:
    assert len(re.findall(rf"\[data\] skipped file '.*{i}\.png': \w.*\n", printed)) == 1


def test_what_takes_an_images_place_depends_on_the_seed_and_the_image(tmp_path):
  bad = dict.fromkeys(range(5), b"")
  source = load(folder(tmp_path / "bad", 100, bad), "all", PLAIN, max_bad=5)
  clean = load(folder(tmp_path / "clean", 100, {}), "all", PLAIN)
  found = []
  for seed in range(2):
    got, wanted = (numbers(take(s, 1, 100, seed=seed)) for s in (source, clean))
    found += [int(got[wanted == i][0]) for i in bad]
  assert len(set(found)) >= 7  # Of 10 drawn from 95: fewer once in 100,000 sets of two seeds.


@pytest.mark.parametrize("processes, cache", [(2, True), (4, False)])
def test_processes_together_read_what_one_does_though_images_are_bad(tmp_path, processes, cache):
  source = load(folder(tmp_path), "all", RANDOM, max_bad=3, cache=cache)
  place = dict(process_count=processes)
  parts = [take(source, 3, process_index=i, **place) for i in range(processes)]
  joined = [
    {k: np.concatenate([share[k] for share in shares]) for k in shares[0]}
    for shares in zip(*parts, strict=True)
  ]
  assert_same(take(source, 3), joined)
  assert {number_of(source, i) for i in source.bad} == set(ROTTEN)


def test_a_resumed_run_reads_the_same_though_it_meets_other_bad_images_first(tmp_path):
  name, start = folder(tmp_path), 3
  whole = take(load(name, "all", RANDOM, max_bad=3), 6)
  load.__globals__["_load"].cache_clear()
  load.__globals__["_records"].cache_clear()
  again = load(name, "all", RANDOM, max_bad=3)
  assert again.bad == {}
  assert_same(whole[start:], take(again, 6 - start, start_step=start))


@pytest.mark.parametrize(
  "processes, size, cache", [(1, 6, False), (2, 12, True), (3, 6, False), (3, 12, True)]
)
def test_evaluation_counts_no_unreadable_image(tmp_path, processes, size, cache):
  source = load(folder(tmp_path), "all", PLAIN, max_bad=3, cache=cache)
  place = dict(process_count=processes)
  shares = [list(eval_batches(source, size, process_index=i, **place)) for i in range(processes)]
  assert {len(share) for share in shares} == {-(-N // size)}
  flat = [batch for share in shares for batch in share]
  found = {k: np.concatenate([b[k] for b in flat]) for k in flat[0]}
  assert found.keys() == {"image", "label", "index", "_mask"}
  real, inside = found["_mask"] > 0, found["index"] < N
  assert sorted(found["index"][inside]) == list(range(N))  # A skipped one keeps its index.
  skipped = {number_of(source, i) for i in found["index"][inside & ~real]}
  assert skipped == set(ROTTEN)
  for i, pixels, label in zip(*(found[k][real] for k in ("index", "image", "label")), strict=True):
    np.testing.assert_array_equal(pixels, image(number_of(source, i)))
    assert label == number_of(source, i) % 3
  assert not found["image"][~real].any() and not found["label"][~real].any()


def test_all_images_at_once_are_those_that_can_be_read(tmp_path):
  source = load(folder(tmp_path), "all", PLAIN, max_bad=3)
  images, labels = source.arrays()
  found = images[:, 0, 0, 0].astype(int)
  assert sorted(found) == sorted(set(range(N)) - set(ROTTEN))
  np.testing.assert_array_equal(labels, found % 3)


@pytest.mark.parametrize(
  "max_bad, n, most",
  [(0, 2000, 0), (1, 10, 1), (7.0, 10, 7), (0.001, 999, 0), (0.001, 2999, 2), (0.5, 9, 4)],
)
def test_the_limit_is_a_number_or_a_share_rounded_down(max_bad, n, most):
  records = from_arrays("some", np.zeros((n, 1, 1, 1), np.float32), None, 0).records
  assert Source(records, "", max_bad).reader.limit == most


@pytest.mark.parametrize("max_bad", [-2, -0.5, 1.5, True, float("nan")])
def test_a_limit_that_is_none_is_an_error(tmp_path, max_bad):
  with pytest.raises(ValueError, match=f"max_bad={max_bad!r} must be a number of examples"):
    load(folder(tmp_path, 3, {}), "all", PLAIN, max_bad=max_bad)


def test_one_file_of_a_folder_in_a_thousand_may_be_bad_by_default(tmp_path):
  assert load("digits", "train").reader.limit == 0
  pixels, first = png(image(0)), tmp_path / "1.png"
  for i in range(1050):
    (tmp_path / f"{i}.png").write_bytes(pixels)
  first.write_bytes(b"")
  source = load(f"folder:{tmp_path}", "all", PLAIN)
  assert source.reader.limit == 1
  assert len(source.arrays()[0]) == 1049
  (tmp_path / "2.png").write_bytes(b"")
  with pytest.raises(ValueError, match="2 of 1050 examples are not readable, and max_bad allows 1"):
    list(eval_batches(load(f"folder:{tmp_path}", "all", PLAIN + "|no_labels"), 500))


@pytest.mark.parametrize("evaluate", [False, True])
def test_more_bad_images_than_the_limit_are_an_error_that_lists_some(tmp_path, evaluate):
  bad = dict.fromkeys(range(9), b"rotten")
  source = load(folder(tmp_path, bad=bad), "all", PLAIN, max_bad=7)
  batches = eval_batches(source, 4) if evaluate else train_batches(source, 4, seed=0)
  with pytest.raises(ValueError) as error:
    list(itertools.islice(batches, 6))
  message = str(error.value)
  for word in ["8 of 12", "max_bad allows 7", "Repair or remove", "and 3 more", str(tmp_path)]:
    assert word in message
  assert message.count(".png': Unknown image file") == 5
  assert "\n" not in message


def test_without_a_limit_the_first_bad_image_is_the_error(tmp_path):
  source = load(folder(tmp_path, bad={5: b"rotten"}), "all", PLAIN, max_bad=0)
  for batches in (eval_batches(source, 4), train_batches(source, 4, seed=0)):
    with pytest.raises(ValueError, match=r"5\.png' is not readable: Unknown image.*max_bad"):
      list(itertools.islice(batches, 6))


def test_a_set_without_readable_images_is_an_error_whatever_the_limit(tmp_path):
  source = load(folder(tmp_path, 4, dict.fromkeys(range(4), b"x")), "all", PLAIN, max_bad=4)
  with pytest.raises(ValueError, match="nor is any of the 100 others"):
    take(source, 1)
  assert not any(batch["_mask"].any() for batch in eval_batches(source, 2))


@pytest.mark.parametrize("cache", [False, True])
def test_a_file_that_is_gone_is_skipped_like_any_other(tmp_path, cache):
  source = load(folder(tmp_path, bad={}), "all", PLAIN, max_bad=1, cache=cache)
  next(tmp_path.rglob("4.png")).unlink()
  assert sorted(source.arrays()[0][:, 0, 0, 0].astype(int)) == [i for i in range(N) if i != 4]


def test_an_image_that_no_op_can_use_is_skipped_with_the_ops_reason(tmp_path):
  name = folder(tmp_path, bad={3: png(image(3, 2, 2))})
  source = load(name, "all", "decode|central_crop(5)|value_range(0, 255)", max_bad=1)
  assert len(source.arrays()[0]) == N - 1
  (reason,) = source.bad.values()
  assert "central_crop: an image is smaller than (5, 5)" in reason


# Labels that are none; small sets.


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
  """A TFDS data set of 8 images; label of the sixth: -1. Loaded by `unlabelled(pp, **settings)`."""
  tf = tensorflow()
  import tensorflow_datasets as tfds

  folder = str(tmp_path_factory.mktemp("unlabelled"))
  features = {
    "image": tfds.features.Image(shape=(6, 7, 3), encoding_format="png"),
    "label": tfds.features.ClassLabel(num_classes=4),
  }
  images, labels = np.stack([image(i) for i in range(8)]), np.array([0, 1, 2, 3, 0, -1, 2, 3])
  examples = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})
  tfds.dataset_builders.TfDataBuilder(
    name="unlabelled",
    version="1.0.0",
    features=tfds.features.FeaturesDict(features),
    split_datasets={"train": examples},
    data_dir=folder,
  ).download_and_prepare()
  return lambda pp, **settings: load("tfds:unlabelled", "train", pp, data_dir=folder, **settings)


@pytest.mark.parametrize("cache", [False, True])
def test_a_record_without_a_label_is_an_error_that_names_it(unlabelled, cache):
  source = unlabelled(PLAIN, cache=cache)
  (place,) = (int(b["index"][0]) for b in eval_batches(unlabelled(f"{PLAIN}|no_labels"), 1)
              if b["image"][0, 0, 0, 0] == 5)  # fmt: skip
  for batches in (eval_batches(source, 4), train_batches(source, 4, seed=0)):
    with pytest.raises(ValueError) as error:
      list(itertools.islice(batches, 2))
    for word in [f"record {place} of data 'tfds:unlabelled", "label -1", "0..3", "no_labels"]:
      assert word in str(error.value)


def test_no_labels_makes_them_zeros(unlabelled):
  batches = take(unlabelled(f"{PLAIN}|no_labels"), 1)
  assert sorted(numbers(batches)) == list(range(8))
  assert not batches[0]["label"].any() and batches[0]["label"].dtype == np.int32


def test_unreadable_records_of_a_stream_are_replaced_too(unlabelled, monkeypatch):
  """TFRecord files cannot be read at random, but those few can be looked for."""
  tf = tensorflow()
  source = unlabelled(f"{PLAIN}|no_labels", max_bad=2)
  assert not source.records.random_access
  honest, bad = source.records.parse, {1, 6}

  def parse(row):
    example = honest(row)
    rotten = tf.reduce_any(tf.equal(row["index"], [*bad]))
    return {**example, "image": tf.where(rotten, b"rotten", example["image"])}

  of_index = {int(b["index"][0]): int(b["image"][0, 0, 0, 0]) for b in eval_batches(source, 1)}
  before = numbers(take(source, 6, 4))
  monkeypatch.setattr(source.records, "parse", parse)
  whole = take(source, 6, 4)
  after, hit = numbers(whole), np.isin(before, [of_index[i] for i in bad])
  np.testing.assert_array_equal(after[~hit], before[~hit])
  assert hit.sum() == 6 and not np.isin(after, [of_index[i] for i in bad]).any()
  assert_same(whole[3:], take(source, 3, 4, start_step=3))
  assert source.bad.keys() == bad
  source.bad.clear()


def test_one_image_is_enough(tmp_path):
  source = load(folder(tmp_path, 1, {}), "all", PLAIN)
  for batch in take(source, 2, 4):
    np.testing.assert_array_equal(batch["image"], np.stack([image(0)] * 4))
  (batch,) = eval_batches(source, 4)
  assert batch["_mask"].tolist() == [1, 0, 0, 0]

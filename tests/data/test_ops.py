"""Preprocessing ops against PIL and NumPy, and the strings that name them."""

import io
from pathlib import Path

import numpy as np
import pytest

from umd.data import eval_batches, from_arrays, load
from umd.data.decoding import RATIOS, inception_window, resized, window_of_jpeg
from umd.data.host import tensorflow
from umd.data.ops import (
  OPS,
  OpContext,
  decode,
  decode_jpeg_and_inception_crop,
  inception_crop,
  resize,
  resize_small,
)
from umd.data.preprocess import Preprocess, parse

TFDS = Path(__file__).resolve().parents[3] / "shared" / "data" / "tensorflow_datasets"
UNKNOWN = (None, None, None)


def smooth(height, width, seed=0):
  """uint8 [height, width, 3]: a gradient with some noise, so that JPEG has something to do."""
  y, x = np.mgrid[:height, :width]
  noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
  image = np.stack([255 * y / height, 255 * x / width, 127 + 90 * np.sin(x / 9)], -1) + noise
  return image.clip(0, 255).astype(np.uint8)


def encoded(image, kind, mode="RGB", **settings):
  pil = pytest.importorskip("PIL.Image")
  file = io.BytesIO()
  pil.fromarray(image).convert(mode).save(file, kind, **settings)
  return file.getvalue()


def context(seed=0, position=0, shape=UNKNOWN):
  return OpContext(tensorflow().constant([seed, position], "int64"), shape)


def apply(op, image, **settings):
  return op({"image": tensorflow().constant(image)}, context(**settings))["image"].numpy()


def run(pp, images, seed=0, positions=None):
  """Images through a pp string, one by one."""
  dtype = images.dtype.name
  ops = Preprocess(pp, dtype, images.shape[1:], "test")
  positions = range(len(images)) if positions is None else positions
  examples = [{"image": x, "label": np.int32(0)} for x in map(tensorflow().constant, images)]
  found = [ops(e, seed, p) for e, p in zip(examples, positions, strict=True)]
  return np.stack([f["image"].numpy() for f in found])


@pytest.mark.parametrize(
  "kind, modes",
  [
    ("JPEG", ["RGB", "L"]),
    ("PNG", ["RGB", "RGBA", "L", "P", "1"]),
    ("GIF", ["P"]),
    ("BMP", ["RGB", "RGBA", "L"]),
    ("WEBP", ["RGB"]),
  ],
)
def test_decode_gives_the_pixels_that_pil_gives(kind, modes):
  pil = pytest.importorskip("PIL.Image")
  for mode in modes:
    data = encoded(smooth(20, 30), kind, mode)
    expected = np.asarray(pil.open(io.BytesIO(data)).convert("RGB"), int)
    assert np.abs(apply(decode(), data).astype(int) - expected).max() <= 1
    gray = apply(decode(1), data)
    assert gray.shape == (20, 30, 1)
    assert np.abs(gray[..., 0] - expected @ [0.299, 0.587, 0.114]).mean() < 1.5


def test_decode_leaves_arrays_alone_and_uses_the_channels_of_the_source():
  image = smooth(4, 5)
  np.testing.assert_array_equal(apply(decode(), image), image)
  data = encoded(image, "PNG", "L")
  assert apply(decode(), data).shape == (4, 5, 3)
  assert apply(decode(), data, shape=(4, 5, 1)).shape == (4, 5, 1)


def test_the_mean_of_cifar_is_the_known_one():
  """TensorFlow's default decoder, which is not accurate, is .003 darker."""
  if not TFDS.is_dir():
    pytest.skip(f"{TFDS} is not here")
  pp = "decode|value_range(0, 1)"
  source = load("tfds:cifar10", "train", pp, data_dir=str(TFDS))
  total = sum(b["image"].sum((0, 1, 2), np.float64) for b in eval_batches(source, 500))
  np.testing.assert_allclose(total / (50_000 * 32 * 32), [0.4913, 0.4821, 0.4465], atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (10, 31), (64, 50), (7, 90)])
def test_resize_is_antialiased_as_pil_is(size):
  pil = pytest.importorskip("PIL.Image")
  image = smooth(40, 60)
  planes = [pil.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(image, -1, 0)]
  planes = [np.asarray(p.resize(size[::-1], pil.Resampling.BILINEAR)) for p in planes]
  np.testing.assert_allclose(apply(resize(size), image), np.stack(planes, -1), atol=1e-2)


@pytest.mark.parametrize("shape, expected", [((40, 60), (16, 24)), ((90, 30), (48, 16))])
def test_resize_small_keeps_the_aspect_ratio(shape, expected):
  assert apply(resize_small(16), smooth(*shape)).shape == (*expected, 3)


def test_central_crop_takes_the_middle():
  images = np.arange(7 * 8, dtype=np.float32).reshape(1, 7, 8, 1)
  np.testing.assert_array_equal(run("central_crop((3, 4))", images), images[:, 2:5, 2:6])


def test_value_range_is_linear():
  images = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
  np.testing.assert_allclose(run("value_range(-1, 1)", images).ravel(), [-1, -0.6, 1], atol=1e-6)
  found = run("value_range(low=0, high=10, in_min=51, in_max=255)", images)
  np.testing.assert_allclose(found.ravel(), [-2.5, 0, 10], atol=1e-5)


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:0"])
def test_decoding_a_part_gives_what_cropping_the_decoded_image_gives(sampling):
  data = encoded(smooth(100, 140), "JPEG", quality=90, subsampling=sampling)
  for position in range(6):
    draw = dict(seed=3, position=position)
    fused = apply(decode_jpeg_and_inception_crop(32, 20, 90, scaled=0), data, **draw)
    two = apply(inception_crop(32, 20, 90), apply(decode(), data), **draw)
    # Chroma at the rim of the window is interpolated from within it.
    assert np.abs(fused - two).mean() < 0.5
    assert np.abs(fused - two)[4:-4, 4:-4].max() < 3


def ramps(height, width):
  """uint8 [height, width, 3] whose values tell the place: of the row, the column, and both."""
  y, x = (np.arange(n) / n * 240 + 8 for n in (height, width))
  y, x = np.broadcast_arrays(y[:, None], x[None])
  return np.stack([y, x, (x + y) / 2], -1).round().astype(np.uint8)


WINDOWS = [(0, 0, 301, 403), (3, 5, 277, 361), (37, 41, 264, 362), (1, 2, 299, 400)]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_that_is_decoded_smaller_is_the_same_window(window, ratio):
  """Sides that no ratio divides, and values that grow by about 1 a pixel.

  Whole pixels of the smaller image would shift the window by up to 7 of them.
  """
  data = encoded(ramps(301, 403), "JPEG", quality=98, subsampling="4:4:4")
  size = (16, 24)
  top, left, height, width = window
  least = min(height // size[0], width // size[1])  # `scaled` that just allows the ratio, or less.
  scaled = least / ratio if ratio > 1 else least / 1.5
  found = window_of_jpeg(data, tensorflow().constant(window), size, scaled, 3).numpy()
  part = ramps(301, 403)[top : top + height, left : left + width]
  expected = resized(part, size).numpy()
  assert np.abs(found - expected)[1:-1, 1:-1].max() < 1.1
  assert np.abs((found - expected)[1:-1, 1:-1].mean((0, 1))).max() < 0.25


def decoded_by(monkeypatch, window, size, scaled):
  """[(ratio, window in the smaller image) of all calls of the decoder]."""
  tf, used = tensorflow(), []
  decode = tf.io.decode_and_crop_jpeg

  def spy(data, cut, *, ratio, **settings):
    used.append((ratio, np.asarray(cut)))
    return decode(data, cut, ratio=ratio, **settings)

  with monkeypatch.context() as patch:
    patch.setattr(tf.io, "decode_and_crop_jpeg", spy)
    data = encoded(smooth(200, 260), "JPEG")
    window_of_jpeg(data, tf.constant(window), size, scaled, 3)
  return used


@pytest.mark.parametrize(
  "sides, size, scaled, ratio",
  [
    ((128, 160), (16, 16), 1, 8),
    ((127, 160), (16, 16), 1, 4),
    ((160, 127), (16, 16), 1, 4),
    ((128, 160), (16, 21), 1, 4),
    ((128, 160), (16, 16), 2, 4),
    ((128, 160), (16, 16), 2.5, 2),
    ((128, 160), (64, 64), 1, 2),
    ((128, 160), (64, 64), 1.25, 1),
    ((128, 160), (16, 16), 0, 1),
    ((20, 20), (64, 64), 1, 1),
  ],
)
def test_a_window_is_decoded_as_small_as_scaled_allows(sides, size, scaled, ratio, monkeypatch):
  corner = np.array([7, 9])
  ((used, cut),) = decoded_by(monkeypatch, (*corner, *sides), size, scaled)
  assert used == ratio
  # All pixels that have a share in the window, and no others.
  before, after = corner - cut[:2] * ratio, (cut[:2] + cut[2:]) * ratio - corner - sides
  assert (before >= 0).all() and (before < ratio).all()
  assert (after >= 0).all() and (after < ratio).all()


def test_where_nothing_can_be_dropped_it_is_the_full_decode():
  data = encoded(smooth(100, 140), "JPEG")
  for position in range(4):
    draw = dict(seed=3, position=position)
    full, other = (
      apply(decode_jpeg_and_inception_crop(64, 40, scaled=k), data, **draw) for k in (0, 1.25)
    )
    np.testing.assert_allclose(other, full, atol=2e-3)


@pytest.mark.parametrize("scaled, most", [(1, 1.6), (1.25, 1.5), (1.5, 0.7), (2, 0.6)])
def test_photographs_decoded_smaller_differ_as_little_as_documented(scaled, most):
  """Without antialiasing the difference is 10 of 255."""
  if not TFDS.is_dir():
    pytest.skip(f"{TFDS} is not here")
  pp = "decode_jpeg_and_inception_crop(8)|value_range(-1, 1)"
  records = load("tfds:imagenet_sample", "train", pp, data_dir=str(TFDS), cache=True).records
  found = []
  for i in range(0, len(records), 10):
    data = records.parse({k: v[0] for k, v in records.fetch(np.array([i])).items()})["image"]
    full, other = (
      apply(decode_jpeg_and_inception_crop(64, 80, scaled=k), data, position=i) for k in (0, scaled)
    )
    found.append(np.abs(full - other).mean())
  assert 0 < np.mean(found) < most


def test_the_fused_op_reads_other_formats_and_arrays_too():
  image = smooth(40, 50)
  expected = apply(inception_crop(16, 50), image)
  fused = decode_jpeg_and_inception_crop(16, 50)
  np.testing.assert_array_equal(apply(fused, encoded(image, "PNG")), expected)
  np.testing.assert_array_equal(apply(fused, image), expected)


@pytest.mark.parametrize("low, high", [(5, 100), (80, 100), (20, 30)])
def test_windows_have_the_areas_and_shapes_asked_for(low, high):
  height, width = 200, 220
  draw = lambda i: inception_window([height, width, 3], [0, i], (low, high)).numpy()
  top, left, h, w = np.stack([draw(i) for i in range(400)], -1)
  area, rounding = 100 * h * w / (height * width), 1.5
  assert low - rounding <= area.min() <= low + 0.2 * (high - low)
  assert high - 0.3 * (high - low) <= area.max() <= high + rounding
  assert (w / h >= 0.73).all() and (w / h <= 1.37).all()
  assert (top >= 0).all() and (top + h <= height).all()
  assert (left >= 0).all() and (left + w <= width).all()
  # Placed anywhere: the middle of the room on average.
  room = np.maximum(height - h, 1)
  assert abs((top / room)[height > h].mean() - 0.5) < 0.1


def test_images_too_elongated_for_a_window_are_taken_whole():
  window = inception_window([40, 400, 3], [0, 0], (80, 100)).numpy()
  np.testing.assert_array_equal(window, [0, 0, 40, 400])


def test_flip_lr_mirrors_half_of_the_images():
  images = np.random.default_rng(0).random((200, 2, 5, 1), np.float32)
  found = run("flip_lr", images)
  mirrored = [np.array_equal(f, x[:, ::-1]) for f, x in zip(found, images, strict=True)]
  kept = [np.array_equal(f, x) for f, x in zip(found, images, strict=True)]
  np.testing.assert_array_equal(np.array(mirrored) ^ np.array(kept), True)
  assert 70 < sum(mirrored) < 130


def test_random_crop_takes_every_window_of_the_padded_image():
  image = np.arange(1, 13, dtype=np.float32).reshape(3, 4, 1)
  padded = np.pad(image, [(1, 1), (1, 1), (0, 0)])
  windows = {padded[i : i + 3, j : j + 4].tobytes() for i in range(3) for j in range(3)}
  found = run("random_crop((3, 4), padding=1)", np.stack([image] * 150))
  assert {f.tobytes() for f in found} == windows


def test_what_is_drawn_is_a_function_of_seed_position_and_op():
  images = np.stack([smooth(9, 9)] * 20)
  draw = lambda **settings: run("random_crop(5)|value_range(0, 1)", images, **settings)
  np.testing.assert_array_equal(draw(seed=1), draw(seed=1))
  assert (draw(seed=1) != draw(seed=2)).any()
  moved = draw(seed=1, positions=range(5, 25))
  np.testing.assert_array_equal(moved[:15], draw(seed=1)[5:])
  # Two flips with the same numbers would always cancel.
  floats = images.astype(np.float32)
  assert (run("flip_lr|flip_lr", floats) != floats).any()


def test_onehot_and_keep_change_the_example():
  tf = tensorflow()
  example = {"image": tf.zeros([1, 1, 1]), "label": tf.constant(2)}
  example = OPS["onehot"](4)(example, context())
  np.testing.assert_array_equal(example["labels"].numpy(), [0, 0, 1, 0])
  assert set(OPS["keep"]("image", "label")(example, context())) == {"image", "label"}


def test_strings_are_parsed_with_names_positions_and_spaces():
  text = " decode_jpeg_and_inception_crop(64, area_min=80) | flip_lr|keep('image', 'label') "
  assert [part for part, _ in parse(text)] == [
    "decode_jpeg_and_inception_crop(64, area_min=80)",
    "flip_lr",
    "keep('image', 'label')",
  ]
  assert parse("") == parse("  ") == []


@pytest.mark.parametrize(
  "pp, needed",
  [
    ("resiz(4)", ["'resiz'", "Did you mean resize", *OPS]),
    ("decode|__import__('os')", ["'__import__'", "decode"]),
    ("resize", ["missing", "'size'"]),
    ("resize(4, 5)", ["resize(4, 5)", "positional argument"]),
    ("flip_lr(p=0.5)", ["'p'", "flip_lr()"]),
    ("inception_crop(8, area=5)", ["'area'", "docs/data.md"]),
    ("resize(-1)", ["size=-1", "positive"]),
    ("resize((4, 5, 6))", ["size=(4, 5, 6)", "(height, width)"]),
    ("resize_small((4, 5))", ["size=(4, 5)", "positive int"]),
    ("resize(size=x)", ["resize(size=x)", "numbers, strings or tuples"]),
    ("inception_crop(8, area_min=0)", ["area_min=0", "percents"]),
    ("decode_jpeg_and_inception_crop(8, scaled=.5)", ["scaled=0.5", "0 (decode in full)", "1"]),
    ("decode_jpeg_and_inception_crop(8, area_min=0)", ["area_min=0", "percents"]),
    ("inception_crop(8, area_min=90, area_max=80)", ["area_min=90", "area_max=80"]),
    ("random_crop(8, padding=-1)", ["padding=-1"]),
    ("value_range(0, 1, 5, 5)", ["in_min=5", "differ"]),
    ("decode(channels=2)", ["channels=2", "1, 3 or 4"]),
    ("resize(4", ["never closed", "An example"]),
    ("decode||flip_lr", ["invalid syntax", "An example"]),
    ("1 + 2", ["'1 + 2'", "no op"]),
  ],
)
def test_a_wrong_string_is_an_error_that_says_what_is_known(pp, needed):
  with pytest.raises(ValueError) as error:
    parse(pp)
  for word in [f"pp={pp!r}", *needed]:
    assert word in str(error.value)


@pytest.mark.parametrize(
  "pp, needed",
  [
    ("", ["leaves images encoded", "begin with decode"]),
    ("resize(8)|decode", ["resize(8)", "put decode before resize"]),
    ("flip_lr|decode|value_range(-1, 1)", ["put decode before flip_lr"]),
    ("decode", ["uint8", "value_range(-1, 1)"]),
    ("decode|value_range(-1, 1)", ["(None, None, 3)", "resize(SIZE)"]),
    ("decode|resize_small(8)|value_range(-1, 1)", ["(None, None, 3)", "central_crop(SIZE)"]),
    ("decode|resize(8)|central_crop(9)", ["central_crop", "smaller than (9, 9)", "resize_small"]),
    ("decode|resize(8)|keep('image')", ["drops 'label'", "keep"]),
    ("decode|keep('image', 'lable')", ["'lable'", "['image', 'label']"]),
    ("decode|onehot(10, key='class')", ["'class'", "label"]),
  ],
)
def test_ops_in_a_wrong_order_are_an_error_before_any_image_is_read(pp, needed):
  with pytest.raises(ValueError) as error:
    Preprocess(pp, "string", UNKNOWN, "somewhere")
  for word in ["somewhere", f"pp={pp!r}", *needed]:
    assert word in str(error.value)


@pytest.mark.parametrize(
  "pp, size",
  [
    ("decode|resize((8, 9))|value_range(-1, 1)", (8, 9, 3)),
    ("decode(1)|resize_small(8)|central_crop(8)", (8, 8, 1)),
    ("decode|random_crop(7)|value_range(-1, 1)", (7, 7, 3)),
    ("decode_jpeg_and_inception_crop(5)|flip_lr", (5, 5, 3)),
  ],
)
def test_the_size_of_images_is_known_without_reading_one(pp, size):
  assert Preprocess(pp, "string", UNKNOWN, "x").image_size == size


def test_a_size_that_the_source_knows_needs_no_resize():
  assert Preprocess("decode|value_range(-1, 1)", "string", (4, 6, 1), "x").image_size == (4, 6, 1)


def test_an_image_smaller_than_the_crop_is_an_error_that_names_it(tmp_path):
  (tmp_path / "a.png").write_bytes(encoded(smooth(6, 20), "PNG"))
  source = load(f"folder:{tmp_path}", "all", "decode|central_crop(8)|value_range(-1, 1)")
  with pytest.raises(ValueError, match=r"a\.png.*central_crop.*smaller.*resize_small"):
    next(eval_batches(source, 1))


def test_expect_size_makes_the_size_known_and_changes_nothing(tmp_path):
  image = smooth(6, 9)
  (tmp_path / "a.png").write_bytes(encoded(image, "PNG"))
  source = load(f"folder:{tmp_path}", "all", "decode|expect_size(6, 9)|value_range(0, 255)")
  assert source.image_size == (6, 9, 3)
  np.testing.assert_array_equal(next(eval_batches(source, 1))["image"][0], image)


@pytest.mark.parametrize("shape", [(6, 8), (5, 9), (9, 6)])
def test_an_image_of_another_size_than_expected_is_an_error_that_names_it(shape, tmp_path):
  for i in range(3):
    (tmp_path / f"{i}.png").write_bytes(encoded(smooth(6, 9), "PNG"))
  (tmp_path / "other.png").write_bytes(encoded(smooth(*shape), "PNG"))
  pp = "decode|expect_size(6, 9, ' as its neighbours')|value_range(-1, 1)"
  source = load(f"folder:{tmp_path}", "all", pp)
  told = rf"other\.png'.* {shape[0]} x {shape[1]}, not 6 x 9 as its neighbours"
  with pytest.raises(ValueError, match=told):
    list(eval_batches(source, 4))
  with pytest.raises(ValueError, match=r"expect_size.*the image is 6 x 9, not 7 x 9"):
    from_arrays("a", np.zeros((1, 6, 9, 3), np.uint8), None, 0, "expect_size(7, 9)")


def test_arrays_of_uint8_need_a_value_range():
  with pytest.raises(ValueError, match=r"add value_range\(-1, 1\)"):
    from_arrays("bytes", np.zeros((2, 4, 4, 3), np.uint8), None, 0)

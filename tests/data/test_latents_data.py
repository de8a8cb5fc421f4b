"""Stored latents as training data: records, splits, views, and what is said when they do not fit.

The moments of view v of image i are i + v / 8 everywhere, and its label is i % 3.
"""

import itertools
import os
import shutil

import numpy as np
import pytest

from umd.codecs import latent_files
from umd.data import eval_batches, load, train_batches
from umd.data.latents import check

N, M = 20, 6
SHAPE = (4, 2, 3, 8)
ENCODING = {
  "vae": "some-vae",
  "sha256": "ab" * 32,
  "scaling": 0.5,
  "shift": 0.25,
  "factor": 8,
  "vae_dtype": "bfloat16",
  "dtype": "float16",
  "pixel_size": [16, 24, 3],
  "shape": list(SHAPE),
  "views": ["as it is", "mirrored", "crop", "crop"],
  "seed": 0,
  "num_classes": 3,
  "class_names": "",
}
SUMMARIES = {"train": {"mean": [0.0], "std": [1.0]}, "validation": {"mean": [2.0], "std": [3.0]}}


def plan_of(folder, split, num, shards, **encoding):
  settings = {"data": f"some:{split}", "fingerprint": split, "num_images": num, "shards": shards}
  settings["encoding"] = {**ENCODING, **encoding}
  return latent_files.LatentPlan(str(folder), settings, f"make {split}", split, ("x", "y", "z"))


def write(folder, split="train", num=N, shards=3, only=None, **encoding):
  """Writes a split, or of its shards those in `only`."""
  plan = plan_of(folder, split, num, shards, **encoding)
  features, shape = latent_files.features(plan), plan.settings["encoding"]["shape"]
  dtype = plan.settings["encoding"]["dtype"]

  def record(i):
    moments = np.broadcast_to((i + np.arange(shape[0]) / 8)[:, None, None, None], shape)
    return {"moments": moments.astype(dtype), "index": i, "label": i % 3}

  latent_files.begin(plan)
  for shard in range(shards) if only is None else only:
    low, high = (num * (shard + i) // shards for i in range(2))
    records = [latent_files.serialize(features, record(i)) for i in range(low, high)]
    latent_files.write_shard(plan, shard, records, {"split": split})
  if only is None:
    latent_files.finish(plan, lambda reports, _: SUMMARIES[reports[0]["split"]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("latents") / "out")
  write(path)
  write(path, "validation", M, 2)
  return path


def pixels(folder):
  """{index: value} of a source that keeps constant images."""
  found = {}
  for batch in eval_batches(folder, 7):
    for i in np.flatnonzero(batch["_mask"]):
      assert len(np.unique(batch["image"][i])) == 1
      found[int(batch["index"][i])] = float(batch["image"][i].max())
  return found


@pytest.mark.parametrize("view", range(4))
@pytest.mark.parametrize("cache", [False, True])
def test_a_view_is_read_in_the_order_of_the_source(folder, view, cache):
  source = load(f"latents:{folder}", "train", f"view({view})", cache=cache)
  assert source.image_size == SHAPE[1:]
  assert source.num_classes == 3
  assert source.class_names == ("x", "y", "z")
  assert pixels(source) == {i: i + view / 8 for i in range(N)}
  images, labels = source.arrays()
  assert images.dtype == np.float32
  np.testing.assert_array_equal(labels, np.arange(N) % 3)


def test_slices_of_splits_are_those_of_the_images(folder):
  source = load(f"latents:{folder}", "train[75%:]+validation[:2]", "view(0)")
  np.testing.assert_array_equal(source.arrays()[0][:, 0, 0, 0], [15, 16, 17, 18, 19, 0, 1])


def drawn(source, steps, seed=0, start_step=0):
  """(images' numbers, views) [n] that training saw."""
  stream = train_batches(source, 10, seed=seed, start_step=start_step)
  batches = list(itertools.islice(stream, steps))
  values = np.concatenate([b["image"][:, 0, 0, 0] for b in batches])
  labels = np.concatenate([b["label"] for b in batches])
  images = np.floor(values).astype(int)
  np.testing.assert_array_equal(images % 3, labels)
  return images, (values - images) * 8


@pytest.mark.parametrize("cache", [False, True])
def test_training_draws_views_at_random_and_resumes(folder, cache):
  source = load(f"latents:{folder}", "train", "random_view", cache=cache)
  images, views = drawn(source, 40)
  counts = np.bincount(views.astype(int), minlength=4)
  assert set(views) == {0, 1, 2, 3}
  # 400 draws: a count has mean 100 and standard deviation 8.7.
  assert counts.min() > 60
  # An image comes in another view in another epoch, and two images of an epoch in different ones.
  epochs = views.reshape(20, N)
  assert all(len(set(views[images == i])) > 1 for i in range(N))
  assert all(len(set(epoch)) > 1 for epoch in epochs)
  later = drawn(source, 10, start_step=30)
  np.testing.assert_array_equal(later, (images[300:], views[300:]))
  assert not np.array_equal(drawn(source, 40, seed=1)[1], views)


def test_float32_latents_are_read_as_they_are(tmp_path):
  write(tmp_path / "out", num=4, shards=1, dtype="float32")
  source = load(f"latents:{tmp_path}/out", "train", "view(1)")
  assert pixels(source) == {i: i + 0.125 for i in range(4)}


@pytest.mark.parametrize("cache", [False, True])
def test_the_info_says_how_they_were_made(folder, cache):
  info = load(f"latents:{folder}", "train", "view(0)", cache=cache).records.info
  assert (info.sha256, info.scaling, info.shift, info.factor) == ("ab" * 32, 0.5, 0.25, 8)
  assert (info.pixel_size, info.shape, info.views) == ((16, 24, 3), SHAPE, 4)
  assert info.preprocessing == ("as it is", "mirrored", "crop", "crop")
  assert (info.mean, info.std) == ((0.0,), (1.0,))


def test_moments_of_joined_splits_are_of_all_their_images(folder):
  info = load(f"latents:{folder}", "train+validation", "view(0)").records.info
  mean = 2.0 * M / (N + M)
  square = (1.0 * N + (9.0 + 4.0) * M) / (N + M)
  np.testing.assert_allclose(info.mean, [mean])
  np.testing.assert_allclose(info.std, [np.sqrt(square - mean**2)])
  assert info.data == ("some:train", "some:validation")


def test_the_fingerprint_is_of_what_is_stored_not_of_where(folder, tmp_path):
  fingerprint = lambda path, split="train": load(
    f"latents:{path}", split, "view(0)"
  ).records.fingerprint()
  shutil.copytree(folder, tmp_path / "copy")
  assert fingerprint(tmp_path / "copy") == fingerprint(folder)
  write(tmp_path / "other", seed=1)
  others = {
    fingerprint(folder),
    fingerprint(folder, "train[:10]"),
    fingerprint(folder, "validation"),
    fingerprint(tmp_path / "other"),
  }
  assert len(others) == 4


def error_of(name, split="train", pp="view(0)", kind=ValueError):
  with pytest.raises(kind) as raised:
    load(name, split, pp)
  return str(raised.value)


@pytest.mark.parametrize(
  "pp, message",
  [
    ("", r"add random_view (training) or view(0) (evaluation)"),
    ("no_labels", r"add random_view (training) or view(0) (evaluation)"),
    ("view(4)", "there are views 0..3, but no view 4"),
    ("view(-1)", "number=-1 must be"),
    ("view(0)|random_view", "(or no more)"),
    ("decode|random_view", "decode is for images"),
    ("random_view|value_range(-1, 1)", "value_range(-1, 1) is for images"),
    ("random_view|flip_lr", "flip_lr is for images"),
  ],
)
def test_ops_that_do_not_fit_are_errors(folder, pp, message):
  error = error_of(f"latents:{folder}", pp=pp)
  assert message in error
  assert folder in error or pp in error


def test_all_views_of_float32_latents_are_no_images(tmp_path):
  write(tmp_path / "out", num=2, shards=1, dtype="float32")
  assert "add random_view" in error_of(f"latents:{tmp_path}/out", pp="")


def test_views_are_not_for_images():
  assert "it is for data 'latents:DIR'" in error_of("digits", pp="random_view")
  assert load("digits", "train", "no_labels").image_size == (8, 8, 1)


def test_a_missing_split_lists_those_there_and_the_command(folder):
  error = error_of(f"latents:{folder}", "test")
  assert "no split 'test'; it has train (20 images), validation (6 images)" in error
  assert "make train" in error
  assert "holds no images" in error_of(f"latents:{folder}", "train[20:]")
  assert "train[a:]" in error_of(f"latents:{folder}", "train[a:]")


def test_an_unfinished_folder_says_how_to_go_on(tmp_path):
  write(tmp_path / "out", only=[1])
  error = error_of(f"latents:{tmp_path}/out")
  assert "not finished, 1 of 3 shards" in error
  assert "make train" in error


def test_an_unfinished_split_beside_a_whole_one_says_how_to_go_on(tmp_path):
  out = tmp_path / "out"
  write(out, num=4, shards=2)
  write(out, "validation", M, 2, only=[0])
  assert len(load(f"latents:{out}", "train", "view(0)")) == 4
  error = error_of(f"latents:{out}", "validation")
  assert "'validation' is not finished, 1 of 2 shards" in error
  assert "make validation" in error
  write(out, "validation", M, 2)  # A split that is added is seen by a process that read others.
  assert len(load(f"latents:{out}", "validation", "view(0)")) == M


def test_other_folders_are_no_latents(folder, tmp_path):
  assert "no such folder" in error_of(f"latents:{tmp_path}/none", kind=FileNotFoundError)
  assert "holds no latents" in error_of(f"latents:{tmp_path}")
  out = tmp_path / "out"
  shutil.copytree(folder, out)
  (out / "metadata.json").write_text("{}")
  assert "metadata.json is not of" in error_of(f"latents:{out}")
  os.remove(out / "metadata.json")
  shutil.rmtree(out / "progress")
  assert "Is it 'tfds:NAME'" in error_of(f"latents:{out}")
  assert "'latents:DIR'" in error_of("latents:")


def test_another_vae_or_scale_is_an_error(folder):
  info = load(f"latents:{folder}", "train", "view(0)").records.info
  check(info, "ab" * 32, 0.5, 0.25)
  with pytest.raises(ValueError, match=r"abababababab.*cdcdcdcdcdcd"):
    check(info, "cd" * 32, 0.5, 0.25)
  with pytest.raises(ValueError, match=r"scaling_factor=0\.5.*0.25"):
    check(info, "ab" * 32, 0.25, 0.25)
  with pytest.raises(ValueError, match=r"shift_factor=0\.25.*has 0.0"):
    check(info, "ab" * 32, 0.5, 0.0)

"""The tools for reference statistics and for measuring samples, against NumPy on the same images.

A projection stands in for Inception, which takes long here: the 48 means of blocks of an image,
turned into a (smaller) feature space by matrices with orthonormal rows. Distances between features
are then those between block means.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from flax.traverse_util import flatten_dict

from tools import evaluate_samples, fid_reference
from umd.data.host import tensorflow
from umd.data.sources import locate
from umd.devices.mesh import replicate
from umd.metrics import features as extraction
from umd.metrics import inception, statistics
from umd.metrics.quantize import quantize
from umd.weights import download, pytorch

ROOT = Path(__file__).resolve().parents[2]
POOL, SPATIAL, LOGITS = 64, 56, 20
SHA = "5a" * 32
N = 60  # More than the 48 block means, whose covariance then has full rank.


def orthonormal(seed, width):
  return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, 48)))[0].T


PROJECTIONS = {
  "pool": orthonormal(0, POOL),
  "spatial": 2 * orthonormal(1, SPATIAL),
  "logits": np.random.default_rng(2).standard_normal((48, LOGITS)),
}


def block_means(images):
  """[n, 48] of [n, H, W, 3] in [0, 255]: means of 4 x 4 blocks over a tenth of the range."""
  n, height, width, channels = images.shape
  blocks = images.reshape(n, 4, height // 4, 4, width // 4, channels)
  return blocks.mean(axis=(2, 4)).reshape(n, -1) / 25.5


@pytest.fixture(autouse=True)
def projection(monkeypatch):
  """Puts the projection in Inception's place; returns the list of weights that were asked for."""
  asked = []

  def look(params, images, how, mesh):
    levels = quantize(images, how)
    means = block_means(jnp.broadcast_to(levels, (*levels.shape[:3], 3)))
    return {part: means @ matrix for part, matrix in params.items()}

  def load_network(file, mesh):
    params = {part: matrix.astype(np.float32) for part, matrix in PROJECTIONS.items()}
    return extraction.LoadedInception(replicate(params, mesh), SHA)

  for module in (extraction, statistics):
    monkeypatch.setattr(module, "POOL", POOL)
    monkeypatch.setattr(module, "SPATIAL", SPATIAL)
  monkeypatch.setattr(extraction, "LOGITS", LOGITS)
  monkeypatch.setattr(extraction, "find_network", lambda path="", *tell: asked.append(path) or path)
  monkeypatch.setattr(extraction, "load_network", load_network)
  monkeypatch.setattr(extraction, "look", look)
  return asked


def draw(seed, n=N, size=8, channels=3):
  """uint8 [n, size, size, channels]: images around a colour of their own each."""
  rng = np.random.default_rng(seed)
  values = rng.normal(128, 40, (n, 1, 1, channels)) + rng.normal(0, 30, (n, size, size, channels))
  return values.clip(0, 255).astype(np.uint8)


def save(path, *arrays, **named):
  np.savez(path, *arrays, **named)
  return str(path)


def write_png(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(tensorflow().io.encode_png(image).numpy())


def write_folder(root, images, classes=0):
  for i, image in enumerate(images):
    write_png(root / (f"class{i % classes}" if classes else "") / f"{i:05d}.png", image)
  return str(root)


def evaluate(samples, reference, tmp_path, *args):
  """What the tool writes to its JSON file."""
  out = tmp_path / "results.json"
  evaluate_samples.main([str(samples), str(reference), "--out", str(out), *args])
  return json.loads(out.read_text())


def metrics(*args):
  return evaluate(*args)["metrics"]


def make_reference(data, out, *args):
  fid_reference.main(["--data", str(data), "--out", str(out), *args])
  with np.load(out) as arrays:
    return dict(arrays)


def failed(capsys, tool, *args):
  """The one line that a tool ends with."""
  with pytest.raises(SystemExit) as end:
    tool.main([*map(str, args)])
  assert end.value.code == 1
  told = capsys.readouterr().err
  assert told.startswith("error: ") and told.count("\n") == 1
  return told


def frechet(x, y):
  """Frechet distance between rows [n, d] by SciPy's matrix root."""
  (mu1, s1), (mu2, s2) = ((a.mean(axis=0), np.cov(a, rowvar=False)) for a in (x, y))
  return np.sum((mu1 - mu2) ** 2) + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)


def inception_score(means):
  logits = means @ PROJECTIONS["logits"]
  p = scipy.special.softmax(logits, axis=1)
  return np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean())


def share_near(x, y, k=3):
  """Share of rows of x that lie in a ball around a row of y up to the k-th nearest other."""
  distance = lambda a, b: np.sqrt(((a[:, None] - b) ** 2).sum(axis=-1))
  radii = np.sort(distance(y, y), axis=1)[:, k]
  return (distance(x, y) <= radii).any(axis=1).mean()


def mmd(x, y):
  """Unbiased MMD^2 with the kernel (<a, b> / d + 1)^3."""
  kernel = lambda a, b: (a @ b.T / POOL + 1) ** 3
  off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
  return off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean()


def test_values_are_those_of_a_calculation_by_hand(tmp_path):
  ours, theirs = draw(0), (draw(1) * 0.9).astype(np.uint8)
  samples = save(tmp_path / "s.npz", ours, np.arange(N) % 3)
  found = metrics(samples, save(tmp_path / "r.npz", theirs), tmp_path)
  x, y = block_means(ours.astype(float)), block_means(theirs.astype(float))
  expected = {
    "fid_60": frechet(x, y),
    "sfid_60": frechet(2 * x, 2 * y),
    "is_60": inception_score(x),
    "is_std_60": 0,
    "precision_60": share_near(x, y),
    "recall_60": share_near(y, x),
    "kid_60": mmd(x, y),  # All subsets are the whole.
    "kid_std_60": 0,
  }
  shuffled = {key: found.pop(key) for key in ("is_shuffled_60", "is_shuffled_std_60")}
  assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
  assert 0 < expected["precision_60"] < 1 and expected["kid_60"] > 1e-3  # They tell something.
  assert shuffled["is_shuffled_std_60"] > 0


@pytest.mark.parametrize("classes", [0, 3])
def test_a_folder_of_images_is_measured_as_an_npz_of_them(classes, tmp_path):
  ours, theirs = draw(0), draw(1)
  wanted = ["--metrics", "fid", "sfid", "is", "precision_recall", "kid"]
  ends = []
  for samples, reference in (
    (save(tmp_path / "s.npz", ours), save(tmp_path / "r.npz", theirs)),
    (write_folder(tmp_path / "s", ours, classes), write_folder(tmp_path / "r", theirs)),
  ):
    ends.append(metrics(samples, reference, tmp_path, *wanted))
  assert ends[0] == pytest.approx(ends[1], rel=1e-5, abs=1e-6)


def test_a_file_of_statistics_serves_as_well_as_the_images(tmp_path):
  samples, images = save(tmp_path / "s.npz", draw(0)), save(tmp_path / "i.npz", draw(1))
  made = make_reference(images, tmp_path / "ours.npz")
  adm = {key: made[key] for key in ("arr_0", "mu", "sigma", "mu_s", "sigma_s")}
  expected = metrics(samples, images, tmp_path)
  for reference in (tmp_path / "ours.npz", save(tmp_path / "adm.npz", **adm)):
    assert metrics(samples, reference, tmp_path) == pytest.approx(expected, rel=1e-6)


def test_moments_in_a_file_go_before_the_images_beside_them(tmp_path):
  samples, of_training = save(tmp_path / "s.npz", draw(0)), save(tmp_path / "t.npz", draw(1))
  made = make_reference(of_training, tmp_path / "made.npz")
  made |= {"arr_0": draw(2)}
  del made["features"]
  found = metrics(samples, save(tmp_path / "both.npz", **made), tmp_path)
  of_moments = metrics(samples, of_training, tmp_path)
  of_images = metrics(samples, save(tmp_path / "i.npz", draw(2)), tmp_path)
  for expected, names in (
    (of_moments, ["fid_60", "sfid_60"]),
    (of_images, ["precision_60", "recall_60", "kid_60"]),
  ):
    assert [found[n] for n in names] == pytest.approx([expected[n] for n in names], rel=1e-6)
  assert of_moments["fid_60"] != pytest.approx(of_images["fid_60"], rel=1e-3)


def test_a_file_with_mu_and_sigma_alone_serves_fid_and_says_what_is_left_out(tmp_path, capsys):
  samples, images = save(tmp_path / "s.npz", draw(0)), save(tmp_path / "i.npz", draw(1))
  made = make_reference(images, tmp_path / "made.npz")
  bare = save(tmp_path / "bare.npz", mu=made["mu"], sigma=made["sigma"])
  found = evaluate(samples, bare, tmp_path)
  assert set(found["metrics"]) == {
    *("fid_60", "is_60", "is_std_60", "is_shuffled_60", "is_shuffled_std_60")
  }
  whole = metrics(samples, images, tmp_path)
  assert found["metrics"]["fid_60"] == pytest.approx(whole["fid_60"], rel=1e-6)
  notes = "\n".join(found["notes"])
  assert "pytorch-fid" in notes
  for metric in ("sfid", "precision_recall", "kid"):
    assert f"left out: {metric}: {bare}" in notes
  capsys.readouterr()
  told = failed(capsys, evaluate_samples, samples, bare, "--metrics", "fid", "kid")
  assert "kid" in told and "bare.npz has no images" in told and "fid:" not in told


def test_statistics_of_both_sides_are_compared_without_the_network(projection, tmp_path):
  files = [tmp_path / "a.npz", tmp_path / "b.npz"]
  for i, file in enumerate(files):
    made = make_reference(save(tmp_path / f"{i}.npz", draw(i)), file)
    save(file, mu=made["mu"], sigma=made["sigma"])
  projection.clear()
  found = metrics(*files, tmp_path)
  expected = frechet(*(block_means(draw(i).astype(float)) for i in range(2)))
  assert found == pytest.approx({"fid": expected}, rel=1e-4)
  assert projection == []


def test_what_was_measured_is_recorded(tmp_path, capsys, projection):
  samples, reference = save(tmp_path / "s.npz", draw(0)), write_folder(tmp_path / "r", draw(1, 70))
  found = evaluate(samples, reference, tmp_path, "--weights", "/some/where.pth")
  assert found["samples"] == {"path": samples, "count": 60, "size": [8, 8, 3]}
  assert found["reference"] == {"path": reference, "count": 70, "size": [8, 8, 3]}
  assert found["inception"] == SHA and found["quantize"] == "uint8 as stored"
  assert {"jax", "numpy"} <= found["versions"].keys() and found["date"]
  assert set(projection) == {"/some/where.pth"}
  told = capsys.readouterr().out
  rows = dict(line.split() for line in told.splitlines() if len(line.split()) == 2)
  for name, value in found["metrics"].items():
    assert float(rows[name]) == pytest.approx(value, rel=1e-5)
  assert SHA[:12] in told and SHA[:13] not in told
  assert all(note in told for note in found["notes"])


def test_few_images_and_different_sizes_are_remarked(tmp_path):
  samples = save(tmp_path / "s.npz", draw(0, size=16))
  notes = "\n".join(evaluate(samples, save(tmp_path / "r.npz", draw(1)), tmp_path)["notes"])
  assert "60 samples and 60 reference images are fewer than Inception's 2048" in notes
  assert "subsets of 60 images" in notes
  assert "samples are 16 x 16, reference images 8 x 8" in notes


def test_too_few_images_for_a_metric_leave_it_out(tmp_path):
  found = evaluate(
    save(tmp_path / "s.npz", draw(0, 3)), save(tmp_path / "r.npz", draw(1)), tmp_path
  )
  assert set(found["metrics"]) == {"fid_3", "sfid_3", "is_3", "is_std_3", "kid_3", "kid_std_3"}
  notes = "\n".join(found["notes"])
  assert "left out: precision_recall: it takes 4 images" in notes
  assert "left out: is_shuffled: it takes 10 images" in notes


@pytest.mark.parametrize("source", ["npz", "flat", "classes"])
def test_a_reference_holds_the_moments_of_all_and_some_images_with_their_features(source, tmp_path):
  images, out = draw(0, 21), tmp_path / "deep" / "reference.npz"
  data = {
    "npz": lambda: save(tmp_path / "i.npz", images),
    "flat": lambda: write_folder(tmp_path / "i", images),
    "classes": lambda: f"folder:{write_folder(tmp_path / 'i', images, 4)}",
  }[source]()
  made = make_reference(data, out, "--images", "5")
  features = {p: block_means(images.astype(float)) @ PROJECTIONS[p] for p in ("pool", "spatial")}
  for part, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
    np.testing.assert_allclose(made[mu], features[part].mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(made[sigma], np.cov(features[part], rowvar=False), atol=1e-4)
  assert made["count"] == 21 and made["inception"] == SHA
  assert made["arr_0"].dtype == np.uint8 and made["arr_0"].shape == (5, 8, 8, 3)
  of_these = block_means(made["arr_0"].astype(float)) @ PROJECTIONS["pool"]
  np.testing.assert_allclose(made["features"], of_these, atol=1e-4)
  rows = [np.flatnonzero((images == image).all(axis=(1, 2, 3))).tolist() for image in made["arr_0"]]
  if source == "npz":
    assert rows == [[0], [4], [8], [12], [16]]
  assert len({row for (row,) in rows}) == 5
  assert list(out.parent.iterdir()) == [out]


def test_images_of_all_sizes_are_brought_to_the_one_that_is_asked_for(tmp_path):
  pil = pytest.importorskip("PIL.Image")
  rng, root = np.random.default_rng(0), tmp_path / "i"
  expected = []
  for i, (height, width) in enumerate([(40, 60), (60, 40), (16, 16), (33, 90)]):
    coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    image = pil.fromarray(coarse).resize((width, height), pil.Resampling.BILINEAR)
    write_png(root / f"{i}.png", np.asarray(image))
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    middle = image.crop((left, top, left + side, top + side))
    expected.append(np.asarray(middle.resize((16, 16), pil.Resampling.BILINEAR)))
  made = make_reference(root, tmp_path / "r.npz", "--size", "16")["arr_0"].astype(int)
  assert made.shape == (4, 16, 16, 3)
  for image in expected:  # PIL crops before it resizes, and rounds twice.
    assert np.abs(made - image).mean(axis=(1, 2, 3)).min() < 3
  samples = evaluate(root, tmp_path / "r.npz", tmp_path, "--size", "16", "--metrics", "fid")
  assert samples["metrics"]["fid_4"] == pytest.approx(0, abs=1e-6)
  assert samples["quantize"] == "rounded to uint8 after resizing"


def test_the_features_that_an_adm_file_lacks_are_added(tmp_path, capsys):
  made = make_reference(save(tmp_path / "i.npz", draw(0)), tmp_path / "made.npz", "--images", "9")
  keys = ("arr_0", "mu", "sigma", "mu_s", "sigma_s")
  adm = save(tmp_path / "adm.npz", **{key: made[key] for key in keys})
  capsys.readouterr()
  fid_reference.main(["--data", adm])
  told = capsys.readouterr().out
  for word in ("'adm'", "64 pool", "56 spatial", "9 images, uint8, 8 x 8 x 3", "does not say"):
    assert word in told
  full = make_reference(adm, tmp_path / "full.npz")
  np.testing.assert_allclose(full["features"], made["features"], rtol=1e-5)
  for key in keys:
    np.testing.assert_array_equal(full[key], made[key])
  assert full["count"] == 0 and full["inception"] == ""


@pytest.mark.parametrize("keep, why", [("all", "it has features"), ("moments", "has no images")])
def test_a_file_that_lacks_nothing_that_could_be_added_is_not_written(keep, why, tmp_path, capsys):
  made = make_reference(save(tmp_path / "i.npz", draw(0, 6)), tmp_path / "made.npz")
  keys = made if keep == "all" else ("mu", "sigma")
  file = save(tmp_path / "a.npz", **{key: made[key] for key in keys})
  fid_reference.main(["--data", file, "--out", str(tmp_path / "b.npz")])
  told = capsys.readouterr().out
  assert "nothing to add" in told and why in told
  assert not (tmp_path / "b.npz").exists()
  told = failed(capsys, fid_reference, "--data", file, "--size", 4)
  assert "--size=4" in told and "statistics" in told


def broken(tmp_path):
  """{what is wrong: (path of samples, words that the error holds)}."""
  images = draw(0, 5)
  root = {name: tmp_path / name for name in ("empty", "unequal", "rotten")}
  root["empty"].mkdir()
  for name in ("unequal", "rotten"):
    write_folder(root[name], images)
  write_png(root["unequal"] / "tall.png", draw(0, 1, 8)[0, :, :4])
  (root["rotten"] / "r.png").write_bytes(b"no image")
  (tmp_path / "text.npz").write_text("no npz")
  whole = Path(save(tmp_path / "whole.npz", images)).read_bytes()
  (tmp_path / "cut.npz").write_bytes(whole[:-300])
  other = dict(mu=np.zeros(7), sigma=np.eye(7))
  return {
    "nowhere": (tmp_path / "nowhere", ["nowhere", "no such file or folder"]),
    "text": (tmp_path / "text.npz", ["text.npz", "not readable as npz"]),
    "cut": (tmp_path / "cut.npz", ["cut.npz", "not readable as npz"]),
    "keys": (save(tmp_path / "k.npz", pictures=images), ["k.npz", "['pictures']", "'arr_0'"]),
    "float": (save(tmp_path / "f.npz", images / 255), ["f.npz", "float32", "Store uint8"]),
    "rank": (save(tmp_path / "h.npz", images[..., 0]), ["h.npz", "[5, 8, 8]", "[n, H, W, C]"]),
    "channels": (save(tmp_path / "c.npz", images[..., :2]), ["c.npz", "2 channels", "1 or 3"]),
    "one": (save(tmp_path / "o.npz", images[:1]), ["o.npz", "1 images", "at least 2"]),
    "network": (save(tmp_path / "n.npz", **other), ["n.npz", "[7, 7]", "64"]),
    "no sigma": (save(tmp_path / "m.npz", mu=np.zeros(POOL)), ["m.npz", "sigma"]),
    "empty": (root["empty"], ["empty", "no images"]),
    "unequal": (root["unequal"], ["unequal", "tall.png", "8 x 4", "8 x 8", "--size N"]),
    "rotten": (root["rotten"], ["r.png", "not readable"]),
    "no split": ("tfds:cifar10", ["tfds:cifar10", "no split", "tfds:NAME:SPLIT"]),
  }


@pytest.mark.parametrize(
  "what",
  [
    *("nowhere", "text", "cut", "keys", "float", "rank", "channels", "one", "network", "no sigma"),
    *("empty", "unequal", "rotten", "no split"),
  ],
)
def test_broken_input_is_one_error_that_names_it(what, tmp_path, capsys):
  path, words = broken(tmp_path)[what]
  good = save(tmp_path / "good.npz", draw(1))
  for tool, args in (
    (evaluate_samples, (path, good)),
    (evaluate_samples, (good, path)),
    (fid_reference, ("--data", path, "--out", tmp_path / "out.npz")),
  ):
    told = failed(capsys, tool, *args)
    for word in words:
      assert word in told
  assert not (tmp_path / "out.npz").exists()


def test_features_of_two_networks_are_not_mixed(tmp_path, capsys):
  made = make_reference(save(tmp_path / "i.npz", draw(0)), tmp_path / "made.npz")
  reference = save(tmp_path / "r.npz", **made | {"inception": np.array("77" * 32)})
  told = failed(capsys, evaluate_samples, save(tmp_path / "s.npz", draw(1)), reference)
  assert "7777" in told and SHA[:12] in told
  del made["features"]
  reference = save(tmp_path / "q.npz", **made | {"inception": np.array("77" * 32)})
  told = failed(capsys, fid_reference, "--data", reference, "--out", tmp_path / "out.npz")
  assert "7777" in told and SHA[:12] in told


def test_a_place_that_cannot_be_written_is_an_error_before_the_work(tmp_path, capsys, projection):
  data = save(tmp_path / "i.npz", draw(0, 6))
  for tool, args in ((evaluate_samples, (data, data)), (fid_reference, ("--data", data))):
    assert "is a folder" in failed(capsys, tool, *args, "--out", tmp_path)
    assert "i.npz" in failed(capsys, tool, *args, "--out", tmp_path / "i.npz" / "x")
  assert projection == []


@pytest.mark.parametrize(
  "data, name, split",
  [
    ("tfds:cifar10:train", "tfds:cifar10", "train"),
    ("tfds:cifar10:3.0.2:test", "tfds:cifar10:3.0.2", "test"),
    ("tfds:imagenet_resized/64x64:train", "tfds:imagenet_resized/64x64", "train"),
    ("tfds:a:train[:10%]+test[5:-2]", "tfds:a", "train[:10%]+test[5:-2]"),
    ("folder:{0}", "folder:{0}", "all"),
    ("folder:{0}:val", "folder:{0}", "val"),
    ("folder:{0}/with:colon", "folder:{0}/with:colon", "all"),
    ("npz:{0}/a.npz:all[:5]", "npz:{0}/a.npz", "all[:5]"),
    ("{0}/a.npz", "npz:{0}/a.npz", "all"),
    ("{0}", "folder:{0}", "all"),
  ],
)
def test_data_are_named_with_and_without_their_kind_and_split(data, name, split, tmp_path):
  (tmp_path / "with:colon").mkdir()
  (tmp_path / "a.npz").touch()
  assert locate(data.format(tmp_path)) == (name.format(tmp_path), split)


@pytest.mark.slow
def test_a_reference_is_made_with_the_network_of_the_file_of_weights(tmp_path, monkeypatch):
  """With the network itself: random weights, but found, checked, read and placed as real ones."""
  monkeypatch.undo()  # The projection.
  rng, tensors = np.random.default_rng(0), {}
  for layer, parts in flatten_dict(inception.SHAPES, is_leaf=lambda _, x: "kernel" in x).items():
    *kernel, width = parts["kernel"]
    values = rng.normal(0, np.sqrt(2 / np.prod(kernel)), parts["kernel"]).astype(np.float32)
    name = ".".join(layer)
    if name == "fc":
      tensors["fc.weight"] = values.T
      continue
    tensors[f"{name}.conv.weight"] = values.transpose(3, 2, 0, 1)
    for part in ("weight", "bias", "running_mean", "running_var"):
      ones = part in ("weight", "running_var")
      tensors[f"{name}.bn.{part}"] = np.full(width, float(ones), np.float32)
  file = tmp_path / "weights.pth"
  file.write_bytes(rng.bytes(1000))
  sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
  published = dataclasses.replace(download.INCEPTION, sha256=sha256, size=1000)
  monkeypatch.setattr(download, "INCEPTION", published)
  monkeypatch.setattr(pytorch, "read", lambda path: tensors)
  folder, given = write_folder(tmp_path / "i", draw(0, 5)), ["--weights", str(file)]
  made = make_reference(folder, tmp_path / "r.npz", *given)
  network = {"params": inception.from_torch(tensors)}
  images = jnp.asarray(made["arr_0"][:2], jnp.float32)
  pool = jax.jit(inception.Inception().apply)(network, images)["pool"]
  np.testing.assert_allclose(made["features"][:2], pool, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(made["mu"], made["features"].mean(axis=0), rtol=1e-5, atol=1e-6)
  assert made["mu"].std() > 0.01 and made["inception"] == sha256


ADM = {
  "is_50k": (215.8370361328125, {"rel": 1e-3}),
  "fid_50k": (3.9425574129223264, {"rel": 2e-3}),
  "sfid_50k": (6.140433703346162, {"rel": 2e-3}),
  "precision_50k": (0.8265, {"abs": 2e-3}),
  "recall_50k": (0.5309, {"abs": 2e-3}),
}


@pytest.mark.slow
def test_values_are_those_that_adm_publishes(tmp_path):
  """Its README's five numbers of admnet_guided_upsampled_imagenet256.npz; wants an accelerator."""
  files = [os.environ.get(name) for name in ("UMD_ADM_SAMPLES", "UMD_ADM_REFERENCE")]
  if not all(files):
    pytest.skip(
      "set UMD_ADM_SAMPLES and UMD_ADM_REFERENCE to admnet_guided_upsampled_imagenet256.npz and "
      "VIRTUAL_imagenet256_labeled.npz (and UMD_INCEPTION to the weights unless they are in the "
      "cache)"
    )
  chosen = ["--metrics", "is", "fid", "sfid", "precision_recall", "--batch_size", "256"]
  download = ["--weights", os.environ.get("UMD_INCEPTION", "")]
  out = tmp_path / "results.json"
  command = [sys.executable, "-m", "tools.evaluate_samples", *files, "--out", str(out)]
  virtual = ("JAX_PLATFORMS", "XLA_FLAGS", "NPROC")  # Of the test session, see conftest.py.
  environment = {k: v for k, v in os.environ.items() if k not in virtual}
  subprocess.run([*command, *chosen, *download], cwd=ROOT, env=environment, check=True)
  found = json.loads(out.read_text())["metrics"]
  for name, (value, tolerance) in ADM.items():
    assert found[name] == pytest.approx(value, **tolerance), name

"""Files of statistics as others write them, and metrics of sets whose features are given."""

import dataclasses

import numpy as np
import pytest

from umd.metrics import frechet, pairwise, statistics
from umd.metrics.inception import LOGITS, POOL, SPATIAL
from umd.metrics.statistics import Gaussian, Statistics

RNG = np.random.default_rng(0)


def gaussian(size, scale=1.0):
  """A mean and a diagonal covariance of low rank: distances have a closed form, and are quick."""
  variance = np.where(np.arange(size) < 50, RNG.uniform(0.5, 2, size), 0)
  return Gaussian(scale * RNG.standard_normal(size), np.diag(scale * variance))


SAMPLES = Statistics(
  "samples",
  40,
  gaussian(POOL),
  gaussian(SPATIAL),
  RNG.standard_normal((40, POOL)).astype(np.float32),
  inception="abc",
)
REFERENCE = Statistics(
  "real",
  30,
  gaussian(POOL),
  gaussian(SPATIAL),
  1.1 * RNG.standard_normal((30, POOL)).astype(np.float32),
  inception="abc",
)


def scored(n=40):
  logits = RNG.standard_normal((n, LOGITS)).astype(np.float32)
  scores = {s: frechet.Scores(n, LOGITS, s) for s in frechet.SPLITTINGS if n >= frechet.LEAST[s]}
  for s in scores.values():
    s.update(logits, np.arange(n))
  return dataclasses.replace(SAMPLES, count=n, scores=scores), logits


def closed_form(a, b):
  spread = np.sqrt(np.diag(a.sigma)) - np.sqrt(np.diag(b.sigma))
  return np.sum((a.mu - b.mu) ** 2) + np.sum(spread**2)


def test_the_metrics_compare_what_their_names_say():
  samples, logits = scored()
  found = statistics.compare(samples, REFERENCE, [*statistics.METRICS])
  assert found["fid"] == pytest.approx(closed_form(samples.pool, REFERENCE.pool), rel=1e-6)
  assert found["sfid"] == pytest.approx(closed_form(samples.spatial, REFERENCE.spatial), rel=1e-6)
  probs = np.exp(logits.astype(np.float64))
  probs /= probs.sum(axis=1, keepdims=True)
  assert found["is"] == pytest.approx(frechet.inception_score(probs), rel=1e-6)
  assert found["is_std"] == 0 < found["is_shuffled_std"]
  # Precision is the share of samples near the reference; the reference lies wider.
  precision, recall = fid_precision_recall(REFERENCE.features, samples.features)
  assert (found["precision"], found["recall"]) == pytest.approx((precision, recall))
  kid = pairwise.kernel_distance(samples.features, REFERENCE.features, subset_size=30)
  assert (found["kid"], found["kid_std"]) == pytest.approx(kid)
  assert list(found) == [name for m in statistics.METRICS.values() for name in m.names]


def fid_precision_recall(reference, samples, k=3):
  distance = lambda a, b: ((a[:, None].astype(np.float64) - b) ** 2).sum(axis=2)
  radius = lambda a: np.sort(distance(a, a), axis=1)[:, k]
  between = distance(reference, samples)
  precision = (between <= radius(reference)[:, None]).any(axis=0).mean()
  return precision, (between <= radius(samples)).any(axis=1).mean()


def test_a_file_gives_back_what_was_written(tmp_path):
  path = str(tmp_path / "deep" / "real.npz")
  images = RNG.integers(0, 256, (3, 4, 4, 3), np.uint8)
  statistics.write(path, REFERENCE, images)
  found = statistics.read(path)
  assert (found.name, found.count, found.inception) == ("real", 30, "abc")
  for part in ("pool", "spatial"):
    for a, b in zip(getattr(found, part), getattr(REFERENCE, part), strict=True):
      np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(found.features, REFERENCE.features)
  with np.load(path) as arrays:
    np.testing.assert_array_equal(arrays["arr_0"], images)
  assert [p.name for p in (tmp_path / "deep").iterdir()] == ["real.npz"]


@pytest.mark.parametrize("spatial", [True, False])
def test_files_of_adms_evaluator_and_of_pytorch_fid_are_read(tmp_path, spatial):
  arrays = {"mu": REFERENCE.pool.mu, "sigma": REFERENCE.pool.sigma}
  if spatial:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    arrays |= {"arr_0": images, "mu_s": REFERENCE.spatial.mu, "sigma_s": REFERENCE.spatial.sigma}
  np.savez(tmp_path / "theirs.npz", **arrays)
  found = statistics.read(str(tmp_path / "theirs.npz"))
  assert (found.count, found.inception, found.features) == (0, "", None)
  assert statistics.possible(found) == ["fid", *["sfid"] * spatial, "is", "is_shuffled"]
  expected = closed_form(SAMPLES.pool, REFERENCE.pool)
  assert statistics.compare(SAMPLES, found, ["fid"])["fid"] == pytest.approx(expected, rel=1e-6)
  with pytest.raises(ValueError, match=r"'theirs' cannot serve \['kid'\].*features"):
    statistics.compare(SAMPLES, found, ["fid", "kid"])


def test_a_file_of_images_holds_no_statistics(tmp_path):
  np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8))
  assert not statistics.is_statistics(str(tmp_path / "images.npz"))
  with pytest.raises(ValueError, match=r"arr_0.*no statistics.*tools\.fid_reference"):
    statistics.read(str(tmp_path / "images.npz"))


@pytest.mark.parametrize(
  "arrays, told",
  [
    ({"mu": np.zeros(768), "sigma": np.eye(768)}, r"mu is \[768\].* 2048 .*other networks"),
    ({"mu": np.zeros(POOL), "sigma": np.eye(5)}, r"sigma \[5, 5\]"),
    ({"mu": np.full(POOL, np.nan), "sigma": np.eye(POOL)}, "not finite"),
    (
      {"mu": np.zeros(POOL), "sigma": np.eye(POOL), "mu_s": np.zeros(9), "sigma_s": np.eye(9)},
      r"mu_s is \[9\].* 2023 ",
    ),
    (
      {"mu": np.zeros(POOL), "sigma": np.eye(POOL), "features": np.zeros((3, 7))},
      r"features are \[3, 7\]",
    ),
  ],
)
def test_statistics_of_something_else_are_an_error(tmp_path, arrays, told):
  np.savez(tmp_path / "odd.npz", **arrays)
  with pytest.raises(ValueError, match=told):
    statistics.read(str(tmp_path / "odd.npz"))


def test_files_that_are_missing_or_damaged_are_errors(tmp_path):
  path = tmp_path / "a.npz"
  with pytest.raises(FileNotFoundError, match=r"a\.npz.*no such file"):
    statistics.read(str(path))
  path.write_text("no zip")
  with pytest.raises(ValueError, match=r"a\.npz.*not readable as npz"):
    statistics.read(str(path))
  statistics.write(str(path), REFERENCE)
  contents = bytearray(path.read_bytes())
  contents[len(contents) // 2] ^= 1
  path.write_bytes(contents)
  with pytest.raises(ValueError, match=r"a\.npz.*damaged"):
    statistics.read(str(path))
  path.write_bytes(contents[: len(contents) // 2])
  with pytest.raises(ValueError, match=r"a\.npz.*not readable as npz"):
    statistics.read(str(path))


def test_statistics_of_other_weights_are_not_compared():
  other = dataclasses.replace(REFERENCE, inception="xyz")
  with pytest.raises(ValueError, match=r"'real' was made with other Inception weights.*xyz.*abc"):
    statistics.compare(SAMPLES, other, ["fid"])
  unknown = dataclasses.replace(REFERENCE, inception="")  # ADM's files do not say.
  assert statistics.compare(SAMPLES, unknown, ["fid"])


@pytest.mark.parametrize(
  "metric, least", [("is_shuffled", 10), ("precision_recall", 4), ("fid", 2)]
)
def test_too_few_samples_for_a_metric_are_an_error(metric, least):
  statistics.check([metric], least)
  with pytest.raises(ValueError, match=rf"num={least - 1}: metric '{metric}' takes .* {least} "):
    statistics.check([metric], least - 1)
  with pytest.raises(ValueError, match=f"metric '{metric}'"):
    statistics.compare(scored(least - 1)[0], REFERENCE, [metric])


@pytest.mark.parametrize(
  "num, text",
  [(50_000, "50k"), (10_000, "10k"), (1000, "1k"), (2048, "2048"), (30, "30"), (10_240, "10240")],
)
def test_numbers_of_samples_are_written_as_papers_do(num, text):
  assert statistics.label(num) == text

"""Statistics of sets of images, against the same images taken all at once."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from stand_ins import free_port
from xla_flags import QUICK

from umd.data import from_arrays, load
from umd.devices.mesh import make_mesh
from umd.metrics import features, frechet

ROOT = Path(__file__).resolve().parents[2]
LEVELS = np.random.default_rng(0).integers(0, 256, (37, 4, 5, 3), np.uint8)
SOURCE = from_arrays("noise", LEVELS, None, 0, "value_range(-1, 1)")


def describe(source=SOURCE, devices=4, batch_size=8, **settings):
  mesh = make_mesh(jax.devices()[:devices])
  network = features.load_network("", mesh)
  return features.describe(source, network, mesh, batch_size, **settings)


def scores(logits, splits):
  """By loops over splits, from probabilities."""
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(axis=1, keepdims=True)
  return [frechet.inception_score(p[ids]) for ids in splits]


@pytest.mark.parametrize("devices, batch_size", [(1, 1), (4, 8), (4, 40), (2, 37 * 2)])
def test_statistics_are_those_of_all_images_at_once(small_inception, devices, batch_size):
  """Whatever the batch, of which the last is not full, and the number of devices."""
  found, rows = (
    describe(devices=devices, batch_size=batch_size, scores=True),
    small_inception(LEVELS),
  )
  for part in ("pool", "spatial"):
    mu, sigma = getattr(found, part)
    np.testing.assert_allclose(mu, rows[part].mean(axis=0, dtype=np.float64), atol=1e-6)
    np.testing.assert_allclose(sigma, np.cov(rows[part], rowvar=False), atol=1e-6)
  assert (found.name, found.count, found.inception) == ("noise", 37, "5eed")
  [only] = scores(rows["logits"], [range(37)])
  assert found.scores["adm"].mean == pytest.approx(only, rel=1e-6)
  order = np.random.RandomState(2020).permutation(37)
  ten = scores(rows["logits"], [order[i * 37 // 10 : (i + 1) * 37 // 10] for i in range(10)])
  assert found.scores["torch-fidelity"].mean == pytest.approx(np.mean(ten), rel=1e-6)
  assert found.scores["torch-fidelity"].std == pytest.approx(np.std(ten), rel=1e-4)


@pytest.mark.parametrize("keep, which", [(0, []), (5, [0, 7, 14, 22, 29]), (99, range(37))])
def test_features_are_kept_of_images_spread_over_all(small_inception, keep, which):
  found = describe(keep=keep).features
  if not keep:
    assert found is None
  else:
    expected = small_inception(LEVELS[list(which)])["pool"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_grey_images_are_seen_as_three_equal_channels(small_inception):
  grey = from_arrays("grey", LEVELS[..., :1], None, 0, "value_range(-1, 1)")
  three = from_arrays("three", LEVELS[..., :1].repeat(3, axis=3), None, 0, "value_range(-1, 1)")
  np.testing.assert_array_equal(describe(grey).pool.sigma, describe(three).pool.sigma)


def test_images_that_cannot_be_described_are_errors(small_inception):
  for images, told in [
    (LEVELS[:1], "has 1 images"),
    (np.zeros((3, 2, 2, 4), np.uint8), "of 4 channels"),
  ]:
    with pytest.raises(ValueError, match=told):
      describe(from_arrays("odd", images, None, 0, "value_range(-1, 1)"))


def test_images_that_never_come_are_an_error():
  gather = features.Gatherer("cats", 3, "")
  row = {"pool": np.zeros((1, 2048)), "spatial": np.zeros((1, 2023)), "logits": np.zeros((1, 1008))}
  gather(row, np.array([1]))
  with pytest.raises(ValueError, match="cats: 1 of 3"):
    gather.statistics()


def test_the_fingerprint_changes_with_images_preprocessing_and_network():
  network, other = (features.LoadedInception({}, sha) for sha in ("a", "b"))
  whole = lambda images, pp="value_range(-1, 1)": from_arrays("x", images, None, 0, pp)
  prints = [
    features.fingerprint(SOURCE, network),
    features.fingerprint(SOURCE, other),
    features.fingerprint(whole(LEVELS[:-1]), network),
    features.fingerprint(whole(255 - LEVELS), network),
    features.fingerprint(whole(LEVELS, "flip_lr|value_range(-1, 1)"), network),
    features.fingerprint(load("digits", "train"), network),
    features.fingerprint(load("digits", "test"), network),
  ]
  assert len(set(prints)) == len(prints)
  assert features.fingerprint(whole(LEVELS), network) == prints[0]  # The name does not count.


def test_the_fingerprint_of_files_changes_when_one_is_written_again(tmp_path):
  import tensorflow as tf

  from umd.data.folder import folder

  for name, level in (("a", 0), ("b", 9)):
    png = tf.io.encode_png(np.full((4, 4, 3), level, np.uint8)).numpy()
    (tmp_path / f"{name}.png").write_bytes(png)
  first = folder(str(tmp_path), "all").fingerprint()
  assert folder(str(tmp_path), "all").fingerprint() == first
  os.utime(tmp_path / "a.png", (1, 1))
  assert folder(str(tmp_path), "all").fingerprint() != first


PROCESS = """
import sys
from umd.devices import distributed
distributed.start(sys.argv[1], 2, int(sys.argv[2]))
import jax
import numpy as np
import stand_ins
import test_features
from umd.devices.mesh import all_agree

stand_ins.small_inception(setattr)
found = test_features.describe(devices=2, keep=11, scores=True)
assert all_agree(True) and not all_agree(jax.process_index() == 0)
means = [found.scores[s].mean for s in ("adm", "torch-fidelity")]
parts = dict(mu=found.pool.mu, sigma=found.spatial.sigma, features=found.features)
np.savez(sys.argv[3], scores=means, **parts)
"""


def test_two_processes_describe_what_one_does(small_inception, tmp_path):
  """Each takes the rows of its own device; both end up with all of it, in float64."""
  environ = {**os.environ, "XLA_FLAGS": QUICK}
  environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/metrics")]
  )
  address = f"127.0.0.1:{free_port()}"
  outs = [tmp_path / f"{i}.npz" for i in range(2)]
  running = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(i), str(out)], cwd=ROOT, env=environ
    )
    for i, out in enumerate(outs)
  ]
  try:
    assert [p.wait(120) for p in running] == [0, 0]
  finally:
    for p in running:
      p.kill()
  one = describe(keep=11, scores=True)
  expected = {
    "mu": one.pool.mu,
    "sigma": one.spatial.sigma,
    "features": one.features,
    "scores": [one.scores[s].mean for s in ("adm", "torch-fidelity")],
  }
  for path in outs:
    with np.load(path) as found:
      for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=name)

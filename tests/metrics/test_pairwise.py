"""Precision, recall and kernel distance against loops, torch-fidelity and known answers."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from umd.metrics import pairwise
from umd.metrics.pairwise import kernel_distance, precision_recall


def draw(n, d=8, seed=0, shift=0.0, scale=1.0):
  rows = shift + scale * np.random.default_rng(seed).standard_normal((n, d))
  return rows.astype(np.float32)


def direct_precision_recall(reference, samples, k):
  """By differences in float64, one example after another."""
  reference, samples = np.float64(reference), np.float64(samples)
  squared = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(axis=2)
  radii = lambda x: np.sort(squared(x, x), axis=1)[:, k]  # At 0 comes the point itself.
  share = lambda x, of: np.mean([(row <= radii(of)).any() for row in squared(x, of)])
  return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize(
  "n, m, k, block", [(40, 33, 3, 2048), (40, 33, 3, 7), (40, 33, 1, 2048), (6, 50, 5, 3)]
)
def test_precision_and_recall_are_those_of_a_loop_whatever_the_blocks(n, m, k, block):
  reference, samples = draw(n), draw(m, seed=1, shift=0.5, scale=0.8)
  found = precision_recall(reference, samples, k, block=block)
  assert found == pytest.approx(direct_precision_recall(reference, samples, k), abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -3e4])
def test_far_from_zero_distances_keep_their_digits(offset):
  reference, samples = draw(40) + np.float32(offset), draw(33, seed=1, scale=0.8) + offset
  found = precision_recall(reference, samples.astype(np.float32))
  expected = direct_precision_recall(reference, samples.astype(np.float32), 3)
  assert found == pytest.approx(expected, abs=1e-12)


def test_points_in_no_ball_and_in_all():
  near, far = draw(20), draw(20, seed=1) + 100
  assert precision_recall(near, far) == (0.0, 0.0)
  assert precision_recall(near, near) == (1.0, 1.0)
  # Samples at one spot of the data are all precise; their own balls hold next to nothing.
  spot = near[:1] + 1e-3 * draw(20, seed=2)
  precision, recall = precision_recall(near, spot)
  assert precision == 1.0
  assert recall <= 1 / 20


@pytest.mark.parametrize("block", [4, 2048])
def test_equal_examples_are_at_distance_zero(block):
  """With more copies than k the radius is 0, and the copies themselves are in it."""
  copies, others = np.repeat(draw(3, d=300), 5, axis=0), 50 + draw(6, d=300, seed=1)
  samples = np.concatenate([copies[:9], others])
  expected = direct_precision_recall(copies, samples, 3)
  assert expected == (9 / 15, 10 / 15)
  assert precision_recall(copies, samples, 3, block=block) == pytest.approx(expected)


def test_rounding_does_not_tell_equal_examples_apart():
  rows = draw(40, d=2048) + 1
  norms = (rows.astype(np.longdouble) ** 2).sum(axis=1).astype(np.float32)
  rows, norms = jnp.asarray(rows), jnp.asarray(norms)
  found = np.asarray(pairwise._squared_distances(rows, norms, rows, norms))
  np.testing.assert_array_equal(found == 0, np.eye(40, dtype=bool))


@pytest.mark.parametrize("seed", range(5))
def test_ties_count_as_inside(seed):
  """Whole numbers, far from zero, on a small grid: many distances are equal."""
  rng = np.random.default_rng(seed)
  reference, samples = (100 + rng.integers(0, 6, (n, 3)).astype(np.float32) for n in (30, 25))
  expected = direct_precision_recall(reference, samples, 2)
  assert precision_recall(reference, samples, 2, block=8) == pytest.approx(expected)


@pytest.fixture
def fidelity():
  """(torch, a module of torch-fidelity by its name), where they are installed."""
  torch = pytest.importorskip("torch", reason="torch is in no requirements: parity only")

  def find(name):
    try:
      return importlib.import_module(f"torch_fidelity.{name}")
    except (ImportError, RuntimeError) as error:  # The latter of a torchvision for another torch.
      pytest.skip(f"torch-fidelity is in no requirements: {error}")

  return torch, find


def test_torch_fidelity_finds_the_same_precision_and_recall(fidelity):
  torch, prc = fidelity[0], fidelity[1]("metric_prc")
  reference, samples = draw(300, d=64), draw(250, d=64, seed=1, shift=0.2, scale=0.9)
  theirs = prc.prc_features_to_metric(
    *(torch.from_numpy(x) for x in (samples, reference)), verbose=False
  )
  found = precision_recall(reference, samples)
  assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
  assert 0.1 < min(found) < max(found) < 1


@pytest.mark.parametrize(
  "n, m, k, match",
  [
    (3, 9, 3, "reference: 3 examples, but k=3"),
    (9, 2, 3, "samples: 2 examples, but k=3"),
    (9, 9, 0, "k=0 needs k >= 1"),
  ],
)
def test_sets_without_k_neighbours_are_an_error(n, m, k, match):
  with pytest.raises(ValueError, match=match):
    precision_recall(draw(n), draw(m), k)


def test_features_of_other_networks_or_not_finite_are_an_error():
  with pytest.raises(ValueError, match="reference has 8 features, samples 5"):
    precision_recall(draw(9), draw(9, d=5))
  bad = draw(9)
  bad[4, 2] = np.nan
  with pytest.raises(ValueError, match="samples: features are not finite"):
    precision_recall(draw(9), bad)
  with pytest.raises(ValueError, match="x has 8 features, y 5"):
    kernel_distance(draw(9), draw(9, d=5), subset_size=4)


def direct_mmd(x, y, degree, gamma, coef0):
  """The unbiased estimate of MMD^2, pair by pair, in float64."""
  kernel = lambda a, b: (gamma * float(np.dot(a, b)) + coef0) ** degree
  x, y, n = np.float64(x), np.float64(y), len(x)
  within = lambda s: sum(kernel(s[i], s[j]) for i in range(n) for j in range(n) if i != j)
  between = sum(kernel(a, b) for a in x for b in y)
  return (within(x) + within(y)) / (n * (n - 1)) - 2 * between / n**2


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
  "options", [{}, {"degree": 2}, {"gamma": 0.3, "coef0": 0.5}, {"seed": 7, "subset_size": 20}]
)
def test_kernel_distance_is_the_mean_over_subsets_of_a_loop(options, dtype):
  x, y = draw(20).astype(dtype), draw(25, seed=1, shift=0.3).astype(dtype)
  options = {"subsets": 3, "subset_size": 9, **options}
  kernel = {"degree": 3, "gamma": 1 / 8, "coef0": 1.0, **options}
  rng, expected = np.random.RandomState(kernel.pop("seed", 2020)), []
  subsets, size = kernel.pop("subsets"), kernel.pop("subset_size")
  for _ in range(subsets):
    a, b = rng.choice(20, size, replace=False), rng.choice(25, size, replace=False)
    expected.append(direct_mmd(x[a], y[b], **kernel))
  rel = 1e-10 if dtype == np.float64 else 1e-4
  found = kernel_distance(x, y, **options)
  assert found == pytest.approx((np.mean(expected), np.std(expected)), rel=rel, abs=1e-6)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
  """Unbiased: of either sign, while the biased estimate would be far above its deviation."""
  found = [kernel_distance(draw(50, seed=s), draw(50, seed=s + 99), subsets=4, subset_size=50)[0]
           for s in range(40)]  # fmt: skip
  assert min(found) < 0 < max(found)
  assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))
  shifted, _ = kernel_distance(draw(50), draw(50, seed=1, shift=1.0), subsets=4, subset_size=50)
  assert shifted > 10 * max(found)


def test_torch_fidelity_finds_the_same_kernel_distance(fidelity):
  torch, kid = fidelity[0], fidelity[1]("metric_kid")
  x, y = np.abs(draw(150, d=64)), np.abs(draw(130, d=64, seed=1, scale=1.2))
  theirs = kid.kid_features_to_metric(
    *(torch.from_numpy(s) for s in (x, y)), kid_subsets=10, kid_subset_size=50, verbose=False
  )
  found = kernel_distance(x, y, subsets=10, subset_size=50)
  names = ("kernel_inception_distance_mean", "kernel_inception_distance_std")
  assert found == pytest.approx([theirs[name] for name in names], abs=1e-6)
  assert found[0] > 1e-3


@pytest.mark.parametrize(
  "options", [{}, {"subset_size": 31}, {"subset_size": 1}, {"subset_size": 9, "subsets": 0}]
)
def test_subsets_that_cannot_be_drawn_are_an_error(options):
  with pytest.raises(ValueError, match=r"x of 40 and y of 30.*2 <= subset_size <= 30"):
    kernel_distance(draw(40), draw(30, seed=1), **options)

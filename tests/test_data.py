"""Data: what the digits are, and the order in which batches bring examples."""

import itertools

import numpy as np
import pytest

from umd.data import Source, eval_batches, load, train_batches

SPLITS = ("train", "test")


def numbered(n):
  """A source whose images and labels both tell the example's number, which is never 0."""
  number = np.arange(1, n + 1)
  images = number[:, None, None, None] / 256 * np.ones((1, 2, 3, 1))
  return Source("numbered", images.astype(np.float32), number.astype(np.int32), n + 1)


def batches(n, size, count, **settings):
  """The first `count` batches of the numbered source, seed 0 unless told otherwise."""
  stream = train_batches(numbered(n), size, **{"seed": 0, **settings})
  return list(itertools.islice(stream, count))


def order(n, size, count, **settings):
  """The numbers of the examples, batch after batch."""
  return np.concatenate([b["label"] for b in batches(n, size, count, **settings)])


def rows(source):
  """Every image as bytes, to be put in sets."""
  return [image.tobytes() for image in source.images]


def test_digits_are_1797_images_in_two_disjoint_splits():
  train, test = (load("digits", split) for split in SPLITS)
  assert len(train) + len(test) == 1797
  assert not set(rows(train)) & set(rows(test))
  assert train.image_size == test.image_size == (8, 8, 1)
  assert train.num_classes == test.num_classes == 10


def test_digits_keep_the_pairs_of_image_and_label():
  from sklearn.datasets import load_digits

  bunch = load_digits()
  pixels = (bunch.images / 16 * 2 - 1).astype(np.float32)
  label_of = dict(zip([p.tobytes() for p in pixels], bunch.target, strict=True))
  for split in SPLITS:
    source = load("digits", split)
    assert [label_of[row] for row in rows(source)] == source.labels.tolist()


def test_digits_test_split_holds_a_fifth_of_every_class():
  train, test = (load("digits", split) for split in SPLITS)
  for c in range(10):
    held, rest = (test.labels == c).sum(), (train.labels == c).sum()
    assert abs(held - 0.2 * (held + rest)) < 1


@pytest.mark.parametrize("split", SPLITS)
def test_digits_fill_the_range_and_are_the_same_on_each_load(split):
  first, again = load("digits", split), load("digits", split)
  assert (first.images.min(), first.images.max()) == (-1, 1)
  assert first.images.dtype == np.float32
  assert first.labels.dtype == np.int32
  np.testing.assert_array_equal(first.images, again.images)
  np.testing.assert_array_equal(first.labels, again.labels)


@pytest.mark.parametrize(
  "name, split, needed", [("imagenett", "train", ["digits"]), ("digits", "val", list(SPLITS))]
)
def test_unknown_data_is_an_error_that_names_value_and_known_ones(name, split, needed):
  with pytest.raises(ValueError) as error:
    load(name, split)
  wrong = name if name != "digits" else split
  for word in [wrong, *needed]:
    assert word in str(error.value)


def test_a_source_without_images_is_an_error_that_names_it():
  with pytest.raises(ValueError, match="hollow"):
    Source("hollow", np.zeros((0, 2, 2, 1), np.float32), np.zeros(0, np.int32), 2)


# Sizes around and above that of the set: batches span epochs, or hold several.
@pytest.mark.parametrize("n, size", [(12, 4), (10, 4), (7, 3), (5, 8), (1, 2)])
def test_every_epoch_is_a_permutation(n, size):
  epochs = 6
  numbers = order(n, size, -(-epochs * n // size))[: epochs * n].reshape(epochs, n)
  np.testing.assert_array_equal(np.sort(numbers), np.tile(np.arange(1, n + 1), (epochs, 1)))


def test_order_differs_between_epochs_and_between_seeds():
  epochs = order(50, 25, 8).reshape(4, 50)
  other = order(50, 25, 8, seed=1).reshape(4, 50)
  assert len(np.unique(np.concatenate([epochs, other]), axis=0)) == 8


@pytest.mark.parametrize("seed", [0, 1])
def test_epochs_are_as_unrelated_as_random_permutations(seed):
  n, epochs = 1000, 40
  drawn = order(n, n, epochs, seed=seed).reshape(epochs, n)
  pairs = itertools.combinations(drawn, 2)
  # Two random permutations agree on 1 place on average.
  assert np.mean([(a == b).sum() for a, b in pairs]) < 1.5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [1000, 1_000_000])
def test_neighbours_in_the_order_are_unrelated(n, seed):
  steps = np.diff(order(n, 1000, 1, seed=seed)) % n
  expected = len(steps) / 10
  counts = np.bincount(steps * 10 // n, minlength=10)
  # Chi-square with 9 degrees of freedom: beyond 33.7 once in 10,000 random orders.
  assert np.square(counts - expected).sum() / expected < 33.7


def test_order_is_a_function_of_the_seed_and_not_of_the_batch_size():
  expected = order(10, 4, 10)
  np.testing.assert_array_equal(order(10, 4, 10), expected)
  np.testing.assert_array_equal(order(10, 8, 5), expected)


@pytest.mark.parametrize("start", [1, 5, 40])
def test_starting_at_a_step_gives_the_batches_of_a_run_from_zero(start):
  whole, resumed = batches(10, 4, start + 6), batches(10, 4, 6, start_step=start)
  for expected, batch in zip(whole[start:], resumed, strict=True):
    for key in ("image", "label"):
      np.testing.assert_array_equal(batch[key], expected[key])


@pytest.mark.parametrize("n", [12, 10, 5])
def test_processes_together_read_the_batches_of_one(n):
  one = batches(n, 6, 5)
  parts = [batches(n, 6, 5, process_index=i, process_count=2) for i in range(2)]
  for whole, *shares in zip(one, *parts, strict=True):
    assert [len(share["label"]) for share in shares] == [3, 3]
    for key in ("image", "label"):
      np.testing.assert_array_equal(np.concatenate([s[key] for s in shares]), whole[key])


def test_train_batches_keep_the_pairs_of_image_and_label():
  for batch in batches(10, 4, 5):
    expected = np.broadcast_to(batch["label"][:, None, None, None] / 256, (4, 2, 3, 1))
    np.testing.assert_array_equal(batch["image"], expected)
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32


def evaluated(n, size, processes):
  """The processes' rows side by side: [{image, label, index, _mask}] by batch."""
  source = numbered(n)
  shares = [
    eval_batches(source, size, process_index=i, process_count=processes) for i in range(processes)
  ]
  joined = []
  for parts in zip(*shares, strict=True):
    assert {len(p["label"]) for p in parts} == {size // processes}
    joined.append({k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
  return joined


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("n, size", [(12, 4), (10, 4), (7, 2), (9, 8), (5, 16), (1, 2)])
def test_evaluation_reads_every_example_once_in_order_and_marks_filling(n, size, processes):
  found = evaluated(n, size, processes)
  assert len(found) == -(-n // size)
  whole = {k: np.concatenate([b[k] for b in found]) for k in found[0]}
  np.testing.assert_array_equal(whole["index"], np.arange(len(whole["index"])))
  np.testing.assert_array_equal(whole["_mask"], (whole["index"] < n).astype(np.float32))
  np.testing.assert_array_equal(whole["label"][:n], np.arange(1, n + 1))
  np.testing.assert_array_equal(whole["image"][:n], numbered(n).images)
  assert not whole["label"][n:].any()
  assert not whole["image"][n:].any()

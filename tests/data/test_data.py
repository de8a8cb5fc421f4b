"""Data: digits, arrays and npz files, and the order in which batches bring examples."""

import itertools

import numpy as np
import pytest

from umd import data
from umd.data import eval_batches, from_arrays, load, train_batches

SPLITS = ("train", "test")
RANDOM = "random_crop(2, padding=1)|flip_lr|value_range(0, 1, 0, 1)"


def numbered(n, pp=""):
  """A source whose images and labels both tell the example's number, which is never 0."""
  number = np.arange(1, n + 1)
  images = number[:, None, None, None] / 256 * np.ones((1, 2, 3, 1))
  return from_arrays("numbered", images.astype(np.float32), number, n + 1, pp)


def coloured(n, pp):
  """Images of random colours, of which no two windows are alike."""
  images = np.random.default_rng(0).random((n, 4, 4, 3), np.float32)
  return from_arrays("coloured", images, np.arange(n), n, pp)


def take(source, size, count, **settings):
  """The first `count` batches, seed 0 unless told otherwise."""
  stream = train_batches(source, size, **{"seed": 0, **settings})
  return list(itertools.islice(stream, count))


def order(n, size, count, **settings):
  """The numbers of the examples, batch after batch."""
  return np.concatenate([b["label"] for b in take(numbered(n), size, count, **settings)])


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key])


def rows(source):
  """Every image as bytes, to be put in sets."""
  return [image.tobytes() for image in source.arrays()[0]]


def test_digits_are_1797_images_in_two_disjoint_splits():
  train, test = (load("digits", split) for split in SPLITS)
  assert len(train) + len(test) == 1797
  assert not set(rows(train)) & set(rows(test))
  assert train.image_size == test.image_size == (8, 8, 1)
  assert train.num_classes == test.num_classes == len(train.class_names) == 10


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
def test_digits_fill_the_range(split):
  images, labels = load("digits", split).arrays()
  assert (images.min(), images.max()) == (-1, 1)
  assert images.dtype == np.float32
  assert labels.dtype == np.int32


def test_a_source_is_loaded_once():
  assert load("digits", "train") is load("digits", "train", "", cache=False)
  assert load("digits", "train") is not load("digits", "train", "flip_lr")


@pytest.mark.parametrize(
  "name, split, needed",
  [
    ("imagenett", "train", ["data.name='imagenett'", "digits", "tfds:NAME", "folder:PATH", "npz:"]),
    ("digits:x", "train", ["data.name='digits:x'"]),
    ("tfds:", "train", ["data.name='tfds:'", "tfds:NAME"]),
    ("digits", "val", ["'val'", "train (1442 images)", "test (355 images)"]),
    ("digits", "train[:x]", ["'train[:x]'", "NAME[:90%]"]),
    ("digits", "train[2000:]", ["train[2000:]", "1442"]),
  ],
)
def test_unknown_data_is_an_error_that_names_value_and_known_ones(name, split, needed):
  with pytest.raises(ValueError) as error:
    load(name, split)
  for word in needed:
    assert word in str(error.value)


@pytest.mark.parametrize(
  "split, first, last",
  [("[:10%]", 1, 10), ("[10%:]", 11, 100), ("[5:8]", 6, 8), ("[-3:]", 98, 100), ("", 1, 100)],
)
def test_slices_are_those_of_tfds(split, first, last, tmp_path):
  labels = np.arange(1, 101)
  np.savez(tmp_path / "a.npz", images=np.zeros((100, 1, 1, 1), np.float32), labels=labels)
  source = load(f"npz:{tmp_path / 'a.npz'}", f"all{split}")
  np.testing.assert_array_equal(source.labels, np.arange(first, last + 1))
  assert source.num_classes == 101


def test_slices_can_be_added(tmp_path):
  np.savez(tmp_path / "a.npz", images=np.zeros((10, 1, 1, 1)), labels=np.arange(10))
  source = load(f"npz:{tmp_path / 'a.npz'}", "all[:2]+all[80%:]")
  assert source.labels.tolist() == [0, 1, 8, 9]


@pytest.mark.parametrize("image_key, label_key", [("images", "labels"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("labelled", [True, False])
def test_npz_files_hold_images_and_perhaps_labels(image_key, label_key, labelled, tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
  arrays = {image_key: images, **({label_key: np.arange(5) % 2} if labelled else {})}
  np.savez(tmp_path / "a.npz", **arrays)
  source = load(f"npz:{tmp_path / 'a.npz'}", "all", "decode|value_range(-1, 1)")
  found, labels = source.arrays()
  np.testing.assert_allclose(found, images / 127.5 - 1, atol=1e-6)
  assert labels.tolist() == ([0, 1, 0, 1, 0] if labelled else [0] * 5)
  assert source.num_classes == (2 if labelled else 0)


@pytest.mark.parametrize(
  "content, needed",
  [
    (dict(pictures=np.zeros((2, 4, 4, 3))), ["pictures", "'images' nor 'arr_0'"]),
    (dict(images=np.zeros((2, 4, 4))), ["float64 [2, 4, 4]", "[n, H, W, C]"]),
    (dict(images=np.zeros((2, 4, 4, 3), np.int32)), ["int32", "uint8 or float"]),
    (dict(images=np.zeros((2, 4, 4, 3)), labels=np.zeros(3, int)), ["[3]", "[2]"]),
    (dict(images=np.zeros((2, 4, 4, 3)), labels=np.array([0, -1])), ["-1", "0..0"]),
    (dict(images=np.zeros((2, 4, 4, 3), np.uint8)), ["value_range(-1, 1)"]),
    (b"no npz at all", ["not readable as npz"]),
  ],
)
def test_a_wrong_npz_is_an_error_that_says_what_is_wrong(content, needed, tmp_path):
  if isinstance(content, bytes):
    (tmp_path / "a.npz").write_bytes(content)
  else:
    np.savez(tmp_path / "a.npz", **content)
  with pytest.raises(ValueError) as error:
    load(f"npz:{tmp_path / 'a.npz'}", "all")
  for word in ["a.npz", *needed]:
    assert word in str(error.value)


def mapped(x):
  """Whether an array is a view of a file."""
  while x is not None and not isinstance(x, np.memmap):
    x = x.base
  return x is not None


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("split, rows", [("all", slice(0, 7)), ("all[2:5]", slice(2, 5))])
def test_images_of_an_uncompressed_npz_stay_in_the_file(split, rows, order, tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)
  arrays = dict(mu=np.zeros(99), arr_0=np.asarray(images, order=order), arr_1=np.arange(7))
  np.savez(tmp_path / "plain.npz", **arrays)
  np.savez_compressed(tmp_path / "small.npz", **arrays)
  plain, small = (
    load(f"npz:{tmp_path / f}.npz", split, "value_range(-1, 1)").records for f in ("plain", "small")
  )
  for records in (plain, small):
    np.testing.assert_array_equal(records.images, images[rows])
    np.testing.assert_array_equal(records.labels, np.arange(7)[rows])
  assert mapped(plain.images) and not mapped(small.images)
  assert plain.images.dtype == np.uint8


def test_rows_of_an_npz_that_do_not_follow_one_another_are_copied(tmp_path):
  np.savez(tmp_path / "a.npz", images=np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1))
  source = load(f"npz:{tmp_path / 'a.npz'}", "all[8:]+all[:2]")
  assert source.records.images.ravel().tolist() == [8, 9, 0, 1]


def test_an_npz_whose_header_tells_another_size_than_its_bytes_is_an_error(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, images=np.zeros((1000, 1, 1, 1), np.uint8))
  whole = path.read_bytes()
  assert whole.count(b"(1000, 1, 1, 1)") == 1
  path.write_bytes(whole.replace(b"(1000, 1, 1, 1)", b"(9000, 1, 1, 1)"))
  with pytest.raises(ValueError, match=r"a\.npz.*uint8 \[9000, 1, 1, 1\].*number of bytes"):
    load(f"npz:{path}", "all", "value_range(-1, 1)")
  path.write_bytes(whole[:-200])
  with pytest.raises(ValueError, match=r"a\.npz.*not readable as npz"):
    load(f"npz:{path}", "all", "value_range(0, 1)")


def test_a_missing_npz_is_an_error_that_names_it():
  with pytest.raises(FileNotFoundError, match=r"npz:/nowhere/a\.npz.*no such file"):
    load("npz:/nowhere/a.npz", "all")


def test_a_source_without_images_is_an_error_that_names_it():
  with pytest.raises(ValueError, match="hollow"):
    from_arrays("hollow", np.zeros((0, 2, 2, 1), np.float32), np.zeros(0, np.int32), 2)


def test_a_source_without_labels_gives_zeros():
  source = from_arrays("plain", np.ones((3, 2, 2, 1), np.float32), None, 0)
  assert source.num_classes == 0
  assert source.labels.tolist() == [0, 0, 0]


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


@pytest.mark.parametrize("n", [12, 10, 5])
def test_ops_do_not_change_which_examples_come(n):
  """With ops, batches are made by TensorFlow; without, by NumPy."""
  plain, changed = (take(numbered(n, pp), 4, 7) for pp in ("", "value_range(0, 2, 0, 1)"))
  for one, two in zip(plain, changed, strict=True):
    np.testing.assert_array_equal(one["label"], two["label"])
    np.testing.assert_array_equal(2 * one["image"], two["image"])


@pytest.mark.parametrize("pp", ["", RANDOM])
@pytest.mark.parametrize("start", [1, 40])
def test_starting_at_a_step_gives_the_batches_of_a_run_from_zero(start, pp):
  source = coloured(10, pp)
  whole, resumed = take(source, 4, start + 6), take(source, 4, 6, start_step=start)
  assert_same(whole[start:], resumed)


@pytest.mark.parametrize("n, pp", [(12, ""), (10, ""), (5, ""), (10, RANDOM)])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_read_the_batches_of_one(n, processes, pp):
  source = coloured(n, pp)
  place = dict(process_count=processes)
  parts = [take(source, 8, 5, process_index=i, **place) for i in range(processes)]
  joined = [
    {k: np.concatenate([s[k] for s in shares]) for k in shares[0]}
    for shares in zip(*parts, strict=True)
  ]
  assert {len(share["label"]) for part in parts for share in part} == {8 // processes}
  assert_same(take(source, 8, 5), joined)


def test_what_is_drawn_differs_between_seeds_epochs_and_examples():
  one = coloured(1, RANDOM)  # The same example again and again.
  images = [b["image"] for seed in (0, 1) for b in take(one, 8, 1, seed=seed)]
  # 6 x 6 pixels around, windows of 2 x 2 at 25 places, each mirrored or not.
  assert len({image.tobytes() for image in np.concatenate(images)}) > 8


def test_train_batches_keep_the_pairs_of_image_and_label():
  for batch in take(numbered(10), 4, 5):
    expected = np.broadcast_to(batch["label"][:, None, None, None] / 256, (4, 2, 3, 1))
    np.testing.assert_array_equal(batch["image"], expected)
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32


def test_a_batch_that_processes_cannot_share_is_an_error():
  for batches in (train_batches, eval_batches):
    extra = {} if batches is eval_batches else {"seed": 0}
    with pytest.raises(ValueError, match="batch_size=10 must be a multiple of the 4 processes"):
      next(batches(numbered(5), 10, process_count=4, **extra))


@pytest.mark.parametrize("seed", [-1, 2**53])
def test_a_seed_out_of_range_is_an_error(seed):
  with pytest.raises(ValueError, match=f"seed={seed} must be in"):
    train_batches(numbered(5), 5, seed=seed)


def evaluated(source, size, processes):
  """The batches of every process, after checks of what holds for each."""
  shares = [
    list(eval_batches(source, size, process_index=i, process_count=processes))
    for i in range(processes)
  ]
  assert len({len(share) for share in shares}) == 1
  batches = [batch for share in shares for batch in share]
  assert {len(b[k]) for b in batches for k in b} == {size // processes}
  return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


@pytest.mark.parametrize("pp", ["", "value_range(0, 1, 0, 1)"])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("n, size", [(12, 6), (10, 6), (7, 6), (9, 12), (5, 18), (1, 6)])
def test_evaluation_reads_every_example_once_and_marks_filling(n, size, processes, pp):
  found = evaluated(numbered(n, pp), size, processes)
  real = found["_mask"] > 0
  assert set(np.unique(found["_mask"])) <= {0, 1}
  np.testing.assert_array_equal(np.sort(found["index"][real]), np.arange(n))
  np.testing.assert_array_equal(found["label"][real], found["index"][real] + 1)
  images = numbered(n).arrays()[0]
  np.testing.assert_array_equal(found["image"][real], images[found["index"][real]])
  assert not found["label"][~real].any()
  assert not found["image"][~real].any()
  assert (found["index"][~real] >= n).all()
  assert found["image"].dtype == found["_mask"].dtype == np.float32
  assert found["label"].dtype == found["index"].dtype == np.int32


def test_one_process_evaluates_in_the_order_of_the_source():
  for pp in ("", "value_range(0, 1, 0, 1)"):
    index = np.concatenate([b["index"] for b in eval_batches(numbered(10, pp), 4)])
    np.testing.assert_array_equal(index[:10], np.arange(10))


def test_evaluation_draws_the_same_every_time_and_for_every_number_of_processes():
  source = coloured(12, RANDOM)
  expected, labels = source.arrays()
  assert source.arrays()[0] is expected
  np.testing.assert_array_equal(labels, np.arange(12))
  for processes in (1, 2, 3):
    found = evaluated(source, 6, processes)
    real = found["_mask"] > 0
    np.testing.assert_array_equal(found["image"][real], expected[found["index"][real]])


def test_ops_may_add_to_the_batches():
  source = numbered(4, "onehot(6, key_result='target')")
  for batch in [*take(source, 2, 2), *eval_batches(source, 3)]:
    real = batch.get("_mask", np.ones(len(batch["label"]))) > 0
    np.testing.assert_array_equal(batch["target"][real].argmax(-1), batch["label"][real])
    assert batch["target"].shape[1:] == (6,)


def test_the_interface_is_what_the_package_exports():
  assert set(data.__all__) == {"Source", "eval_batches", "from_arrays", "load", "train_batches"}

"""What evaluators run on: every example once, in order, and no more fetched than is asked for."""

import numpy as np
import pytest

from evaluators import context as contexts
from evaluators.context import Context
from umd.data import eval_batches, from_arrays
from umd.devices.mesh import make_mesh
from umd.paths import make_path
from umd.trained.inference import Inference


def make_context(batch_size):
  return Context(None, (), make_mesh(), batch_size, 0, "")


NUMBERS = from_arrays("numbers", np.arange(50.0).reshape(50, 1, 1, 1), np.arange(50) % 7, 7)


def disordered(source, batch_size, **place):
  """Batches in a random order, rows too, a third of them filling that must not count."""
  rng, real = np.random.default_rng(0), 2 * batch_size // 3
  order = rng.permutation(len(source))
  images, labels = source.arrays()
  for start in range(0, len(source), real):
    ids = order[start : start + real]
    mask = rng.permutation(np.arange(batch_size) < len(ids))
    index, image = rng.integers(50, 99, batch_size), np.full((batch_size, 1, 1, 1), 1e3)
    index[mask], image[mask] = ids, images[ids]
    label = np.zeros(batch_size, int)
    label[mask] = labels[ids]
    cast = lambda x, kind: x.astype(kind)
    yield {
      "image": cast(image, np.float32),
      "label": cast(label, np.int32),
      "index": cast(index, np.int32),
      "_mask": cast(mask, np.float32),
    }


def pixels(params, batch):
  return {"pixel": batch["image"][:, 0, 0, 0], "label": batch["label"], "picture": batch["image"]}


@pytest.mark.parametrize("batches", [disordered, eval_batches])
@pytest.mark.parametrize("num", [0, 30])
def test_map_returns_the_sources_order_without_filling(monkeypatch, batches, num):
  monkeypatch.setattr(contexts, "eval_batches", batches)
  context, shown = make_context(batch_size=12), [20, 3, 0, 20]
  found = context.map(context.jit(pixels, ["picture"], shown), {}, NUMBERS, num=num)
  n = num or 50
  np.testing.assert_array_equal(found["pixel"], np.arange(n))
  np.testing.assert_array_equal(found["label"], np.arange(n) % 7)
  np.testing.assert_array_equal(found["picture"], NUMBERS.arrays()[0][shown])


def test_examples_that_could_not_be_read_are_left_out(monkeypatch):
  """Two of them: their rows come, with their index and `_mask` 0."""

  def with_gaps(*args, **kwargs):
    for batch in eval_batches(*args, **kwargs):
      batch["_mask"][np.isin(batch["index"], [3, 17])] = 0
      yield batch

  monkeypatch.setattr(contexts, "eval_batches", with_gaps)
  context = make_context(batch_size=12)
  found = context.map(context.jit(pixels, ["picture"], [4, 3]), {}, NUMBERS)
  np.testing.assert_array_equal(found["pixel"], np.delete(np.arange(50), [3, 17]))
  np.testing.assert_array_equal(found["picture"][:, 0, 0, 0], [4, 0])
  monkeypatch.setattr(
    contexts,
    "eval_batches",
    lambda *a, **k: ({**b, "_mask": 0 * b["_mask"]} for b in eval_batches(*a, **k)),
  )
  with pytest.raises(ValueError, match="numbers: 50 of 50"):
    context.map(context.jit(pixels), {}, NUMBERS)


def test_map_keeps_what_is_asked_for():
  context = make_context(batch_size=12)
  assert set(context.map(context.jit(pixels), {}, NUMBERS, keep=("label",))) == {"label"}


def test_map_stops_reading_when_it_has_all_it_was_asked_for(monkeypatch):
  read = []

  def counted(*args, **kwargs):
    for batch in eval_batches(*args, **kwargs):
      read.append(batch)
      yield batch

  monkeypatch.setattr(contexts, "eval_batches", counted)
  context = make_context(batch_size=4)
  assert len(context.map(context.jit(pixels), {}, NUMBERS, num=4)["pixel"]) == 4
  # The first batch has it all; some are on their way by then.
  assert len(read) <= 6 < 50 / 4


def test_examples_that_never_come_are_an_error(monkeypatch):
  batches = lambda *args, **kwargs: list(eval_batches(*args, **kwargs))[:-1]
  monkeypatch.setattr(contexts, "eval_batches", lambda *a, **k: iter(batches(*a, **k)))
  context = make_context(batch_size=20)
  with pytest.raises(ValueError, match="numbers: 10 of 50"):
    context.map(context.jit(pixels), {}, NUMBERS)


@pytest.mark.parametrize("num", [8, 21])
def test_positions_come_in_order_whatever_the_number_of_processes(num):
  context = make_context(batch_size=8)
  double = context.jit(lambda params, batch: {"double": 2 * batch["index"]})
  found = context.map_positions(double, {}, num, "positions")["double"]
  np.testing.assert_array_equal(found, 2 * np.arange(num))
  parts = [contexts.index_batches(num, 8, process_index=i, process_count=2) for i in range(2)]
  whole = [
    np.concatenate([b["index"] for b in pair])[np.concatenate([b["_mask"] for b in pair]) > 0]
    for pair in zip(*parts, strict=True)
  ]
  np.testing.assert_array_equal(np.concatenate(whole), np.arange(num))


def test_data_of_another_size_is_refused_with_its_key(tmp_path, nano):
  """Before anything is compiled: the model would see what it was not made for."""
  from PIL import Image

  (tmp_path / "only").mkdir()
  Image.new("RGB", (20, 20)).save(tmp_path / "only" / "grey.png")
  model, _ = nano()
  context = Context(Inference(model, make_path("cosine", 10)), (), make_mesh(), 4, 0, "")
  spec = lambda size: dict(name=f"folder:{tmp_path}", split="all", pp=f"decode|resize({size})")
  assert context.open("data", spec(16)).image_size == (16, 16, 3)
  with pytest.raises(
    ValueError, match=r"reference: .* \(8, 8, 3\), .* \(16, 16, 3\).*reference\.pp"
  ):
    context.open("reference", spec(8))

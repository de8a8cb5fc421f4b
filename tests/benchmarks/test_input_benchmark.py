"""The benchmarks of input and of checkpoints: what they compare is what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import checkpoint, input
from umd import data
from umd.data import ops
from umd.data.host import tensorflow
from umd.data.records import row


@pytest.fixture(scope="module")
def jpegs():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(input, "MADE", 6)
    patch.setattr(input, "SIDES", (96, 128))
    yield input.Made()


def test_made_images_have_the_spectrum_of_photographs():
  image = input._noise(np.random.default_rng(0), 128, 160).mean(-1)
  power = np.abs(np.fft.rfft2(image - image.mean())) ** 2
  frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.rfftfreq(160)[None])
  band = lambda low, high: np.log2(power[(frequency >= low) & (frequency < high)].mean())
  octaves = [band(f, 2 * f) for f in (1 / 64, 1 / 32, 1 / 16, 1 / 8)]
  np.testing.assert_allclose(np.diff(octaves), -2, atol=0.5)  # The power is as 1 / f^2.


def test_all_ways_cut_the_same_window(jpegs):
  tf = tensorflow()
  example = jpegs.parse(row(jpegs, 2))
  smooth = tf.io.encode_jpeg(
    tf.image.resize(tf.io.decode_jpeg(example["image"]), (6, 8))
    .numpy()
    .repeat(32, 0)
    .repeat(32, 1)
    .astype(np.uint8),
    quality=98,
  )
  context = ops.OpContext(tf.constant([0, 5], tf.int64), (None, None, 3))
  found = {
    k: op({"image": smooth}, context)["image"].numpy() for k, op in input.crops(32, 30).items()
  }
  for name, image in found.items():
    assert np.abs(image - found[input.BASE]).mean() < 6, name
  other = ops.OpContext(tf.constant([0, 6], tf.int64), (None, None, 3))
  moved = input.crops(32, 30)["fused"]({"image": smooth}, other)["image"].numpy()
  assert np.abs(moved - found[input.BASE]).mean() > 12


def test_errors_are_those_of_the_ways(jpegs):
  found = input.errors(jpegs, 16, 80, 6)
  assert found["plain"] == 0 and found["energy plain"] == 1
  assert found["fused"] < 0.3 < found["scaled 1"] < found["public"]
  assert found["energy public"] > 1.2  # Aliases.


def test_the_pipeline_gives_what_the_ways_make(jpegs, monkeypatch):
  monkeypatch.setattr(input, "SCALED", (1.5,))
  found = input.sources(jpegs, 16, 80)
  assert set(found) == {*input.crops(16, 80), "cached"}
  for name, source in found.items():
    batch = next(data.train_batches(source, 4, seed=0))
    assert batch["image"].shape == (4, 16, 16, 3), name
    assert -1.01 <= batch["image"].min() < -0.2 < 0.2 < batch["image"].max() <= 1.01


def test_the_table_has_every_way_and_the_lines_hold_the_numbers(
  jpegs, monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(input, "open_jpegs", lambda name, data_dir: jpegs)
  monkeypatch.setattr(input, "SCALED", (1.5,))
  monkeypatch.setattr(input, "WARM_UP", 1)
  monkeypatch.setattr(input, "FASTER", 1)
  flags = ["--size", "8", "--batches", "1", "--batch_size", "2", "--repeats", "2"]
  input.main([*flags, "--out", str(tmp_path / "a.jsonl")])
  lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
  kinds = [*input.crops(8, 80), "cached"]
  assert [line["kind"] for line in lines] == kinds
  assert all(line["per_core"] > 0 and line["images_per_second"] > 0 for line in lines)
  assert lines[0]["times_plain"] == 1 and lines[-1]["error_of_255"] is None
  shown = capsys.readouterr().out.splitlines()
  assert any(line.startswith("6 JPEGs of made JPEGs") for line in shown[:2])
  assert len(shown) == 2 + len(kinds)


def test_data_that_is_not_there_is_one_line(capsys):
  with pytest.raises(SystemExit) as error:
    input.main(["--data", "folder:/nowhere", "--size", "8"])
  assert error.value.code == 1
  assert "/nowhere" in capsys.readouterr().err


@pytest.fixture
def small_state(monkeypatch):
  state = {"step": jnp.int32(3), "params": {"w": jnp.arange(1000.0).reshape(10, 100)}}
  monkeypatch.setattr(checkpoint, "make_state", lambda variant, size: state)
  return state


def test_the_cost_of_a_checkpoint_is_told_in_parts(small_state, tmp_path, capsys):
  out = tmp_path / "a.jsonl"
  checkpoint.main(["--repeats", "2", "--folder", str(tmp_path / "disk"), "--out", str(out)])
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  assert [line["kind"] for line in lines] == list(checkpoint.KINDS)
  for line in lines:
    assert line["state_mb"] == pytest.approx(0.004004)
    assert line["mb_per_second"] == pytest.approx(line["state_mb"] / line["seconds"])
  assert [text.split()[0] for text in capsys.readouterr().out.splitlines()[-4:]] == [
    *checkpoint.KINDS
  ]
  assert not list((tmp_path / "disk").iterdir())  # Nothing is left there.


def test_a_checkpoint_that_comes_back_changed_is_an_error(small_state, tmp_path, monkeypatch):
  restore = checkpoint.Checkpoints.restore

  def changed(self, like, step):
    state, place = restore(self, like, step)
    return jax.tree.map(lambda x: x + 1, state), place

  monkeypatch.setattr(checkpoint.Checkpoints, "restore", changed)
  with pytest.raises(ValueError, match="step 1: what was restored is not what was saved"):
    checkpoint.measure(small_state, str(tmp_path), 1)

"""Writers: every value reaches every sink, resumed runs have whole lines, wandb is harmless."""

import json
import os
import sys
import types
import warnings

import numpy as np
import pytest
from PIL import Image
from stand_ins import object_store

from umd.runs import workdir as folder
from umd.runs import writers
from umd.runs.writers import (
  Images,
  JsonLines,
  PngFolder,
  Progress,
  TensorBoard,
  Wandb,
  Work,
  Writer,
)


def lines(workdir):
  with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as f:
    return f.read().splitlines()


def write_steps(workdir, start, steps):
  sink = JsonLines(workdir, start)
  for step in steps:
    sink.values(step, {"loss": 1 / 3 + step})
  sink.close()


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', "{"])
def test_a_resumed_run_drops_later_records_and_a_torn_line_and_keeps_the_rest(tmp_path, torn):
  workdir = str(tmp_path)
  write_steps(workdir, 0, (1, 2, 3, 4))
  before = lines(workdir)
  with open(os.path.join(workdir, "metrics.jsonl"), "a", encoding="utf-8") as f:
    f.write(torn)
  sink = JsonLines(workdir, 2)
  assert Writer([sink], sink.earlier).latest == {"loss": 1 / 3 + 2}
  sink.close()
  write_steps(workdir, 2, (3,))
  after = lines(workdir)
  assert after[:2] == before[:2]
  assert [json.loads(line)["step"] for line in after] == [1, 2, 3]
  assert os.listdir(workdir) == ["metrics.jsonl"]
  assert writers.read_jsonl(os.path.join(workdir, "absent")) == []


def test_records_are_on_disk_before_the_file_is_closed_and_hold_values_exactly(tmp_path):
  sink, values = JsonLines(str(tmp_path), 0), {"a/b": 0.1 + 0.2, "tiny": 1e-300}
  sink.values(7, values)
  sink.flush()
  assert writers.read_jsonl(str(tmp_path / "metrics.jsonl")) == [{"step": 7, **values}]
  sink.close()


class Recorder:
  """A sink that remembers its calls."""

  def __init__(self):
    self.calls = []

  def __getattr__(self, name):
    return lambda *args: self.calls.append((name, *args))


def test_numbers_go_to_scalars_and_pictures_to_image_in_every_sink():
  sinks, picture = [Recorder(), Recorder()], Images(np.zeros((2, 2, 1), np.uint8))
  writer = Writer(sinks)
  writer.write(3, {"a": np.float32(0.5), "picture": picture, "b": 2})
  writer.write(4, {"a": 1.5})
  writer.write(5, {"picture": picture})
  writer.flush()
  writer.close()
  expected = [
    ("values", 3, {"a": 0.5, "b": 2.0}),
    ("image", 3, "picture", picture.pixels),
    ("values", 4, {"a": 1.5}),
    ("image", 5, "picture", picture.pixels),
    ("flush",),
    ("close",),
  ]
  for sink in sinks:
    assert [call[:3] for call in sink.calls] == [call[:3] for call in expected]
    assert all(sink.calls[i][3] is picture.pixels for i in (1, 3))
    assert {type(v) for v in sink.calls[0][2].values()} == {float}
  assert writer.latest == {"a": 1.5, "b": 2.0}


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_decode_to_the_same_pixels(tmp_path, channels):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (5, 7, channels)).astype(np.uint8)
  Writer([PngFolder(str(tmp_path))]).write(12, {"eval/images": Images(pixels)})
  path = tmp_path / "images" / "eval" / "images_00000012.png"
  np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("n, columns, scale, gap", [(6, 3, 1, 1), (5, 2, 3, 2), (2, 4, 2, 0)])
def test_grid_puts_image_i_in_row_i_div_columns_and_column_i_mod_columns(n, columns, scale, gap):
  h, w, c = 2, 3, 3
  images = np.random.default_rng(0).uniform(-1.2, 1.2, (n, h, w, c))
  rows = (n + columns - 1) // columns
  shape = (rows * (h * scale + gap) + gap, columns * (w * scale + gap) + gap, c)
  expected = np.full(shape, 128)
  for i in range(n):
    top = gap + (i // columns) * (h * scale + gap)
    left = gap + (i % columns) * (w * scale + gap)
    for y in range(h * scale):
      for x in range(w * scale):
        value = np.clip(images[i, y // scale, x // scale], -1, 1)
        expected[top + y, left + x] = np.rint((value + 1) / 2 * 255)
  found = writers.to_grid(images, columns, scale, gap).pixels
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, expected)


def test_tensorboard_files_hold_scalars_and_pictures(tmp_path):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  writer = Writer([TensorBoard(str(tmp_path))])
  for step in (1, 2):
    writer.write(step, {"train/loss": 0.5 * step, "pic": Images(np.full((4, 4, 1), 9, np.uint8))})
  writer.close()
  found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0})
  found.Reload()
  events = found.Tensors("train/loss")
  assert [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in events] == [
    (1, 0.5),
    (2, 1.0),
  ]
  assert [e.step for e in found.Tensors("pic")] == [1, 2]


def fail(*args, **kwargs):
  raise RuntimeError("service is down")


def fake_wandb(**attributes):
  run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
  module = types.ModuleType("wandb")
  defaults = {
    "init": lambda **settings: run,
    "login": lambda key: None,
    "Image": lambda pixels: pixels,
  }
  vars(module).update({**defaults, **attributes})
  return module


FAILING_RUN = types.SimpleNamespace(log=fail, finish=fail)


@pytest.mark.parametrize(
  "module, mode",
  [
    (None, "offline"),
    (fake_wandb(init=fail), "offline"),
    (fake_wandb(login=fail), "online"),
    (fake_wandb(init=lambda **settings: FAILING_RUN), "online"),
    (fake_wandb(Image=fail), "offline"),
  ],
  ids=["missing", "init fails", "login fails", "logging fails", "pictures fail"],
)
def test_whatever_goes_wrong_in_wandb_is_a_warning_and_writing_goes_on(
  monkeypatch, tmp_path, module, mode
):
  monkeypatch.setitem(sys.modules, "wandb", module)
  with pytest.warns(UserWarning, match="wandb"):
    wandb = Wandb(str(tmp_path), {}, "key", mode=mode, project="p")
    writer = Writer([wandb, JsonLines(str(tmp_path), 0)])
    writer.write(1, {"a": 1.0, "picture": Images(np.zeros((2, 2, 1), np.uint8))})
    writer.write(2, {"a": 2.0})
    writer.flush()
    writer.close()
  assert [json.loads(line)["step"] for line in lines(str(tmp_path))] == [1, 2]
  # An empty id would be taken up by the next start.
  id_file = tmp_path / "wandb_id"
  assert not id_file.exists() or id_file.read_text()


def test_wandb_is_given_config_values_and_pictures_and_logs_in_online_only(monkeypatch, tmp_path):
  seen = []
  run = types.SimpleNamespace(
    log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("finish")
  )
  inits, logins = [], []
  module = fake_wandb(
    init=lambda **settings: inits.append(settings) or run, login=lambda key: logins.append(key)
  )
  monkeypatch.setitem(sys.modules, "wandb", module)
  pixels = np.zeros((2, 2, 1), np.uint8)
  for mode in ("online", "offline"):
    writer = Writer([Wandb(str(tmp_path), {"lr": 1}, "key", mode=mode, project="p")])
    writer.write(4, {"a": 1.0, "picture": Images(pixels)})
    writer.close()
  assert logins == ["key"]
  assert seen[:3] == [(4, {"a": 1.0}), (4, {"picture": pixels}), "finish"]
  for settings, mode in zip(inits, ("online", "offline"), strict=True):
    kept = {"config": {"lr": 1}, "mode": mode, "project": "p", "dir": str(tmp_path)}
    assert {k: settings[k] for k in kept} == kept
    assert settings["id"] == (tmp_path / "wandb_id").read_text() != ""


def test_wandb_offline_writes_under_the_workdir_and_a_second_start_has_the_same_id(
  monkeypatch, tmp_path
):
  monkeypatch.setenv("WANDB_SILENT", "true")
  monkeypatch.setenv("WANDB_CONSOLE", "off")
  ids = []
  for step in (1, 2):
    with warnings.catch_warnings():
      warnings.simplefilter("error", UserWarning)  # "wandb: ..." would be one
      sink = Wandb(str(tmp_path), {"lr": 0.1}, None, mode="offline", project="tests")
      sink.values(step, {"a": 1.0})
      import wandb

      ids.append(wandb.run.id)
      sink.close()
  assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()
  assert list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))


def test_progress_leaves_out_the_first_stretch_and_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(writers.time, "perf_counter", lambda: now[0])
  progress = Progress(steps=100, start_step=10, batch_size=8)
  now[0] = 50.0  # 5 steps in 50 s, compilation included: all there is to go by
  assert progress.tick(15) == pytest.approx({"images_per_second": 0.8, "eta_seconds": 850})
  now[0] = 60.0  # 10 steps in 10 s
  assert progress.tick(25) == pytest.approx({"images_per_second": 8, "eta_seconds": 75})
  now[0] = 1060.0  # an evaluation of 1,000 s
  progress.resume(25)
  now[0] = 1090.0  # 10 steps in 30 s; 20 in 40 s in all
  assert progress.tick(35) == pytest.approx({"images_per_second": 8 / 3, "eta_seconds": 130})


@pytest.mark.parametrize("peak", [None, 4e12])
def test_progress_tells_the_work_done_and_the_share_of_the_peak(monkeypatch, peak):
  now = [0.0]
  monkeypatch.setattr(writers.time, "perf_counter", lambda: now[0])
  progress = Progress(100, 0, 8, Work(flops=3e12, peak=peak))
  now[0] = 6.0  # Two steps of 3 TFLOP in 6 s.
  first = progress.tick(2)
  assert first["teraflops_per_second"] == pytest.approx(1.0)
  assert first.get("mfu") == (pytest.approx(0.25) if peak else None)
  now[0] = 16.0
  progress.resume(2)  # A pause does not count.
  now[0] = 18.0
  assert progress.tick(6)["teraflops_per_second"] == pytest.approx(6.0)


@pytest.fixture
def remote(monkeypatch, tmp_path):
  """A folder of an object store; no file may appear on this machine."""
  object_store(monkeypatch)
  monkeypatch.chdir(tmp_path)
  yield "gs://bucket/run"
  assert not os.listdir(tmp_path)


def test_records_at_an_address_appear_at_flush_or_within_a_minute_and_resume(monkeypatch, remote):
  now = [0.0]
  monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
  path = f"{remote}/metrics.jsonl"
  steps = lambda: [r["step"] for r in writers.read_jsonl(path)]
  sink = JsonLines(remote, 0)
  for step, time_, seen in [(1, 1, []), (2, 59, []), (3, 60, [1, 2, 3]), (4, 119, [1, 2, 3])]:
    now[0] = time_
    sink.values(step, {"loss": 0.5})
    assert steps() == seen
  sink.flush()
  assert steps() == [1, 2, 3, 4]
  sink.values(5, {"loss": 0.5})
  sink.close()
  assert steps() == [1, 2, 3, 4, 5]
  again = JsonLines(remote, 3)
  assert [r["step"] for r in again.earlier] == steps() == [1, 2, 3]
  again.values(4, {"loss": 0.25})
  again.close()
  assert writers.read_jsonl(path)[3:] == [{"step": 4, "loss": 0.25}]


def test_wandb_keeps_its_id_at_the_address_and_its_files_on_this_machine(monkeypatch, remote):
  inits = []
  run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
  module = fake_wandb(init=lambda **settings: inits.append(settings) or run)
  monkeypatch.setitem(sys.modules, "wandb", module)
  for _ in range(2):
    Wandb(remote, {}, None, mode="offline", project="p").close()
  assert inits[0]["id"] == inits[1]["id"] == folder.read_bytes(f"{remote}/wandb_id").decode() != ""
  for settings in inits:
    assert os.path.isdir(settings["dir"]) and "://" not in settings["dir"]
    os.rmdir(settings["dir"])

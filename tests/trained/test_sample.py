"""The program that samples: what it writes, going on where it was stopped, its errors."""

import dataclasses
import itertools
import os
from pathlib import Path

import jax
import numpy as np
import pretrained_runs
import pytest
from PIL import Image
from pretrained_runs import SIZE

import sample
from tools.evaluate_samples import open_side
from umd import load
from umd.runs import sharded, workdir
from umd.samplers import Sampling
from umd.trained import model as pretrained
from umd.trained import shards

NUM = 40  # Samples: three shards, the last of which is not full.
BATCH = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return pretrained_runs.make(tmp_path_factory.mktemp("run") / "run", pretrained_runs.config())


@pytest.fixture(scope="module", autouse=True)
def one_model(run):
  """Commands for the same model share what is compiled."""
  made, patch = {}, pytest.MonkeyPatch()

  def opened(path, **given):
    return made.setdefault((path, *given.values()), load(path, **given))

  patch.setattr(sample, "load", opened)
  yield opened
  patch.undo()


def command(run, *flags, **given):
  given = {"workdir": run, "batch_size": BATCH} | given
  sample.main([*flags, *(f"--{key}={value}" for key, value in given.items())])


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
  """A folder with all outputs."""
  out = str(tmp_path_factory.mktemp("samples") / "out")
  command(run, "--npz", "--png", "--grid", out=out, num=NUM, labels="3,seven,1", seed=5)
  return out


def levels(out):
  return np.load(os.path.join(out, "samples.npz"))["arr_0"]


def test_the_npz_is_adms_and_holds_the_models_samples(run, whole, one_model):
  found = np.load(os.path.join(whole, "samples.npz"))
  assert (found["arr_0"].dtype, found["arr_0"].shape) == (np.uint8, (NUM, 8, 8, 3))
  np.testing.assert_array_equal(found["arr_1"], np.resize([3, 7, 1], NUM))
  model = one_model(run, weights="", step="newest", dtype="")
  wanted = model.sample([3, 7, 1], NUM, seed=5, batch_size=BATCH)
  np.testing.assert_array_equal(found["arr_0"], np.broadcast_to(wanted, found["arr_0"].shape))
  side = open_side(os.path.join(whole, "samples.npz"), None, "")
  assert (side.count, side.images.image_size) == (NUM, (8, 8, 3))


def test_pngs_and_grid_show_the_samples(whole):
  names = sorted(os.listdir(os.path.join(whole, "png")))
  assert names == [f"{i:06d}.png" for i in range(NUM)]
  for i in (0, 17, NUM - 1):
    image = np.asarray(Image.open(os.path.join(whole, "png", names[i])))
    np.testing.assert_array_equal(image, levels(whole)[i, ..., 0])
  grid, side = np.asarray(Image.open(os.path.join(whole, "grid.png"))), 8 * 8 + 1
  assert grid.shape == (3 * side + 1, 13 * side + 1)  # A row per label.
  cell = grid[side + 1 : 2 * side : 8, 2 * side + 1 : 3 * side : 8]  # Label 7, its third sample.
  np.testing.assert_array_equal(cell, levels(whole)[1 + 3 * 2, ..., 0])


def test_a_killed_run_goes_on_and_draws_nothing_twice(run, whole, tmp_path, monkeypatch, capsys):
  out, flags = str(tmp_path / "out"), dict(num=NUM, labels="3,seven,1", seed=5)
  draw = pretrained.Pretrained.draw

  def killed(*args, **given):
    yield from itertools.islice(draw(*args, **given), 3)  # 24 samples: a shard and a half.
    raise KeyboardInterrupt

  monkeypatch.setattr(pretrained.Pretrained, "draw", killed)
  with pytest.raises(SystemExit) as ended:
    command(run, "--npz", out=out, **flags)
  assert ended.value.code == 130
  assert os.listdir(os.path.join(out, "shards")) == ["00000.npy"]
  Path(out, "shards", "00001.npy").write_bytes(b"half of it")
  asked = []
  counted = lambda self, index, *args, **given: (
    asked.append(list(index)) or draw(self, index, *args, **given)
  )
  monkeypatch.setattr(pretrained.Pretrained, "draw", counted)
  command(run, "--npz", out=out, **flags)
  assert asked == [list(range(16, NUM))]
  np.testing.assert_array_equal(levels(out), levels(whole))
  command(run, "--npz", out=out, **flags)
  assert len(asked) == 1  # All was there.
  assert "3 of 3 shards are there" in capsys.readouterr().out


def test_processes_draw_the_shards_between_them(run, whole, tmp_path, one_model):
  settings = workdir.read_json(os.path.join(whole, "progress", "samples.json"))["settings"]
  plan = shards.SamplePlan(str(tmp_path), settings, "")
  model = one_model(run, weights="", step="newest", dtype="")
  shards.begin(plan)
  assert shards.draw(plan, model, BATCH, (1, 2))[0] == 16
  assert sharded.missing(plan) == [0, 2]
  assert shards.draw(plan, model, BATCH, (0, 2))[0] == 24
  shards.write_npz(plan)
  np.testing.assert_allclose(levels(tmp_path).astype(int), levels(whole), atol=1)


def test_other_settings_in_the_same_folder_are_refused(run, whole, tmp_path, capsys):
  for given, told in (
    ({"seed": 6}, "seed: there 5, now 6"),
    ({"step": 3}, "step: there 7, now 3"),
    ({"cfg_scale": 3.0}, "sampling.cfg_scale: there 2.0, now 3.0"),
  ):
    with pytest.raises(SystemExit) as ended:
      command(run, out=whole, **{"num": NUM, "labels": "3,7,1", "seed": 5, **given})
    assert ended.value.code == 1
    assert told in (error := capsys.readouterr().err) and "the command was: sample " in error
  (tmp_path / "thesis.tex").write_text("")
  with pytest.raises(SystemExit):
    command(run, out=tmp_path, num=4)
  assert "holds something else" in capsys.readouterr().err
  assert os.listdir(tmp_path) == ["thesis.tex"]


def test_without_out_each_setting_has_a_folder_of_the_run(run, monkeypatch):
  monkeypatch.setattr(shards, "draw", lambda *args: (0, 0.0))
  monkeypatch.setattr(sharded, "wait", lambda *args: None)
  monkeypatch.setattr(shards, "write_grid", lambda plan: plan.folder)
  monkeypatch.setitem(shards.OUTPUTS, "grid", lambda plan: plan.folder)
  for seed in (0, 1, 1):
    command(run, seed=seed)
  folders = sorted(os.listdir(os.path.join(run, "samples")))
  assert [name[:15] for name in folders] == ["step7_ema_seed0", "step7_ema_seed1"]
  settings = workdir.read_json(
    os.path.join(run, "samples", folders[0], "progress", "samples.json")
  )["settings"]
  assert (settings["labels"], settings["num"]) == (list(range(10)), 80)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
  """`picture(height, width)`: a PNG file of noise."""
  root = tmp_path_factory.mktemp("pictures")

  def make(height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = str(root / f"{height}_{width}.png")
    Image.fromarray(pixels).save(path)
    return path

  return make


def cells(path, columns, size=8):
  """[rows, columns, 8, 8] of a grid of small images."""
  grid, side = np.asarray(Image.open(path)), 8 * size + 1
  rows = grid.shape[0] // side
  at = lambda i: slice(i * side + 1, (i + 1) * side, 8)
  return np.stack([[grid[at(r), at(c)] for c in range(columns)] for r in range(rows)])


def test_inpainting_shows_the_image_what_is_known_and_ways_to_fill_it_in(
  run, picture, tmp_path, capsys
):
  out, file = str(tmp_path / "out.png"), picture(24, 16)
  mask = np.zeros((24, 16), np.uint8)
  mask[4:8, 6:8] = 255  # The middle is 16 x 16, half its size: one pixel.
  Image.fromarray(mask).save(tmp_path / "mask.png")
  given = dict(num=3, resampling=1, labels="three", out=out)
  command(run, inpaint=file, mask=tmp_path / "mask.png", **given)
  assert "24 x 16 px, cropped to the middle and resized to 8 x 8" in capsys.readouterr().out
  image, known, *made = cells(out, 5)[0]
  hidden = np.zeros((8, 8), bool)
  hidden[0:2, 3:4] = True
  assert (known[hidden] == 128).all()
  for picture_ in (known, *made):
    np.testing.assert_array_equal(picture_[~hidden], image[~hidden])
  assert len({m.tobytes() for m in made}) == 3
  command(run, inpaint=file, mask="box:0,3,2,1", **given)
  np.testing.assert_array_equal(cells(out, 5)[0], [image, known, *made])


def test_reconstructions_have_a_row_each(run, picture, tmp_path):
  out = str(tmp_path / "out.png")
  files = [picture(8, 8), picture(12, 8)]
  flags = ["--workdir", run, "--out", out, "--mask_ratio", "0.5", "--reconstruct", *files]
  sample.main(flags)
  image, known, filled = cells(out, 3)[0]
  np.testing.assert_array_equal(image, Image.open(files[0]).convert("L"))
  hidden = filled != image
  assert 0.2 < hidden.mean() <= 0.5 and (known[hidden] == 128).all()
  assert cells(out, 3).shape[0] == 2


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_trajectories_are_animations_that_end_in_the_samples(run, tmp_path, kind, one_model):
  out = str(tmp_path / f"out.{kind}")
  command(run, "--trajectory", labels="3,7,1,2", seed=5, out=out)
  film = Image.open(out)
  assert film.n_frames == pretrained_runs.STEPS + 1
  film.seek(film.n_frames - 1)
  last, side = np.asarray(film.convert("L")).astype(int), 8 * 8 + 1
  model = one_model(run, weights="", step="newest", dtype="")
  wanted = model.trajectory([3, 7, 1, 2], seed=5).x_t[-1]
  for half in (0, 2 * side + 1):
    found = last[1:side:8, half + 1 : half + side : 8]
    assert np.abs(found - wanted[0, ..., 0]).max() <= 2


def test_flags_of_sampling_are_its_settings():
  flags = "--sampler dpmpp_2m --spacing logsnr --steps 9 --head x0 --cfg_channels 1"
  flags += " --guidance_interval 0.1,0.8 --clip_x0 false"
  given = sample.settings_of(sample.parse(["--workdir", "x", *flags.split()]))
  wanted = dict(sampler="dpmpp_2m", spacing="logsnr", steps=9, head="x0", cfg_channels=1)
  wanted |= dict(guidance_interval=(0.1, 0.8), clip_x0=False)
  assert {k: v for k, v in given.items() if v is not None} == wanted
  assert given.keys() == {field.name for field in dataclasses.fields(Sampling)}
  for wrong in (["--spacing", "log"], ["--clip_x0", "maybe"]):
    with pytest.raises(SystemExit):
      sample.parse(["--workdir", "x", *wrong])


BAD = {
  "a workdir that is none": (dict(workdir="nowhere"), "'nowhere' holds no run"),
  "a class that is none": (dict(labels="thre"), "'thre' is no class of the model. Did you mean"),
  "a label that is none": (dict(labels="3,12"), "label 12 must be in 0..9"),
  "too many steps": (dict(steps=99), "steps=99 must be in [1, timesteps=20]"),
  "an interval that is none": (dict(guidance_interval="0.8,0.2"), "guidance_interval=(0.8, 0.2)"),
  "guidance without labels": (dict(labels="none", cfg_scale=3), "cfg_scale=3.0 guides by labels"),
  "a step that is not there": (dict(step=5), "step=5: "),
  "an image that is none": (dict(inpaint="no.png", mask="box:0,0,1,1"), "there is no such file"),
  "a box outside": (dict(inpaint="8", mask="box:4,4,5,1"), "must hold pixels of the model's"),
  "a mask of another size": (dict(inpaint="8", mask="12"), "is 12 x 8 px: make it of the size of"),
  "a film that is none": (dict(out="a.mp4"), "must be a file whose name ends in .webp or .gif"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_is_compiled(
  run, picture, tmp_path, monkeypatch, capsys, case
):
  monkeypatch.chdir(tmp_path)
  given, told = BAD[case]
  files = {"8": picture(8, 8), "12": picture(12, 8)}
  given = {k: files.get(v, v) for k, v in given.items()}
  compiled = []
  monkeypatch.setattr(jax, "block_until_ready", compiled.append)
  monkeypatch.setattr(shards, "draw", lambda *args: compiled.append("draw"))
  flags = ["--trajectory"] if given.get("out") else []
  with pytest.raises(SystemExit) as ended:
    command(given.pop("workdir", run), *flags, **given)
  error = capsys.readouterr().err
  assert ended.value.code == 1
  assert error.startswith("error: ") and error.count("\n") == 1
  assert told.replace("';", "':") in error and not compiled


def test_sizes_that_differ_are_cropped_as_data_is(picture):
  """The largest square in the middle, averaged down."""
  from umd.trained.pictures import read_image

  told = []
  found = read_image(picture(16, 40), (8, 8, 3), told.append)
  whole = np.asarray(Image.open(picture(16, 40)))[:, 12:28].astype(float)
  means = whole.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
  assert np.corrcoef(found.ravel(), means.ravel())[0, 1] > 0.8 and len(told) == 1
  assert read_image(picture(16, 40), (16, 40, 1), told.append).shape == (16, 40, 1)
  assert len(told) == 1 and SIZE == (8, 8, 1)

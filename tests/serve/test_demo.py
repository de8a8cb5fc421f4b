"""The page that a model is tried out on: what its functions do, and the page where Gradio is."""

import dataclasses
import importlib.util
import subprocess
import sys
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pretrained_runs
import pytest
from PIL import Image

from umd import load
from umd.data import from_arrays
from umd.samplers import Sampling
from umd.serve import about, demo, session
from umd.serve.session import FRAMES, Session
from umd.trained import pictures
from umd.trained.model import Denoised

SIZE = pretrained_runs.SIZE
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """On one device, for which programs are compiled faster."""
  folder = tmp_path_factory.mktemp("run") / "run"
  path = pretrained_runs.make(folder, pretrained_runs.config(), steps=(7,))
  return load(path, devices=jax.local_devices()[:1])


@pytest.fixture(scope="module")
def page(model):
  """A session as the command line opens it."""
  return demo.open_session(model, demo.parse(["--workdir", model.folder, "--training_images=64"]))


def random_image(seed=0, size=SIZE):
  return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def box(top, left, height, width, size=SIZE):
  mask = np.zeros(size[:2], bool)
  mask[top : top + height, left : left + width] = True
  return mask


# Between the browser and the model.


@pytest.mark.parametrize("size", [(8, 8, 1), (8, 16, 3)])
def test_what_is_shown_enlarged_comes_back_exactly(size):
  image = random_image(1, size)
  shown = session.enlarge(image, 64)
  assert shown.shape == (64, 64 * size[1] // size[0], 3)
  found, done = session.fit(Image.fromarray(shown), size)
  np.testing.assert_array_equal(found, image)
  assert done == ""


def test_other_sizes_are_cropped_to_the_middle_and_that_is_told():
  wide = np.zeros((20, 60, 3), np.uint8)
  wide[:, 18:42] = 255  # The middle square, and what resizing looks at beside it.
  found, done = session.fit(Image.fromarray(wide), (10, 10, 3))
  assert (found == 255).all()
  assert "20 x 60" in done and "10 x 10" in done


def test_transparent_parts_are_white():
  clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
  assert (session.fit(clear, (8, 8, 1))[0] == 255).all()


def test_a_painted_mask_comes_back_exactly():
  mask = np.random.default_rng(0).random((8, 16)) < 0.3
  layer = Image.fromarray(session.paint(mask, 32))
  np.testing.assert_array_equal(session.painted([layer], (8, 16, 3)), mask)


def layer(*parts, side=80):
  """An editor's layer of 8 x 8 pixels, 10 wide each, painted at (rows, columns)."""
  pixels = np.zeros((side, side, 4), np.uint8)
  for rows, columns in parts:
    pixels[rows, columns] = (*session.PAINT, 255)
  return Image.fromarray(pixels)


def test_a_pixel_is_masked_if_a_quarter_of_it_is_painted():
  brushed = layer((slice(0, 10), slice(0, 13)), (slice(40, 42), slice(40, 50)))  # 30 %, 20 %.
  want = box(0, 0, 1, 2)
  found = session.painted([brushed], SIZE)
  np.testing.assert_array_equal(found, want)


def test_layers_add_up_and_a_thin_line_counts_where_it_is_thickest():
  thin = layer((slice(0, 1), slice(0, 10)), (slice(20, 22), slice(0, 10)))
  np.testing.assert_array_equal(session.painted([thin], SIZE), box(2, 0, 1, 1))
  both = [layer((slice(0, 10), slice(0, 10))), layer((slice(70, 80), slice(70, 80)))]
  np.testing.assert_array_equal(session.painted(both, SIZE), box(0, 0, 1, 1) | box(7, 7, 1, 1))
  assert not session.painted([layer()], SIZE).any()
  assert not session.painted([], SIZE).any()


def test_a_mask_in_a_file_is_white_where_it_fills_in():
  mask = box(2, 3, 4, 5)
  small = Image.fromarray(mask.astype(np.uint8) * 255)
  np.testing.assert_array_equal(session.white(small, SIZE, (99, 99)), mask)
  large = small.resize((80, 80), Image.Resampling.NEAREST)
  np.testing.assert_array_equal(session.white(large, SIZE, (80, 80)), mask)
  with pytest.raises(ValueError, match=r"80 x 80 px: make it of the image's size, 30 x 20"):
    session.white(large, SIZE, (20, 30))


# Images.


def test_images_are_drawn_from_all_over_the_data_once_each():
  levels = np.arange(200, dtype=np.float32).reshape(200, 1, 1, 1) / 127.5 - 1
  labels = np.arange(200) // 100
  source = from_arrays("sorted", levels, labels, 2, class_names=("low", "high"))
  seen = []
  found = session.draw(source, 100, lambda done, total: seen.append((done, total)))
  values = found.images[:, 0, 0, 0]
  assert len(set(values.tolist())) == 100
  assert 30 < (values >= 100).sum() < 70
  np.testing.assert_array_equal(found.labels, values // 100)
  assert [found.label(i) for i in range(9)] == [("low", "high")[v // 100] for v in values[:9]]
  assert seen[-1] == (100, 100)
  assert len(session.draw(source, 999).images) == 200


def config_with(**evals):
  data = dict(name="digits", split="train", pp="")
  return {"data": data, "evals": evals}


def test_held_out_images_are_those_that_were_not_trained_on():
  train, test = (dict(name="digits", split=split, pp="") for split in ("train", "test"))
  gone = dict(name="npz:no_such_file.npz", split="all", pp="")
  config = config_with(a=dict(data=gone), b=dict(train=train, data=train), c=dict(test=test))
  assert session.held_out(config, SIZE).name == "digits:test"
  assert session.trained_on(config, SIZE).name == "digits:train"
  with pytest.raises(ValueError, match="no such file"):
    session.held_out(config_with(a=dict(data=gone)), SIZE)
  with pytest.raises(ValueError, match="names no such data"):
    session.held_out(config_with(b=dict(data=train)), SIZE)
  with pytest.raises(ValueError, match=r"8 x 8 x 1, the model takes 4 x 4 x 1"):
    session.held_out(config, (4, 4, 1))


# The session.


def test_the_last_picture_shows_the_samples(page, model):
  shown = list(page.sample("3,seven", 4, seed=5, steps=3))
  assert [text.split(":")[0] for _, text in shown[:-1]] == [f"Step {i} of 3" for i in (1, 2)]
  assert "4 samples: ddim, 3 steps" in shown[-1][1]
  samples = model.sample([3, 7], 4, seed=5, steps=3)
  ((only, _),) = page.sample("3,seven", 4, seed=5, steps=3, watch=False)
  assert only.shape == shown[-1][0].shape
  assert np.abs(only.astype(int) - shown[-1][0]).max() <= 1  # Two programs: rounding.
  tiled = pictures.grid(samples, 2)
  scale = only.shape[0] // tiled.shape[0]
  assert scale > 1
  np.testing.assert_array_equal(
    only[::scale, ::scale], np.broadcast_to(tiled, (*tiled.shape[:2], 3))
  )


def test_of_many_steps_a_few_are_shown_as_soon_as_they_are_there(page, monkeypatch):
  taken, blank = [], np.zeros((1, *SIZE), np.uint8)

  def steps(model, labels, num, *, every, steps, **settings):
    for step in range(1, steps + 1):
      if step % every == 0 or step == steps:
        taken.append(step)
        yield Denoised(step, steps - step, blank)

  monkeypatch.setattr(type(page.model), "steps", steps)
  monkeypatch.setattr(type(page), "timesteps", 100)
  monkeypatch.setattr(type(page.model), "check_sampling", lambda *args, **given: OWN.updated(given))
  shown = page.sample("none", 1, steps=100)
  assert taken == []
  assert next(shown)[1].startswith("Step 5 of 100") and taken == [5]
  texts = [text for _, text in shown]
  assert 15 < len(texts) <= FRAMES and texts[-2].startswith("Step 95 of 100")
  assert texts[-1].startswith("1 sample: ")


OWN = Sampling(steps=100)


def test_a_page_that_is_left_frees_the_model(page):
  shown = page.sample("none", 1, steps=3)
  next(shown)
  shown.close()
  assert not page._lock.locked()


def test_advanced_settings_reach_the_sampler(page, monkeypatch):
  asked = {}
  monkeypatch.setattr(type(page.model), "check_sampling", lambda *args, **given: asked | given)
  given = page._settings(None, None, None, None, "ddim", 3, "logsnr", 0.5, "x0", 1)
  assert {k: v for k, v in given.items() if v is not None} == dict(
    sampler="ddim", steps=3, spacing="logsnr", eta=0.5, head="x0"
  )
  labels = np.array([3])
  given = page._settings(labels, 2.0, 0.0, 1.0, "heun", 3, "uniform", 0, "", 1)
  assert given["cfg_channels"] == 1 and not given["eta"] and not given["head"]
  with pytest.raises(ValueError, match=r"cfg_channels=2 must be in 0\.\.1"):
    page._settings(labels, 2.0, 0.0, 1.0, "heun", 3, "uniform", 0, "", 2)


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(num=0), r"number of samples=0 must be in 1\.\.64"),
    (dict(num=None), r"number of samples=None must be a whole number"),
    (dict(seed=-1), r"seed=-1"),
    (dict(steps=21), r"steps=21 must be in 1\.\.20"),
    (dict(steps=2.5), r"steps=2\.5 must be a whole number"),
    (dict(sampler="euler"), r"sampler='euler' is not one of \['ddim'"),
    (dict(sampler="heun", eta=0.5), r"eta=0\.5: sampler='heun' takes no eta"),
    (dict(spacing="log"), r"spacing='log' is not one of"),
    (dict(head="v"), r"head='v' is not among"),
    (dict(label="sevn"), r"Did you mean 'seven'"),
    (dict(label="all", cfg_scale=-1), r"cfg_scale=-1 must be in"),
    (dict(label="all", cfg_scale=2.0, low=0.8, high=0.2), r"guidance_interval"),
  ],
)
def test_bad_settings_are_refused_before_anything_is_computed(page, monkeypatch, given, message):
  for name in ("sample", "steps"):
    monkeypatch.setattr(type(page.model), name, lambda *args, **given: pytest.fail("computed"))
  with pytest.raises(ValueError, match=message):
    list(page.sample(**given))


@pytest.mark.parametrize("ratio, count", [(0.5, 8), (0.0, 1), (1.0, 15)])
def test_a_random_mask_is_of_whole_patches(page, ratio, count):
  mask = page.random_mask(ratio, 0)
  tiles = mask.reshape(4, 2, 4, 2).mean(axis=(1, 3))
  assert set(np.unique(tiles)) <= {0, 1} and tiles.sum() == count
  assert ratio != 0.5 or (mask != page.random_mask(ratio, 1)).any()


def test_fillings_keep_what_is_known(page):
  image, mask = page.examples.images[0], box(2, 2, 3, 4)
  shown, text = page.fill(image, mask, "three", num=2, steps=2, resampling=1)
  captions = [caption for _, caption in shown]
  assert captions == ["image", "masked", "reconstruction", "diffusion 1", "diffusion 2"]
  assert text.startswith("19% masked")
  small = [session.fit(Image.fromarray(x), SIZE)[0] for x, _ in shown]
  np.testing.assert_array_equal(small[0], image)
  assert (small[1][mask] == session.HIDDEN).all()
  for filled in (small[1], *small[3:]):
    np.testing.assert_array_equal(filled[~mask], image[~mask])
  whole_patches = box(2, 2, 4, 4)
  np.testing.assert_array_equal(small[2][~whole_patches], image[~whole_patches])
  assert (small[3] != small[4]).any()


def test_a_mask_of_all_is_for_the_diffusion_alone_and_one_of_nothing_for_none(page):
  image, everything = page.examples.images[0], np.ones(SIZE[:2], bool)
  shown, text = page.fill(image, everything, "three", num=2, steps=2, resampling=1)
  assert [caption for _, caption in shown] == ["image", "masked", "diffusion 1", "diffusion 2"]
  assert "touches every patch" in text
  with pytest.raises(ValueError, match="Nothing is masked"):
    page.fill(image, ~everything)


def test_a_training_image_is_its_own_nearest_neighbour(page):
  seen = []
  known = session.draw(session.trained_on(session.config_of(page.model.folder), SIZE), 64)
  first = page.neighbours(known.images[5], 3, lambda done, total: seen.append(done))
  np.testing.assert_array_equal(first[0][0], session.enlarge(known.images[5]))
  assert first[0][1] == f"{known.label(5)} 1.000"
  likeness = [float(text.split()[-1]) for _, text in first]
  assert likeness == sorted(likeness, reverse=True) and len(seen) > 1
  again = []
  page.neighbours(known.images[6], 3, lambda done, total: again.append(done))
  assert again == []  # Represented once.
  with pytest.raises(ValueError, match=r"k=51 must be in 1\.\.50"):
    page.neighbours(known.images[5], 51)


def test_the_examples_were_not_trained_on_and_the_line_says_what_it_is(page, model):
  assert page.examples.name == "digits:test" and len(page.examples.images) == 16
  line = about.line(model)
  for fact in ("run", "step 7", "ema", "nano/2", "8 x 8 x 1 px", "10 classes", "digits, train"):
    assert fact in line, fact


@pytest.mark.parametrize(
  "name, shown",
  [
    ("latents:/data/my latents/", "latents:my latents"),
    ("/vaes/kl8", "kl8"),
    ("tfds:imagenet_resized/64x64", "tfds:imagenet_resized/64x64"),
    ("hf:org/repo", "hf:org/repo"),
  ],
)
def test_visitors_are_not_told_where_things_are(name, shown):
  assert about.short(name) == shown


def lacking(model, **changes):
  """The session of a model that is described otherwise."""
  described = dataclasses.replace(model.description, **changes)
  stand_in = type("StandIn", (), {"description": described, "num_classes": 0, "folder": "x"})()
  return Session(stand_in, no_training="exported")


def test_what_a_model_cannot_is_said_with_the_reason(model):
  noised = {"timesteps": "uniform", "mask_ratio": 0.5}
  clean = {"timesteps": "clean", "mask_ratio": 0.75}
  mae, dit = lacking(model, streams={"a": clean}), lacking(model, streams={"a": noised})
  for task in ("sample", "inpaint"):
    assert "clean images only" in mae.lacks(task) and dit.lacks(task) == ""
  assert mae.lacks("reconstruct") == "" and "never saw clean images" in dit.lacks("reconstruct")
  assert "without labels" in mae.lacks("labels")
  assert "exported" in mae.lacks("neighbours")
  assert (mae.looks_at, dit.looks_at) == (0, 1)  # 5 % of 20 timesteps.
  with pytest.raises(ValueError, match="cannot do that: it was trained on clean images only"):
    next(mae.sample())


# The page.


def test_without_gradio_one_line_says_what_to_do(model, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "gradio", None)
  for name in ("page",):
    monkeypatch.delitem(sys.modules, f"umd.serve.{name}", raising=False)
  with pytest.raises(SystemExit) as stop:
    demo.main(["--workdir", model.folder])
  assert stop.value.code == 1
  assert "bash run.sh demo" in capsys.readouterr().err


def test_run_sh_knows_the_demo():
  usage = subprocess.run(["bash", "run.sh", "help"], cwd=ROOT, capture_output=True, text=True)
  assert "bash run.sh demo" in usage.stdout and "umd.serve.demo" in usage.stdout


@pytest.mark.skipif(
  importlib.util.find_spec("gradio") is None, reason="Gradio is not installed (requirements-demo)"
)
def test_programs_use_the_page_through_its_endpoints(page, tmp_path):
  from gradio_client import Client, handle_file
  from gradio_client.exceptions import AppError

  from umd.serve import page as layout

  blocks = layout.build(page)
  address = layout.serve(blocks, "127.0.0.1", None, share=False, wait=False)
  try:
    client = Client(address, verbose=False)
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {
      *("/sample", "/fill", "/neighbours")
    }
    given = dict(label="three", num=2, seed=1, steps=2, watch=False, api_name="/sample")
    grid, status = client.predict(**given)
    assert np.asarray(Image.open(grid)).ndim == 3 and "2 samples" in status
    changed = dict(watch=True, steps=3, sampler="dpmpp_2m", spacing="logsnr", head="x0")
    watched = client.submit(**given | changed)
    assert "dpmpp_2m, 3 steps" in watched.result()[1]
    assert [text.split(":")[0] for _, text in watched.outputs()[:-1]] == [
      "Step 1 of 3",
      "Step 2 of 3",
    ]
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.fromarray(page.examples.images[0][..., 0]).save(image)
    Image.fromarray(box(0, 0, 2, 2).astype(np.uint8) * 255).save(mask)
    image, mask = handle_file(str(image)), handle_file(str(mask))
    filled, text = client.predict(image, mask, num=1, steps=2, resampling=1, api_name="/fill")
    assert len(filled) == 4 and text.startswith("6% masked")
    assert len(client.predict(image, k=5, api_name="/neighbours")) == 5
    with pytest.raises(AppError, match="seed=-1 must be in"):
      client.predict(**{**given, "seed": -1})
    with urllib.request.urlopen(address) as answer:
      assert "default-src 'self'" in answer.headers["content-security-policy"]
  finally:
    blocks.close()

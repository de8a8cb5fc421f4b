"""The page that a model is tried out on: what its functions do, and the page where Gradio is."""

import dataclasses
import importlib.util
import sys
import urllib.request

import jax
import numpy as np
import pretrained_runs
import pytest
from PIL import Image

from umd import load
from umd.data import from_arrays
from umd.samplers import Sampling
from umd.serve import demo, session
from umd.serve.session import FRAMES, Session
from umd.trained import pictures
from umd.trained.model import Pretrained

SIZE = pretrained_runs.SIZE


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


def enlarged(image, scale):
  """A Pillow image in which each pixel of an array is a block."""
  return Image.fromarray(image.squeeze().repeat(scale, axis=0).repeat(scale, axis=1))


def box(top, left, height, width, size=SIZE):
  mask = np.zeros(size[:2], bool)
  mask[top : top + height, left : left + width] = True
  return mask


@pytest.mark.parametrize("size", [(8, 8, 1), (8, 16, 3)])
def test_what_is_enlarged_comes_back_exactly(size):
  image = np.random.default_rng(1).integers(0, 256, size, np.uint8)
  np.testing.assert_array_equal(session.fit(enlarged(image, 8), size), image)
  mask = np.random.default_rng(0).random(size[:2]) < 0.3
  painted = enlarged(mask.astype(np.uint8) * 255, 32)
  np.testing.assert_array_equal(session.to_mask([painted], size), mask)


def test_other_sizes_are_cropped_to_the_middle_and_transparent_parts_are_white():
  wide = np.zeros((20, 60, 3), np.uint8)
  wide[:, 20:40] = 200
  assert (session.fit(Image.fromarray(wide), (10, 10, 3)) == 200).all()
  clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
  assert (session.fit(clear, (8, 8, 1)) == 255).all()


def test_a_pixel_is_masked_if_a_quarter_of_it_is_painted():
  layer = np.zeros((80, 80), np.uint8)
  layer[0:10, 0:13] = 255  # all of the first pixel, 30 % of the second
  layer[40:42, 40:50] = 255  # 20 %
  other = np.zeros((80, 80), np.uint8)
  other[70:, 70:] = 255
  mask = session.to_mask([Image.fromarray(layer), Image.fromarray(other)], SIZE)
  np.testing.assert_array_equal(mask, box(0, 0, 1, 2) | box(7, 7, 1, 1))
  assert not session.to_mask([], SIZE).any()


def test_images_are_drawn_from_all_over_the_data_once_each():
  levels = np.arange(200, dtype=np.float32).reshape(200, 1, 1, 1) / 127.5 - 1
  labels = np.arange(200) // 100
  source = from_arrays("sorted", levels, labels, 2, class_names=("low", "high"))
  calls = []
  drawn = session.draw(source, 100, lambda done, total: calls.append((done, total)))
  values = drawn.images[:, 0, 0, 0]
  assert len(set(values.tolist())) == 100 and 30 < (values >= 100).sum() < 70
  assert drawn.captions == [("low", "high")[v // 100] for v in values]
  assert calls[-1] == (100, 100)
  assert len(session.draw(source, 999).images) == 200


def test_held_out_images_are_those_that_were_not_trained_on():
  train, test = (dict(name="digits", split=split, pp="") for split in ("train", "test"))
  gone = dict(name="npz:no_such_file.npz", split="all", pp="")
  evals = dict(a=dict(data=gone), b=dict(train=train, data=train), c=dict(test=test))
  config = dict(data=train, evals=evals)
  assert session.first_source(session.held_out(config), SIZE)[0].name == "digits:test"
  assert session.first_source(session.trained_on(config), SIZE)[0].name == "digits:train"
  assert "no such file" in session.first_source([gone], SIZE)[1]
  assert "does not name such data" in session.first_source(session.trained_on({}), SIZE)[1]
  assert "8 x 8 x 1, the model takes 4 x 4 x 1" in session.first_source([test], (4, 4, 1))[1]


def test_the_last_picture_shows_the_samples(page, model):
  shown = list(page.sample("3,seven", 4, seed=5, steps=3))
  assert [text.split(":")[0] for _, text in shown[:-1]] == [f"Step {i} of 3" for i in (1, 2)]
  assert "4 samples: ddim, 3 steps" in shown[-1][1]
  ((only, _),) = page.sample("3,seven", 4, seed=5, steps=3, watch=False)
  samples = model.sample([3, 7], 4, seed=5, steps=3)
  np.testing.assert_array_equal(only, pictures.grid(samples, 2))
  assert np.abs(only.astype(int) - shown[-1][0]).max() <= 1  # Two programs: rounding.


def test_of_many_steps_a_few_are_shown(page, monkeypatch):
  def steps(model, labels, num, *, every, steps, **settings):
    for step in range(every, steps + 1, every):
      yield step, steps - step, np.zeros((1, *SIZE), np.uint8)

  sampling = Sampling(steps=100)
  monkeypatch.setattr(Pretrained, "steps", steps)
  monkeypatch.setattr(Pretrained, "check_sampling", lambda *args, **given: sampling)
  texts = [text for _, text in page.sample("none", 1, steps=100)]
  assert texts[0].startswith("Step 5 of 100") and texts[-2].startswith("Step 95 of 100")
  assert len(texts) <= FRAMES


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(num=0), "num=0 must be at least 1"),
    (dict(seed=-1), "seed=-1"),
    (dict(steps=21), "steps=21"),
    (dict(sampler="heun", eta=0.5), r"sampler='heun' takes no eta"),
    (dict(label="sevn"), "Did you mean 'seven'"),
    (dict(label="all", guidance_interval=(0.8, 0.2)), "guidance_interval"),
  ],
)
def test_bad_settings_are_refused(page, given, message):
  with pytest.raises(ValueError, match=message):
    list(page.sample(**given))


def test_without_labels_nothing_is_guided(page):
  ((_, text),) = page.sample("none", 1, steps=1, watch=False, cfg_scale=3.0, cfg_channels=1)
  assert "guidance" not in text


@pytest.mark.parametrize("ratio, count", [(0.5, 8), (0.0, 1), (1.0, 15)])
def test_a_random_mask_is_of_whole_patches(page, ratio, count):
  mask = page.random_mask(ratio, 0)
  tiles = mask.reshape(4, 2, 4, 2).mean(axis=(1, 3))
  assert set(np.unique(tiles)) <= {0, 1} and tiles.sum() == count
  assert ratio != 0.5 or (mask != page.random_mask(ratio, 1)).any()


def test_fillings_keep_what_is_known(page):
  image, mask = page.examples.images[0], box(2, 2, 3, 4)
  shown, text = page.fill(image, mask, "three", num=2, steps=2, resampling=1)
  captions = ["image", "masked", "reconstruction", "diffusion 1", "diffusion 2"]
  assert [caption for _, caption in shown] == captions and text.startswith("19% masked")
  images = [pixels for pixels, _ in shown]
  np.testing.assert_array_equal(images[0], image)
  assert (images[1][mask] == session.HIDDEN).all()
  for filled in (images[1], *images[3:]):
    np.testing.assert_array_equal(filled[~mask], image[~mask])
  whole_patches = box(2, 2, 4, 4)
  np.testing.assert_array_equal(images[2][~whole_patches], image[~whole_patches])
  assert (images[3] != images[4]).any()


def test_a_mask_of_all_is_for_the_diffusion_alone_and_one_of_nothing_for_none(page):
  image, everything = page.examples.images[0], np.ones(SIZE[:2], bool)
  shown, text = page.fill(image, everything, "three", num=2, steps=2, resampling=1)
  assert [caption for _, caption in shown] == ["image", "masked", "diffusion 1", "diffusion 2"]
  assert "hides every patch" in text
  with pytest.raises(ValueError, match="Nothing is masked"):
    page.fill(image, ~everything)


def test_a_training_image_is_its_own_nearest_neighbour(page):
  calls = []
  tell = lambda done, total: calls.append(done)
  known = session.draw(page.training, 64)
  nearest = page.neighbours(known.images[5], 3, tell)
  np.testing.assert_array_equal(nearest[0][0], known.images[5])
  assert nearest[0][1] == f"{known.captions[5]} 1.000" and calls == [64]
  cosines = [float(text.split()[-1]) for _, text in nearest]
  assert cosines == sorted(cosines, reverse=True)
  page.neighbours(known.images[6], 3, tell)
  assert calls == [64]  # Represented once.


def test_the_line_above_the_page_says_which_model_it_is(page, model):
  assert page.examples.name == "digits:test" and len(page.examples.images) == 16
  line = session.describe(model)
  for fact in (
    "run",
    "step 7",
    "ema",
    "autoencoder nano/2",
    "8 x 8 x 1 px",
    "10 classes",
    "on digits",
  ):
    assert fact in line, fact


@pytest.mark.parametrize(
  "name, shown",
  [
    ("latents:/data/my latents/", "latents:my latents"),
    ("/images/mine", "mine"),
    ("tfds:imagenet_resized/64x64", "tfds:imagenet_resized/64x64"),
  ],
)
def test_visitors_do_not_see_where_the_data_are(name, shown):
  assert session.short_name(name) == shown


def test_what_a_model_cannot_do_is_said_with_the_reason(model):
  def session_of(**stream):
    description = dataclasses.replace(model.description, streams={"a": stream})
    model_like = type("Model", (), {"description": description})()
    return Session(model_like, no_training="exported")

  mae = session_of(timesteps="clean", mask_ratio=0.75)
  dit = session_of(timesteps="uniform", mask_ratio=0.5)
  assert "clean images only" in mae.lacks("sample") and dit.lacks("sample") == ""
  assert mae.lacks("reconstruct") == "" and "never saw clean images" in dit.lacks("reconstruct")
  assert "exported" in mae.lacks("neighbours")
  assert (mae.represented_at, dit.represented_at) == (0, 1)  # 5 % of 20 timesteps


def test_without_gradio_one_line_says_what_to_do(model, monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  monkeypatch.delitem(sys.modules, "umd.serve.page", raising=False)
  with pytest.raises(SystemExit, match=r"error: Gradio is not installed.*bash run.sh demo"):
    demo.main(["--workdir", model.folder])


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")
def test_programs_use_the_page_through_its_endpoints(page, tmp_path):
  from gradio_client import Client, handle_file
  from gradio_client.exceptions import AppError

  from umd.serve import page as layout

  blocks = layout.build(page)
  address = layout.serve(blocks, "127.0.0.1", None, share=False, wait=False)
  try:
    client = Client(address, verbose=False)
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/sample", "/fill", "/neighbours"}
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
    for bad in (dict(seed=-1), dict(sampler="euler"), dict(label="sevn")):
      with pytest.raises(AppError):
        client.predict(**given | bad)
    with urllib.request.urlopen(address) as answer:
      assert "default-src 'self'" in answer.headers["content-security-policy"]
  finally:
    blocks.close()

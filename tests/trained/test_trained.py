"""A trained model as a user meets it: what it does to pixels, and what it refuses."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_runs
import pytest
from pretrained_runs import NAMES, SIZE, STEPS, T

from umd import load
from umd.codecs import codec
from umd.devices.mesh import make_mesh
from umd.metrics.quantize import quantize
from umd.samplers import Sampling
from umd.samplers.keys import example_keys
from umd.trained import inputs, programs, saved

N = 6
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *SIZE), dtype=np.uint8)
FLOATS = (IMAGES / 127.5 - 1).astype(np.float32)
BOX = np.zeros(SIZE[:2], bool)
BOX[1:4, 2:5] = True


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Stages, of which the last one that was started knows labels."""
  root = tmp_path_factory.mktemp("run")
  first = pretrained_runs.config("pretrain")
  pretrained_runs.make(root / "z_first", first, classes=0, names=(), steps=(5,))
  pretrained_runs.make(root / "finetune", pretrained_runs.config())
  return str(root)


@pytest.fixture(scope="module")
def model(workdir):
  return load(workdir)


@functools.cache
def oracle(model, name, **settings):
  """The method of `Inference` of a model, compiled: (params, keys, ...) -> arrays."""
  inference = model.description.inference()
  return jax.jit(functools.partial(getattr(inference, name), **settings))


def test_the_last_stage_is_opened_with_its_averaged_weights_of_the_newest_step(workdir, model):
  assert model.folder == os.path.join(workdir, "finetune")
  assert (model.weights, model.step) == ("ema", 7)
  assert (model.image_size, model.num_classes, model.class_names) == (SIZE, 10, NAMES)
  expected = pretrained_runs.params_of(model.description.inference().model, 7)
  for found, wanted in zip(
    jax.tree.leaves(model._weights.model), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(found, wanted)
  assert load(os.path.join(workdir, "z_first")).num_classes == 0


@pytest.mark.parametrize(
  "given, seed", [({"weights": "raw"}, 107), ({"step": 3}, 3), ({"step": "best"}, 3)]
)
def test_weights_are_chosen_by_kind_and_step(workdir, model, given, seed):
  found = load(workdir, **given)
  expected = pretrained_runs.params_of(model.description.inference().model, seed)
  first = lambda tree: np.asarray(jax.tree.leaves(tree)[0])
  np.testing.assert_array_equal(first(found._weights.model), first(expected))
  assert found.sha256 != model.sha256


def test_samples_are_made_as_the_run_made_its_own_unless_it_is_said(model):
  assert model.sampling == Sampling(sampler="ddim", steps=STEPS, head="eps", cfg_scale=2.0)
  assert model.check_sampling("all") == model.sampling
  assert model.check_sampling().cfg_scale == 1.0  # Nothing to guide by.
  assert model.check_sampling(3, steps=2, cfg_scale=None) == dataclasses.replace(
    model.sampling, steps=2
  )


def test_representations_are_those_of_inference(model):
  params = pretrained_runs.params_of(model.description.inference().model, 7)
  keys = example_keys(5, jnp.arange(N))
  wanted = oracle(model, "represent", t=3)(params, jnp.asarray(FLOATS), keys)["mean"]
  found = model.represent(IMAGES, "mean", t=3, seed=5, batch_size=4)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("floats", [FLOATS, FLOATS.astype(np.float64), jnp.asarray(FLOATS)])
def test_floats_are_taken_as_they_are(floats):
  found = inputs.as_images(floats, SIZE)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, FLOATS)
  np.testing.assert_allclose(FLOATS, programs.to_floats(jnp.asarray(IMAGES)), atol=1e-6)


def test_reconstructions_keep_what_the_encoder_sees(model):
  filled, masks = model.reconstruct(IMAGES, 0.75, seed=1)
  assert (filled.dtype, masks.dtype) == (np.uint8, bool)
  np.testing.assert_array_equal(masks.mean(axis=(1, 2)), 0.75)
  np.testing.assert_array_equal(filled[~masks], IMAGES[~masks])
  assert (filled != IMAGES)[masks].mean() > 0.5
  assert len({mask.tobytes() for mask in masks}) > 1


def test_a_mask_of_pixels_hides_whole_patches_and_what_is_below_them(model):
  masks = np.zeros((N, 8, 8), bool)
  masks[:, 1:4, 2:5] = True  # Patches of 2: 2 x 2 of them.
  masks[1, 7, 7] = True  # One more.
  filled, hidden = model.reconstruct(IMAGES, mask=masks)
  wanted = np.zeros((N, 8, 8), bool)
  wanted[:, 0:4, 2:6] = True
  wanted[1, 6:8, 6:8] = True
  np.testing.assert_array_equal(hidden, wanted)
  np.testing.assert_array_equal(filled[~hidden], IMAGES[~hidden])
  other = np.where(hidden[..., None], 255 - IMAGES, IMAGES)
  np.testing.assert_array_equal(model.reconstruct(other, mask=masks)[0], filled)
  assert (filled != IMAGES)[hidden].mean() > 0.5


def test_samples_are_those_of_inference(model):
  params = pretrained_runs.params_of(model.description.inference().model, 7)
  draw = oracle(model, "sample", sampling=model.sampling)
  keys, labels = example_keys(3, jnp.arange(8)), jnp.array([3, 7] * 4)
  wanted = np.asarray(quantize(draw(params, keys, labels), "round"))
  for labels in ([3, 7], ["three", "7"], np.array([3, 7])):
    found = model.sample(labels, 8, seed=3)
    assert (found.dtype, found.shape) == (np.uint8, (8, *SIZE))
    assert np.abs(found - wanted).max() <= 1
  assert wanted.std() > 10  # Not all black and white, nor all grey.


def test_a_sample_depends_on_its_place_and_not_on_its_company(model):
  many, places = model.sample([3, 7], 8, seed=3), [5, 0, 7, 12, 2, 1, 9, 30]
  found = np.zeros((8, *SIZE), np.uint8)
  for rows, images in model.draw(places, [3, 7], seed=3):
    found[rows] = images
  for place, image in zip(places, found, strict=True):
    if place < 8:
      assert np.abs(image.astype(int) - many[place]).max() <= 1
  assert (model.sample([3, 7], 8, seed=4) != many).mean() > 0.3


def test_a_trajectory_ends_in_the_samples(model):
  found = model.trajectory([3, 7], 8, seed=3)
  assert (found.x0.shape, found.x_t.shape) == ((STEPS, 8, *SIZE), (STEPS + 1, 8, *SIZE))
  samples = model.sample([3, 7], 8, seed=3)
  assert np.abs(found.x_t[-1].astype(int) - samples).max() <= 1
  assert (found.x_t[0] != samples).mean() > 0.3


OTHERS = ("ddpm", "heun", "dpmpp_2m", "ab2")


@pytest.mark.parametrize("sampler", OTHERS)
def test_every_sampler_is_taken_step_by_step_as_at_once(model, sampler):
  given = dict(labels=[3, 7], num=3, seed=3, sampler=sampler, head="x0", quantize="none")
  *on_the_way, last = model.steps(**given)
  assert [(d.step, d.t) for d in (*on_the_way, last)] == [(1, 15), (2, 10), (3, 5), (4, 0)]
  assert last.x0.shape == (3, *SIZE)  # Of a batch that the devices share: one was filled up.
  np.testing.assert_allclose(last.x0, model.sample(**given), atol=1e-3)
  assert np.abs(on_the_way[0].x0 - last.x0).mean() > 0.02
  assert (np.abs(last.x0) < 1).mean() > 0.1  # Else clipping would make all samplers alike.


def test_steps_show_the_way_that_a_trajectory_has_and_compile_once(model):
  given = dict(labels=[3, 7], num=8, seed=3)
  found, steps = model.trajectory(**given), list(model.steps(**given))
  for wanted, step in zip(found.x0, steps, strict=True):
    assert (step.x0.dtype, step.x0.shape) == (np.uint8, wanted.shape)
    assert np.abs(step.x0.astype(int) - wanted).max() <= 1
  programs = {key: p for key, p in model._programs._compiled.items() if key[0] == "advance"}
  few = list(model.steps(**given, steps=7, every=3, spacing="quadratic"))
  assert [d.step for d in few] == [3, 6, 7] and few[-1].t == 0
  again = {key: p for key, p in model._programs._compiled.items() if key[0] == "advance"}
  assert again.keys() == programs.keys()  # Neither numbers nor places of steps are in a program.
  own = next(p for key, p in again.items() if dict(key[1:])["sampling"].sampler == "ddim")
  assert own._cache_size() == 1
  samples = model.sample(**given, steps=7, spacing="quadratic")
  assert np.abs(few[-1].x0.astype(int) - samples).max() <= 1


def test_two_devices_step_as_one_does(workdir):
  one, two = (load(workdir, devices=jax.local_devices()[:n]) for n in (1, 2))
  given = dict(labels=[3, 7], num=3, seed=3, sampler="dpmpp_2m", quantize="none")
  for a, b in zip(one.steps(**given), two.steps(**given), strict=True):
    assert (a.step, a.t) == (b.step, b.t)
    np.testing.assert_allclose(a.x0, b.x0, atol=1e-3)


def test_inpainting_keeps_what_is_known_and_does_not_look_at_the_rest(model):
  made = model.inpaint(IMAGES, BOX, 3, resampling=2)
  np.testing.assert_array_equal(made[:, ~BOX], IMAGES[:, ~BOX])
  other = IMAGES.copy()
  other[:, BOX] = 0
  np.testing.assert_array_equal(model.inpaint(other, BOX, 3, resampling=2), made)
  assert (made[:, BOX] != IMAGES[:, BOX]).mean() > 0.5
  ways = model.inpaint(IMAGES[0], BOX, 3, num=6, resampling=2)
  np.testing.assert_array_equal(ways[0], made[0])
  assert len({way.tobytes() for way in ways}) == 6


def test_a_tile_is_filled_in_if_any_of_its_pixels_is():
  mask = np.zeros((1, 8, 12), bool)
  mask[0, 3, 4] = mask[0, 7, 11] = True
  wanted = np.zeros((4, 4), bool)
  wanted[1, 1] = wanted[3, 3] = True
  np.testing.assert_array_equal(inputs.tiles(mask, (4, 4))[0], wanted)


@pytest.fixture
def latent_model(tmp_path, small_vae):
  """Of 16 px images, which it sees as 8 x 8 latents."""
  latents = dict(vae="small", dtype="float32", chunk=8, tile=0)
  settings = pretrained_runs.config()
  settings.latents = latents
  opened = codec.make(latents, make_mesh())
  return load(pretrained_runs.make(tmp_path, settings, codec=opened, size=(16, 16, 3)))


def test_a_model_of_latents_takes_and_gives_pixels(latent_model):
  images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
  mask = np.zeros((16, 16), bool)
  mask[3:8, 5] = True
  assert latent_model.image_size == (16, 16, 3) and not latent_model.sampling.clip_x0
  made = latent_model.inpaint(images, mask, 3, resampling=1, steps=2)
  np.testing.assert_array_equal(made[:, ~mask], images[:, ~mask])
  assert (made[:, mask] != images[:, mask]).any()
  about = dataclasses.replace(latent_model.description, vae_sha256="1" * 64)
  with pytest.raises(ValueError, match="Give the vae that it was trained with"):
    saved.TrainedRun(latent_model.folder, about).open_codec(make_mesh())


@pytest.mark.parametrize(
  "call, told",
  [
    (lambda m: m.represent(IMAGES[:, :4]), r"images of shape \(6, 4, 8, 1\).*8 x 8 x 1.*resize"),
    (lambda m: m.represent(2 * FLOATS), r"must be in \[-1, 1\].*uint8"),
    (lambda m: m.represent(FLOATS * np.nan), r"must be in \[-1, 1\]"),
    (lambda m: m.represent(IMAGES.astype(int)), r"type int64.*uint8, or floats"),
    (lambda m: m.represent(IMAGES, "cls"), r"features='cls'.*'class', 'mean', 'patches'"),
    (lambda m: m.represent(IMAGES, t=T + 1), rf"t={T + 1} must be in \[0, {T}\]"),
    (lambda m: m.represent(IMAGES, seed=-1), r"seed=-1 must be in"),
    (lambda m: m.represent(IMAGES, batch_size=0), r"batch_size=0 must be at least 1"),
    (lambda m: m.reconstruct(IMAGES, 0.0), r"mask_ratio=0\.0 masks none of 16 patches"),
    (lambda m: m.reconstruct(IMAGES, mask=~BOX & BOX), r"marks no pixel"),
    (lambda m: m.reconstruct(IMAGES, mask=np.ones((8, 8))), r"hides every patch"),
    (lambda m: m.inpaint(IMAGES, BOX[:4]), r"mask of shape \(4, 8\).*\[8, 8\].*\[6, 8, 8\]"),
    (lambda m: m.inpaint(IMAGES, 255 * BOX), r"holds 0 to 255: give True"),
    (lambda m: m.inpaint(IMAGES, BOX, [1, 2]), r"2 labels for 6 images"),
    (lambda m: m.inpaint(IMAGES, BOX, num=3), r"num=3, but 6 images"),
    (lambda m: m.sample("thre"), r"'thre' is no class.*Did you mean 'three'.*0\.\.9.*nine"),
    (lambda m: m.sample(10), r"label 10 must be in 0\.\.9"),
    (lambda m: m.sample([1.5]), r"label 1\.5 must be in 0\.\.9"),
    (lambda m: m.sample(1, num=0), r"num=0 must be at least 1"),
    (lambda m: m.sample(1, spacing="log"), r"spacing='log' is not one of \['uniform'"),
    (lambda m: m.sample(1, sampler="ab2", eta=0.5), r"eta=0\.5: sampler='ab2' takes no eta"),
    (lambda m: m.steps(1, every=0), r"every=0 must be at least 1"),
    (lambda m: m.steps(1, seed=-1), r"seed=-1 must be in"),
    (lambda m: m.steps(1, steps=T + 1), rf"steps={T + 1} must be in \[1, timesteps={T}\]"),
    (lambda m: m.sample(1, stps=3), r"'stps'\. Did you mean 'steps'.*'eta'"),
    (lambda m: m.sample(1, steps=T + 1), rf"steps={T + 1} must be in \[1, timesteps={T}\]"),
    (lambda m: m.sample(cfg_scale=2.0), r"cfg_scale=2\.0 guides by labels"),
    (lambda m: m.sample(1, quantize="floor"), r"quantize='floor' is not one of"),
  ],
)
def test_what_makes_no_sense_is_refused_with_a_remedy(model, call, told):
  with pytest.raises(ValueError, match=told):
    call(model)


def test_a_model_is_not_asked_for_what_it_was_not_trained_for(workdir, tmp_path):
  unlabelled = load(os.path.join(workdir, "z_first"))
  with pytest.raises(ValueError, match=r"labels=3: the model was trained without labels"):
    unlabelled.sample(3)
  for method, told in (("mae", "clean images only"), ("dit", "trained without masks")):
    settings = pretrained_runs.config("pretrain", f",method={method}")
    path = pretrained_runs.make(tmp_path / method, settings, 0, (), steps=(1,))
    about = saved.open_run(path).description
    task, other = ("sample", "reconstruct") if method == "mae" else ("reconstruct", "sample")
    assert told in about.lacks(task) and not about.lacks(other)
    unlabelled.description = about
    with pytest.raises(ValueError, match=told):
      getattr(unlabelled, task)(*([] if task == "sample" else [IMAGES]))


@pytest.mark.parametrize(
  "given, told",
  [
    ({"step": 4}, r"step=4: .* has no such checkpoint; it has 3, 7"),
    ({"step": "last"}, r"step='last' must be a number, 'newest' or 'best'"),
    ({"weights": "mean"}, r"weights='mean' is not one of \['ema', 'raw'\]"),
    ({"dtype": "float16"}, r"dtype='float16' must be 'float32', 'bfloat16'"),
  ],
)
def test_weights_that_there_are_not_are_told(workdir, given, told):
  with pytest.raises((ValueError, FileNotFoundError), match=told):
    load(workdir, **given)


def test_folders_that_hold_no_model_are_told(workdir, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"holds no run: no such folder"):
    load(str(tmp_path / "nothing"))
  with pytest.raises(FileNotFoundError, match=r"holds no run: there is none"):
    load(str(tmp_path))
  other = tmp_path / "probe"
  other.mkdir()
  (other / "config.json").write_text('{"trainer": "linear_probe", "init_from": "runs/a"}')
  with pytest.raises(
    ValueError, match=r"'linear_probe', which leaves no model that makes images.*'runs/a'"
  ):
    load(str(other))
  path = tmp_path / "run"
  shutil.copytree(os.path.join(workdir, "finetune"), path)
  shutil.rmtree(path / "checkpoints" / "3")
  (path / "checkpoints" / "7" / "state" / "_METADATA").write_text("{}")
  with pytest.raises(ValueError, match=r"step=7.*damaged.*_METADATA"):
    load(str(path), step=7)


def test_importing_umd_imports_nothing():
  code = "import sys, umd; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0

"""Latents from end to end: a VAE trained here, a model of its latents, stored ones, evaluations.

The images are scikit-learn's digits at 16 px, the VAE halves their sides twice.
"""

import json
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import stand_ins
from ml_collections import ConfigDict

from configs import common, methods, vae_tiny
from tools import encode_latents
from trainers import diffusion, stages
from trainers.config.check import read_stage
from umd import data
from umd.codecs import vae_files
from umd.codecs.vae import Architecture
from umd.devices import mesh
from umd.devices.mesh import make_mesh
from umd.models.network import param_shapes
from umd.runs import checkpoint
from umd.trained import saved

SIZE, STEPS = 16, 3
TRAIN, TEST = (
  common.data("digits", split, f"resize({SIZE})") for split in ("train[:320]", "test[:64]")
)


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Several are the matter of test_codec.py; here they would only be compiled for."""
  every = mesh.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    one = lambda devices=None, fsdp=1: every(devices or jax.devices()[:1])
    patch.setattr(mesh, "make_mesh", one)
    yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  """Folder of a VAE of grey images with random weights."""
  architecture = Architecture(
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 4, 4),
    layers_per_block=1,
    norm_num_groups=2,
    mid_block_add_attention=False,
  )
  path = str(tmp_path_factory.mktemp("vae"))
  vae_files.save(path, architecture, stand_ins.random_weights(architecture).params)
  return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """npz file of 96 training images at 16 px, for the tool."""
  source = data.load(**TRAIN)
  path = str(tmp_path_factory.mktemp("images") / "digits.npz")
  pixels, labels = source.arrays()
  rgb = np.clip(np.round((pixels[:96] + 1) * 127.5), 0, 255).astype(np.uint8)
  np.savez(path, images=rgb, labels=labels[:96])
  return path


def make_config(vae, train=TRAIN, test=TEST, **changes):
  """A stage that trains a nano model on latents, with the evaluators that `changes` name."""
  arguments = "variant=nano/1,dtype=float32,path=linear,timesteps=20,adaln=false"
  a = common.parse_arg(arguments, common.ARGUMENTS)
  a.batch_size = 32
  sampling = common.sampling(steps=4, cfg_scale=2.0, cfg_channels=3)
  evals = dict(
    losses=dict(type="losses", data=test, num=64, bins=1),
    fewshot=dict(type="fewshot", train=test, test=test, shots=(2,), seeds=1, pixels=False),
    reconstruction=dict(type="reconstruction", data=TEST, mask_ratio=0.5, num=64, scale=1),
    generation=dict(
      type="generation", num=20, sampling=sampling, features="inception", reference=TEST,
      metrics=("fid",), scale=1,
    ),
  )  # fmt: skip
  chosen = changes.pop("evals", ())
  config = common.diffusion(
    a,
    data=train,
    streams=methods.streams(0.5, 0.25, 0.5),
    optim=common.optim(1e-3, 0.0, 0.95),
    steps=STEPS,
    use_labels=True,
    label_drop_prob=0.1,
    ema_decay=0.9,
    evals={name: dict(evals[name], every=0) for name in chosen},
    summary=("losses/*",),
    latents=dict(vae=vae, dtype="float32", chunk=4, tile=0),
    log_every=1,
    checkpoint_every=STEPS,
  )
  return ConfigDict(config | changes)


def losses(workdir):
  rows = map(json.loads, Path(workdir, "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def run_with_all_evaluators(config, workdir):
  """Summary's metrics; random projections stand for Inception."""
  with pytest.MonkeyPatch.context() as patch:
    stand_ins.small_inception(patch.setattr)
    (summary,) = stages.run(config, workdir)
  return summary["metrics"]


EVERY = ("losses", "fewshot", "reconstruction", "generation")


@pytest.fixture(scope="module")
def trained(vae, tmp_path_factory):
  """Workdir and metrics of a model of latents that were made on the fly."""
  workdir = str(tmp_path_factory.mktemp("run"))
  return workdir, run_with_all_evaluators(make_config(vae, evals=EVERY), workdir)


def test_every_evaluator_sees_what_it_must(trained):
  workdir, found = trained
  for name in ("codec_mse", "masked_mse", "mean_image_mse"):  # Whatever they are of such a VAE.
    assert np.isfinite(found[f"reconstruction/{name}"])
  assert np.isfinite(found["generation/fid_20"])
  assert 0 <= found["fewshot/class_strict_2shot_mean"] <= 1
  assert np.isfinite(found["losses/ema/clean/x0/t0"])
  for path in Path(workdir, "images").rglob("*.png"):
    with PIL.Image.open(path) as picture:  # Of pixels, whatever the model sees.
      assert picture.size[0] >= (3 if "reconstruction" in str(path) else 2) * SIZE


@pytest.mark.slow
def test_with_a_vae_that_was_trained_here_images_are_filled_in_and_drawn(tmp_path):
  arguments = f"dataset=digits,size={SIZE},widths=8+16+16,groups=4,steps=600,batch_size=64,lr=4e-3"
  config = vae_tiny.get_config(arguments + ",evaluations=1")
  config.data.split, config.test.split = "train", "test"
  stages.run(config, str(tmp_path / "vae"))
  train, test = (dict(spec, split=split) for spec, split in ((TRAIN, "train"), (TEST, "test")))
  config = make_config(str(tmp_path / "vae" / "vae"), train, test, evals=EVERY, steps=400)
  config.batch_size, config.optim.lr, config.ema_decay = 128, 2e-3, 0.98
  config.evals.reconstruction.update(data=test, num=0)
  found = run_with_all_evaluators(config, str(tmp_path / "run"))
  lost, filled, blank = (
    found[f"reconstruction/{name}_mse"] for name in ("codec", "masked", "mean_image")
  )
  assert lost < filled < 0.8 * blank and lost < 0.3 * blank
  # Latents have unit variance: what is explained of it shows in the loss.
  assert found["losses/ema/clean/x0/t0"] < 0.9
  assert found["fewshot/class_strict_2shot_mean"] > 0.3


def test_the_checkpoint_holds_nothing_of_the_vae(trained, vae):
  workdir, _ = trained
  run = saved.open_run(workdir)
  assert run.model.image_size == (SIZE // 4, SIZE // 4, 4)
  assert run.description.vae_sha256 == vae_files.load(vae).sha256
  own = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(checkpoint.param_shapes(workdir)))
  shapes = param_shapes(run.model)
  assert own == sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_a_trained_run_is_evaluated_with_the_vae_that_it_names(trained, tmp_path):
  workdir, found = trained
  evals = dict(losses=dict(type="losses", data=TEST, num=64, bins=1, every=1))
  config = ConfigDict(
    dict(
      trainer="evaluate", seed=0, eval_batch_size=64, init_from=workdir, init_weights="ema",
      model=dict(scan=False), expected=dict(size=SIZE, latent_diffusion=True), evals=evals,
      guide_if_labelled=True, summary=(), wandb=dict(mode="disabled", project="umd"),
    )
  )  # fmt: skip
  (summary,) = stages.run(config, str(tmp_path))
  again = summary["metrics"]["losses/ema/clean/x0/t0"]
  assert again == pytest.approx(found["losses/ema/clean/x0/t0"], rel=1e-5)


def test_another_vae_in_the_place_of_the_one_it_was_trained_with_is_refused(trained, vae, tmp_path):
  workdir, _ = trained
  weights = vae_files.load(vae)
  other = str(tmp_path / "other")
  shifted = jax.tree.map(lambda x: x + 0.01, weights.params)
  vae_files.save(other, weights.architecture, shifted)
  with pytest.raises(ValueError, match=r"latents.vae: the run in .* Give the vae"):
    diffusion.prepare(read_stage(make_config(other)), str(tmp_path / "new"), "", workdir)
  run = saved.open_run(workdir)
  run.description.latents["vae"] = other
  with pytest.raises(ValueError, match="Give the vae that it was trained with"):
    run.open_codec(make_mesh())


@pytest.mark.slow  # A minute of compilation; what is stored is compared in test_encode_latents.py.
def test_training_from_stored_latents_is_training_from_images(vae, images, tmp_path):
  out = str(tmp_path / "latents")
  options = ["--size", str(SIZE), "--views", "1", "--vae", vae, "--out", out]
  encode_latents.main(
    ["--data", f"npz:{images}", *options, "--dtype", "float32", "--vae_dtype", "float32"]
  )
  flight, stored = str(tmp_path / "flight"), str(tmp_path / "stored")
  pixels = common.data(f"npz:{images}", "all", "value_range(-1, 1)")
  latents = common.data(f"latents:{out}", "train", "view(0)")
  few = dict(steps=3, checkpoint=dict(every=0, keep=1, keep_every=0, best=""))
  stages.run(make_config(vae, pixels, pixels, **few), flight)
  stages.run(make_config(vae, latents, latents, **few), stored)
  expected, found = losses(flight), losses(stored)
  assert len(expected) == 3
  for step, loss in expected.items():
    assert found[step] == pytest.approx(loss, rel=2e-4)


def test_pixels_cannot_be_trained_on_latents_nor_reconstructions_compared_in_them(
  vae, images, tmp_path
):
  out = str(tmp_path / "latents")
  options = ["--size", str(SIZE), "--views", "1", "--vae", vae, "--out", out]
  encode_latents.main(["--data", f"npz:{images}", *options])
  latents = common.data(f"latents:{out}", "train", "view(0)")
  config = make_config(vae, latents, latents, evals=("reconstruction",))
  config.evals.reconstruction.data = latents
  prepare = lambda config: diffusion.prepare(read_stage(config), str(tmp_path / "new"), "")
  with pytest.raises(ValueError, match="compared in pixels"):
    prepare(config)
  config = make_config(vae, latents, latents)
  config.latents = {}
  with pytest.raises(ValueError, match="holds latents, but the model is trained on pixels"):
    prepare(config)

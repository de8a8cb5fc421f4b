"""The KL auto-encoder: its loss against integrals, a run on digits, and the weights it leaves."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import vae_tiny
from trainers import kl_vae, optim, stages
from umd import data
from umd.codecs import vae_files
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.runs.writers import read_jsonl

STEPS = 100
ARGUMENTS = (
  f"dataset=digits,size=8,widths=16+16,groups=2,attention=false,latent_channels=3,steps={STEPS},"
  "batch_size=32,lr=1e-2,error=l2,ema_decay=0.9,evaluations=2,eval_num=100,scaling_num=1000"
)


def tiny_config(**overrides):
  config = vae_tiny.get_config(ARGUMENTS)
  settings = {"log_every": 10, "checkpoint.every": STEPS // 2, "eval_batch_size": 64}
  config.update_from_flattened_dict({**settings, **overrides})
  return config


# The loss.


def test_the_kl_divergence_is_the_integral_of_its_definition():
  rng = np.random.default_rng(0)
  mean, logvar = (np.float32(s * rng.standard_normal((3, 2, 1, 2))) for s in (2.0, 1.5))
  x = np.linspace(-60, 60, 240_001)

  def integral(m, v):
    log_q = -0.5 * (np.log(2 * np.pi) + v + (x - m) ** 2 / np.exp(v))
    log_p = -0.5 * (np.log(2 * np.pi) + x**2)
    return np.trapezoid(np.exp(log_q) * (log_q - log_p), x)

  each = np.vectorize(integral)(np.float64(mean), np.float64(logvar))
  np.testing.assert_allclose(
    kl_vae.kl_divergence(mean, logvar), each.sum(axis=(1, 2, 3)), rtol=1e-5
  )


def test_the_kl_divergence_keeps_its_digits_near_the_normal_distribution():
  logvar = np.full((1, 1, 1, 1), 1e-3, np.float32)
  # 0.5 (exp(v) - 1 - v) = v^2 / 4 + v^3 / 12 + ...
  expected = 1e-6 / 4 + 1e-9 / 12
  found = kl_vae.kl_divergence(np.zeros_like(logvar), logvar)
  np.testing.assert_allclose(found, [expected], rtol=1e-3)
  assert kl_vae.kl_divergence(np.zeros_like(logvar), np.zeros_like(logvar)) == 0


class Known:
  """A model whose outputs are known: mean 2, variance 1 / 4, and half of the latent's mean back."""

  architecture = Architecture(
    block_out_channels=(2, 2), norm_num_groups=1, latent_channels=5, in_channels=3
  )

  def apply(self, variables, images, noise):
    self.noise = noise
    shape = (len(images), images.shape[1] // 2, images.shape[2] // 2, 5)
    mean, logvar = jnp.full(shape, 2.0), jnp.full(shape, -np.log(4.0))
    return images + variables["params"], mean, logvar


@pytest.mark.parametrize("error, expected", [("l1", 3.0), ("l2", 9.0)])
def test_the_loss_weighs_sums_over_values_and_latents(error, expected):
  model, images = Known(), jnp.zeros((4, 6, 8, 3))
  objective = kl_vae.KLObjective(model, error=error, kl_weight=0.1)
  total, values = objective(-3.0, objective.draw({"image": images}, jax.random.key(0)))
  # 3 x 4 x 5 latents of 6 x 8 x 3 values.
  kl = 0.5 * (4 + 0.25 - 1 + np.log(4.0)) * 60 / 144
  assert values["reconstruction"] == pytest.approx(expected)
  assert values["kl"] == pytest.approx(kl, rel=1e-5)
  assert total == pytest.approx(expected + 0.1 * kl, rel=1e-5)
  assert (values["latent_mean"], values["latent_std"]) == (2.0, 0.0)


def test_every_latent_of_every_example_and_step_has_noise_of_its_own():
  model, images = Known(), jnp.zeros((64, 16, 16, 3))
  noise = [np.asarray(kl_vae.posterior_noise(jax.random.key(k), images, model)) for k in (0, 1)]
  assert noise[0].shape == (64, 8, 8, 5)
  assert len(np.unique(np.concatenate(noise))) > 0.99 * 2 * noise[0].size
  assert abs(noise[0].mean()) < 0.03 and abs(noise[0].std() - 1) < 0.03
  # An example's does not depend on how many there are beside it.
  few = kl_vae.posterior_noise(jax.random.key(0), images[:5], model)
  np.testing.assert_array_equal(few, noise[0][:5])


# A run.


@pytest.fixture(scope="module")
def programs():
  """Compiles once for all runs of one config: that takes longer than all else.

  Returns {name: what the function of that name in the trainer returned the first time}.
  """
  first = {}

  def once(make):
    return lambda *args, **kwargs: first.setdefault(
      make.__name__, first.get(make.__name__) or make(*args, **kwargs)
    )

  with pytest.MonkeyPatch.context() as patch:
    for name in ("make_moments", "Reconstruction"):
      patch.setattr(kl_vae, name, once(getattr(kl_vae, name)))
    patch.setattr(optim, "make_step", once(optim.make_step))
    yield first


@pytest.fixture(scope="module")
def finished(tmp_path_factory, programs):
  """(summary, workdir) of a run on digits that the command ran through."""
  workdir = tmp_path_factory.mktemp("vae")
  (summary,) = stages.run(tiny_config(), str(workdir))
  return summary, workdir


def saved_state(workdir) -> dict:
  path = os.path.join(workdir, "checkpoints", str(STEPS), "state")
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.restore(path)


@pytest.fixture(scope="module")
def exported(finished):
  """(weights, encode, decode) of the folder that the run wrote."""
  weights = vae_files.load(str(finished[1] / "vae"))
  model = KLAutoEncoder(weights.architecture)
  apply = lambda method: jax.jit(
    lambda x: model.apply({"params": weights.params}, x, method=method)
  )
  return weights, apply("encode"), apply("decode")


def test_it_learns_to_reconstruct(finished):
  summary, workdir = finished
  values = summary["metrics"]
  assert summary["step"] == STEPS
  assert values["reconstruction/mse"] < values["reconstruction/mean_image_mse"] / 2
  records = read_jsonl(str(workdir / "metrics.jsonl"))
  losses = [r["loss"] for r in records if "loss" in r]
  assert losses[-1] < 0.5 * losses[0]
  assert {"loss/reconstruction", "loss/kl", "loss/latent_mean", "loss/latent_std"} <= set(values)
  assert [r["step"] for r in records if "reconstruction/mse" in r] == [STEPS // 2, STEPS]
  assert len(list((workdir / "images/reconstruction").glob("*.png"))) == 2
  assert set(summary["headline"]) == set(vae_tiny.SUMMARY)


BIASES = ("['quant_conv']['bias']", "['post_quant_conv']['bias']")


def test_what_it_writes_are_the_averaged_weights(finished, exported):
  state, (weights, _, _) = saved_state(finished[1]), exported
  leaves = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))
  expected, raw, found = map(leaves, (state["ema_params"], state["params"], weights.params))
  assert {str(k) for k in expected} == {str(k) for k in found}
  for path in expected:
    moved = jax.tree_util.keystr(path) in BIASES  # They take up the centring of the latents.
    assert np.array_equal(found[path], expected[path]) != moved, path
  assert any((np.asarray(raw[path]) != expected[path]).any() for path in raw)
  architecture = weights.architecture
  assert (architecture.in_channels, architecture.out_channels, architecture.factor) == (1, 1, 2)
  assert architecture.latent_channels == 3 and architecture.shift_factor == 0


def test_evaluation_reports_what_the_written_weights_do(finished, exported):
  """By plain NumPy on all that the auto-encoder makes of the first held-out images."""
  (summary, workdir), (weights, encode, decode) = finished, exported
  metrics = summary["metrics"]
  images = data.load("digits", "test").arrays()[0][:100]
  mean, logvar = map(np.asarray, encode(images))
  error = (np.clip(np.asarray(decode(mean)), -1, 1) - images) ** 2
  # What is evaluated was not centred yet.
  biases = (p["quant_conv"]["bias"] for p in (saved_state(workdir)["ema_params"], weights.params))
  mean = mean + np.subtract(*biases)[:3]
  baseline = (images - images.mean(axis=0)) ** 2
  mse = error.mean(axis=(1, 2, 3))
  expected = {
    "mse": mse.mean(),
    "psnr": (10 * np.log10(4 / mse)).mean(),
    "mean_image_mse": baseline.mean(),
    "kl": float(kl_vae.kl_divergence(mean, logvar).mean()) / 64,
    **{f"latent_mean/{c}": mean[..., c].mean() for c in range(3)},
    **{f"latent_std/{c}": mean[..., c].std() for c in range(3)},
  }
  for name, value in expected.items():
    assert metrics[f"reconstruction/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4), name
  assert np.ptp([expected[f"latent_std/{c}"] for c in range(3)]) > 0.01


def test_scaled_latents_of_the_training_images_are_centred_and_have_unit_variance(
  finished, exported
):
  summary, _ = finished
  weights, encode, _ = exported
  scale = weights.architecture.scaling_factor
  assert summary["metrics"]["vae/scaling_factor"] == pytest.approx(scale)
  images = data.load("digits", "train").arrays()[0][:1400].reshape(14, 100, 8, 8, 1)
  mean, logvar = (np.stack(x) for x in zip(*map(encode, images), strict=True))
  noise = np.random.default_rng(0).standard_normal(mean.shape)
  latents = scale * (mean + np.exp(logvar / 2) * noise)
  assert latents.std() == pytest.approx(1.0, abs=0.02)
  assert np.abs(latents.mean(axis=(0, 1, 2, 3))).max() < 0.05
  assert abs(scale - 1) > 0.05, "the latents have unit variance without a factor"


def test_moments_are_of_latents_drawn_from_their_posteriors(exported, programs):
  """Where the means are 3, 4 and 5 and all variances 1 / 4, the deviation is 1 / 2."""
  params = jax.tree.map(np.zeros_like, exported[0].params)
  params["quant_conv"]["bias"] = np.float32([3.0, 4.0, 5.0] + [-np.log(4.0)] * 3)
  batches = iter([{"image": np.zeros((32, 8, 8, 1), np.float32)}] * 2)
  mean, std = programs["make_moments"](params, batches)
  np.testing.assert_allclose(mean, [3.0, 4.0, 5.0], rtol=1e-6)
  assert std == pytest.approx(0.5, rel=1e-5)


def test_a_finished_run_is_not_run_again(finished, capsys):
  summary, workdir = finished
  before = (workdir / "vae/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
  (again,) = stages.run(tiny_config(), str(workdir))
  assert "is finished" in capsys.readouterr().out
  assert again == json.loads(json.dumps(summary))
  assert (workdir / "vae/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_bitwise_and_writes_the_same_weights(
  finished, exported, tmp_path, capsys
):
  _, reference = finished
  workdir = tmp_path / "run"
  shutil.copytree(reference, workdir)
  for path in (f"checkpoints/{STEPS}", "vae"):
    shutil.rmtree(workdir / path)
  os.remove(workdir / "summary.json")
  stages.run(tiny_config(), str(workdir))
  printed = capsys.readouterr().out
  assert f"resumed at step {STEPS // 2}" in printed
  assert f"latent_diffusion=True,vae={workdir}/vae" in printed
  leaves = lambda path: jax.tree_util.tree_leaves_with_path(saved_state(path))
  for (name, want), (_, got) in zip(leaves(reference), leaves(workdir), strict=True):
    assert np.asarray(want).tobytes() == np.asarray(got).tobytes(), name
  assert vae_files.load(str(workdir / "vae")).sha256 == exported[0].sha256


def test_another_config_in_the_same_workdir_is_refused(finished):
  _, workdir = finished
  with pytest.raises(ValueError, match=r"objective\.kl_weight: there 1e-06, now 0\.1"):
    stages.run(tiny_config(**{"objective.kl_weight": 0.1}), str(workdir))


# What cannot be meant.


@pytest.mark.parametrize(
  "overrides, told",
  [
    ({"batch_size": 30}, "batch_size=30 must be a positive multiple of the 4 devices"),
    ({"data.pp": "resize(9)", "test.pp": "resize(9)"}, "2 x 2 px, which does not divide .* 9 x 9"),
    ({"test.pp": "resize(16)"}, r"test: .* images of \(16, 16, 1\), data: .* of \(8, 8, 1\)"),
    ({"eval_num": -1}, "eval_num=-1 must be"),
    ({"init_from": "runs/other"}, "init_from='runs/other'.* starts from nothing"),
    ({"objective.error": "lpips"}, "objective.error='lpips' .* among|is not one of"),
    (
      {"model.architecture.norm_num_groups": 3},
      r"block_out_channels=\(16, 16\) .* norm_num_groups=3",
    ),
  ],
)
def test_bad_settings_are_errors_before_anything_is_written(tmp_path, overrides, told):
  config = tiny_config(**overrides)
  with pytest.raises(ValueError, match=told):
    stages.run(config, str(tmp_path / "run"))
  assert not os.listdir(tmp_path)


def test_arguments_reach_the_config():
  config = vae_tiny.get_config("dataset=tiny_imagenet,size=64,widths=16+32+64+64,layers=2,groups=4")
  architecture = Architecture(**config.model.architecture.to_dict())
  assert (architecture.factor, architecture.layers_per_block) == (8, 2)
  assert config.data.name == config.test.name == "tfds:tiny_imagenet"
  assert (config.data.split, config.test.split) == ("train", "validation")
  assert "resize_small(64)|random_crop(64)|flip_lr" in config.data.pp
  assert "central_crop(64)" in config.test.pp and "flip" not in config.test.pp

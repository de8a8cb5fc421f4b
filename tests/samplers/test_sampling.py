"""Settings of sampling, guidance, and sampling with a network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from umd.models.network import predict
from umd.paths import EDM, make_path
from umd.samplers import Sampling
from umd.trained.inference import Inference


def keys_for(count, seed=1):
  return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"eta": -0.5}, r"eta=-0\.5 must be in \[0, 1\]"),
    ({"eta": 1.5}, r"eta=1\.5 must be in \[0, 1\]"),
    ({"eta": 0.5, "sampler": "heun"}, r"eta=0\.5: sampler='heun' takes no eta, only \['ddim'\]"),
    ({"sampler": "euler"}, r"sampler='euler' is not one of.*'ddim'.*'ddpm'.*'heun'"),
    ({"spacing": "log"}, r"spacing='log' is not one of \['uniform', 'quadratic'"),
    ({"steps": 0}, r"steps=0 must be at least 1"),
    ({"cfg_scale": float("nan")}, r"cfg_scale=nan must be in \[0, inf\)"),
    *(
      ({"guidance_interval": interval}, r"guidance_interval=\(.*0 <= low < high <= 1")
      for interval in [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1)]
    ),
  ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**settings)


def test_other_samplers_do_not_inherit_eta():
  own = Sampling(sampler="ddim", eta=0.5, steps=9)
  assert own.updated({"sampler": "heun", "steps": None}) == Sampling(sampler="heun", steps=9)
  assert own.updated({"sampler": "ddim"}) == own
  with pytest.raises(ValueError, match=r"'stps'\. Did you mean 'steps'.*'cfg_scale'"):
    own.updated({"stps": 3})


def test_configs_hold_every_setting_with_the_record_s_default():
  assert Sampling(**common.sampling(steps=125, cfg_scale=1.0)) == Sampling()
  assert common.sampling(steps=1, cfg_scale=1.0).keys() == dataclasses.asdict(Sampling()).keys()


@pytest.fixture(scope="module")
def labelled(nano):
  model, params = nano(num_classes=10, heads=("x0", "eps", "v"))
  return Inference(model, make_path("cosine", 10)), params


LABELS, X_T = jnp.array([3, 7]), jax.random.normal(jax.random.key(5), (2, 16, 16, 3))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, t, labels, x=X_T):
  return predict(model, params, x, t, labels)


@pytest.mark.parametrize(
  "head, cfg_scale, channels",
  [("eps", 0.0, 0), ("eps", 1.0, 0), ("eps", 2.5, 0), ("x0", 2.5, 3), ("v", 2.5, 0), ("eps", 4, 2)],
)
def test_guidance_is_uncond_plus_scale_times_cond_minus_uncond(labelled, head, cfg_scale, channels):
  (inference, params), t = labelled, 4
  cond, uncond = (
    forward(inference.model, params, jnp.full(2, t), labels)[head]
    for labels in (LABELS, jnp.full(2, 10))
  )
  sampling = Sampling(head=head, cfg_scale=cfg_scale, cfg_channels=channels)
  denoise = jax.jit(inference.denoiser(params, LABELS, sampling))
  x0, eps = denoise(X_T, jnp.int32(t))
  assert np.abs(cond - uncond).mean() > 1e-2
  guided = np.array(uncond + cfg_scale * (cond - uncond))
  if channels:  # As DiT samples: the others are those of the conditional model.
    guided[..., channels:] = cond[..., channels:]
  for kind, want in {"x_t": X_T, head: guided}.items():
    a, b = inference.path.coefs(kind, t)
    np.testing.assert_allclose(a * x0 + b * eps, want, rtol=1e-3, atol=1e-3)


def test_guidance_is_for_its_interval_alone(labelled):
  inference, params = labelled
  sampling = Sampling(cfg_scale=2.5, guidance_interval=(0.3, 0.6))
  denoise = jax.jit(inference.denoiser(params, LABELS, sampling))
  for t in (2, 3, 6, 7):  # Of 10.
    cond, uncond = (
      forward(inference.model, params, jnp.full(2, t), labels)["eps"]
      for labels in (LABELS, jnp.full(2, 10))
    )
    assert np.abs(cond - uncond).mean() > 1e-2
    eps = uncond + 2.5 * (cond - uncond) if 3 <= t <= 6 else cond
    np.testing.assert_allclose(denoise(X_T, jnp.int32(t))[1], eps, rtol=1e-3, atol=1e-3)


def test_a_network_on_edm_is_preconditioned(nano):
  """x0 is c_skip x + c_out F(c_in x; c_noise), and sampling starts from noise of sigma_max."""
  model, params = nano(num_classes=10, heads=("F",))
  inference, sigma = Inference(model, EDM()), 0.7
  sampling = Sampling(head="F")
  x = sigma * X_T
  x0, eps = jax.jit(inference.denoiser(params, LABELS, sampling))(x, jnp.float32(sigma))
  root = np.sqrt(sigma**2 + 0.25)
  output = forward(model, params, jnp.full(2, np.log(sigma) / 4), LABELS, x / root)["F"]
  wanted = 0.25 / root**2 * x + 0.5 * sigma / root * output
  np.testing.assert_allclose(x0, wanted, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(x0 + sigma * eps, x, rtol=1e-4, atol=1e-4)
  assert inference.noise(keys_for(2))[0].std() == pytest.approx(80, rel=0.1)


def test_scale_1_works_without_labels(labelled):
  inference, params = labelled
  null, none = (
    jax.jit(inference.denoiser(params, labels, Sampling()))(X_T, jnp.int32(4))
    for labels in (jnp.full(2, 10), None)
  )
  np.testing.assert_allclose(none[0], null[0], rtol=1e-4, atol=1e-4)


def test_sample_draws_from_its_key_clips_x0_and_passes_options_on(labelled):
  inference, params = labelled

  @functools.partial(jax.jit, static_argnames=("clip_x0", "eta"))
  def sample(keys, labels=LABELS, clip_x0=True, eta=0.0):
    sampling = Sampling(steps=3, clip_x0=clip_x0, eta=eta)
    return inference.sample(params, keys, labels, sampling)

  keys = keys_for(2)
  images = sample(keys)
  assert images.shape == (2, 16, 16, 3)
  assert np.abs(images).max() <= 1 < np.abs(sample(keys, clip_x0=False)).max()
  np.testing.assert_allclose(sample(keys[::-1], LABELS[::-1]), images[::-1], atol=1e-3)
  assert np.abs(sample(keys, eta=1.0) - images).mean() > 1e-2
  assert np.abs(sample(keys_for(2, seed=2)) - images).mean() > 1e-2


@pytest.mark.parametrize(
  "options, labels, message",
  [
    ({"head": "eps"}, None, r"head='eps' does not determine x0.*'flow'.*'x0', 'eps'"),
    ({"head": "v"}, None, r"head='v' is not among the model's heads.*'x0', 'eps'"),
    ({"head": "x0", "cfg_scale": 2.0}, None, r"cfg_scale=2\.0 guides by labels.*cfg_scale=1"),
    ({"head": "x0", "cfg_scale": 2.0}, LABELS, r"cfg_scale=2\.0 guides by labels.*cfg_scale=1"),
    ({"head": "x0", "cfg_channels": 4}, None, r"cfg_channels=4 must be in \[0, 3\]"),
    ({"head": "x0", "steps": 11}, None, r"steps=11 must be in \[1, timesteps=10\]"),
  ],
)
def test_a_sample_that_cannot_be_drawn_is_refused_with_a_remedy(nano, options, labels, message):
  model, params = nano()
  inference = Inference(model, make_path("flow", 10))
  with pytest.raises(ValueError, match=message):
    inference.sample(params, keys_for(2), labels, Sampling(**{"steps": 3, **options}))

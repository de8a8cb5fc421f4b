"""Codecs: latents are samples of the posterior, scaled; neither devices nor chunks change them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import HALF as SMALL
from stand_ins import random_weights

from umd.codecs import codec as codecs
from umd.codecs.codec import Latents, Pixels, encode_batch
from umd.codecs.vae import KLAutoEncoder
from umd.data import from_arrays
from umd.devices.mesh import make_mesh, put_batch
from umd.samplers.keys import example_keys

NETWORK = KLAutoEncoder(SMALL)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 12, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
  return random_weights(SMALL)


@pytest.fixture(scope="module")
def known(weights):
  """(mean, log-variance, reconstruction) of IMAGES, by the network itself."""

  def see(params, images):
    mean, logvar = NETWORK.apply({"params": params}, images, method="encode")
    return mean, logvar, NETWORK.apply({"params": params}, mean, method="decode")

  return jax.device_get(jax.jit(see)(weights.params, IMAGES))


def make(weights, devices=4, **settings):
  mesh = make_mesh(jax.devices()[:devices])
  return Latents(weights, mesh, **{"dtype": "float32", **settings}), mesh


def encoded(codec, mesh, images=IMAGES):
  batch = put_batch({"image": images, "index": np.arange(len(images))}, mesh)
  see = lambda params, b: codec.encode(params, b["image"], example_keys(0, b["index"]))
  return np.asarray(jax.jit(see)(codec.params, batch))


def test_pixels_are_seen_and_shown_as_they_are():
  codec = Pixels()
  assert codec.encode(codec.params, IMAGES, None) is IMAGES
  assert codec.decode(codec.params, IMAGES) is IMAGES
  assert codec.model_size((12, 8, 3)) == codec.pixel_size((12, 8, 3)) == (12, 8, 3)
  assert encode_batch(codec, {}, {"image": IMAGES, "label": 1}, jax.random.key(0)) == {
    "image": IMAGES, "label": 1,
  }  # fmt: skip


def test_latents_are_draws_of_the_posterior_shifted_and_scaled(weights, known):
  codec, mesh = make(weights)
  mean, logvar, _ = known
  # Many draws of one image: their mean and deviation are those of the posterior.
  moments = np.concatenate([np.repeat(x[:1], 4000, axis=0) for x in (mean, logvar)], axis=-1)
  found = encoded(codec, mesh, moments) / SMALL.scaling_factor + SMALL.shift_factor
  std = np.exp(logvar[0] / 2)
  assert (np.abs(found.mean(axis=0) - mean[0]) < 5 * std / 4000**0.5).all()
  np.testing.assert_allclose(found.std(axis=0), std, rtol=0.08)


@pytest.mark.parametrize("devices, chunk", [(1, 8), (1, 3), (2, 2), (4, 1)])
def test_neither_devices_nor_chunks_change_what_is_seen_and_shown(weights, known, devices, chunk):
  codec, mesh = make(weights, devices, chunk=chunk)
  mean, logvar, shown = known
  moments = np.asarray(jax.jit(codec.moments)(codec.params, put_batch({"x": IMAGES}, mesh)["x"]))
  np.testing.assert_allclose(moments, np.concatenate([mean, logvar], axis=-1), atol=2e-5)
  seen = (mean - SMALL.shift_factor) * SMALL.scaling_factor
  decoded = jax.jit(codec.decode)(codec.params, put_batch({"x": seen}, mesh)["x"])
  np.testing.assert_allclose(decoded, shown, atol=5e-5)


def test_stored_moments_give_the_latents_of_their_images(weights):
  codec, mesh = make(weights)
  moments = jax.jit(codec.moments)(codec.params, put_batch({"x": IMAGES}, mesh)["x"])
  np.testing.assert_allclose(
    encoded(codec, mesh, np.asarray(moments)), encoded(codec, mesh), atol=1e-5
  )


def test_tiles_as_large_as_the_image_change_nothing(weights, known):
  codec, mesh = make(weights, tile=12)
  seen = (known[0] - SMALL.shift_factor) * SMALL.scaling_factor
  decoded = jax.jit(codec.decode)(codec.params, put_batch({"x": seen}, mesh)["x"])
  np.testing.assert_allclose(decoded, known[2], atol=5e-5)


def test_each_step_draws_its_latents_anew_and_the_same_when_it_is_repeated(weights):
  codec, mesh = make(weights)
  batch = put_batch({"image": IMAGES}, mesh)
  see = jax.jit(lambda key: encode_batch(codec, codec.params, batch, key)["image"])
  first, again, other = (np.asarray(see(jax.random.key(i))) for i in (0, 0, 1))
  assert (first == again).all() and (first != other).any()
  assert len({row.tobytes() for row in first}) == len(IMAGES)


def test_sizes_go_both_ways(weights):
  codec, _ = make(weights)
  assert codec.model_size((12, 8, 3)) == (6, 4, 4) and codec.pixel_size((6, 4, 4)) == (12, 8, 3)
  mask = jnp.arange(2.0).reshape(1, 1, 2, 1) * jnp.ones((1, 1, 2, 4))
  np.testing.assert_array_equal(codec.spread(mask)[0, :, :, 0], [[0, 0, 1, 1]] * 2)
  assert codec.spread(mask).shape == (1, 2, 4, 3)


def source(*shape):
  return from_arrays("drawn", np.zeros((2, *shape), np.float32), None, 0)


def test_images_that_do_not_fit_are_refused_by_name(weights):
  codec, _ = make(weights)
  with pytest.raises(ValueError, match=r"^data: drawn: images of 13 x 8 px.*multiples of 2 px"):
    codec.source_size("data", source(13, 8, 3))
  with pytest.raises(ValueError, match="images of 1 channels: the VAE 'random 0' takes 3"):
    codec.source_size("data", source(12, 8, 1))
  with pytest.raises(ValueError, match="tile=13 must be a multiple of the VAE's 2 px"):
    make(weights, tile=13)
  stored = types.SimpleNamespace(records=types.SimpleNamespace(info=1), name="latents:there")
  with pytest.raises(ValueError, match=r"latents:there holds latents.*latent_diffusion=True"):
    Pixels().source_size("data", stored)


def test_images_that_look_like_moments_are_refused(weights):
  odd = dataclasses.replace(SMALL, in_channels=8)
  with pytest.raises(ValueError, match="look like moments"):
    make(weights._replace(architecture=odd))


def test_no_settings_stand_for_pixels_and_the_same_ones_for_one_codec(weights, monkeypatch):
  monkeypatch.setattr(codecs.vae_files, "load", {"small": weights}.__getitem__)
  mesh = make_mesh()
  assert isinstance(codecs.make({}, mesh), Pixels)
  settings = {"vae": "small", "dtype": "float32"}
  assert codecs.make(settings, mesh) is codecs.make(dict(settings), mesh)
  assert codecs.make(settings, mesh).sha256 == weights.sha256

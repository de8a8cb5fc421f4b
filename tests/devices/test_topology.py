"""What a step trains on does not depend on the number of devices, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import methods
from umd import data, objectives
from umd.devices.mesh import batch_sharding, make_mesh
from umd.paths import make_path

BATCH = 64


@pytest.fixture
def seen(monkeypatch):
  """What every stream of a loss is scored on: images, labels, timesteps, noise, masks' noise."""
  found = []

  def score(model, path, streams, params, draws):
    found.extend(draw._asdict() for draw in draws)
    return [dict.fromkeys(stream.terms, jnp.zeros(1)) for stream in streams]

  monkeypatch.setattr(objectives, "score", score)
  return found


@pytest.mark.parametrize("method", methods.METHODS)
def test_examples_timesteps_noise_and_masks_are_the_same_on_any_number_of_devices(
  nano, seen, method
):
  model, _ = nano("nano/4", (8, 8, 1), num_classes=10)
  streams = objectives.make_streams(methods.streams_of(method))
  loss = objectives.Objective(model, make_path("cosine", 1000), streams, BATCH, 0.1)
  batch = next(data.train_batches(data.load("digits", "train"), BATCH, seed=3))

  @jax.jit
  def draw(batch, step):
    seen.clear()
    loss({}, loss.draw(batch, jax.random.fold_in(jax.random.key(3), step)))
    return list(seen)

  def on(devices, step):
    split = batch_sharding(make_mesh(jax.devices()[:devices]))
    return jax.device_get(draw(jax.device_put(batch, split), step))

  one = on(1, 5)
  assert len(one) == len(streams)
  for devices in (2, 4):
    jax.tree.map(np.testing.assert_array_equal, on(devices, 5), one)
  other = on(1, 6)  # Another step draws afresh, from the same images.
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a["x0"], b["x0"])
    assert not (a["eps"] == b["eps"]).any() and not (a["mask_noise"] == b["mask_noise"]).any()

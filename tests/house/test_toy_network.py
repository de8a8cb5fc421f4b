"""A network of forty lines that no other file knows trains, samples, is probed, saved, loaded."""

import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from configs import quickstart
from tools import export
from trainers import stages
from umd import load, models
from umd.models.network import Input


class PixelMLP(nn.Module):
  """Predicts every head of an image from all its pixels, its time and its label."""

  image_size: tuple[int, int, int]
  num_classes: int = 0
  heads: tuple[str, ...] = ("x0", "eps")
  width: int = 32
  patch: int = 2

  def setup(self):
    self.hidden, self.out = nn.Dense(self.width), nn.Dense(len(self.heads) * 64)

  def encode(self, images: Array, t: Array, labels: Array | None) -> Array:
    null = jnp.full(len(t), self.num_classes, jnp.int32)
    label = jax.nn.one_hot(null if labels is None else labels, self.num_classes + 1)
    time = t[:, None] / 1000.0
    return nn.gelu(self.hidden(jnp.concatenate([images.reshape(len(t), -1), time, label], axis=1)))

  def hide(self, part: Input) -> Array:
    if part.mask is None:
      return part.images
    masked = part.mask.masked.reshape(-1, 4, 4).repeat(2, axis=1).repeat(2, axis=2)
    return part.images * (1 - masked[..., None])

  def predict(self, inputs, groups=1):
    predictions = []
    for part in inputs:
      out = self.out(self.encode(self.hide(part), part.t, part.labels))
      out = out.reshape(len(part.t), len(self.heads), *self.image_size)
      predictions.append({head: out[:, i] for i, head in enumerate(self.heads)})
    return predictions

  def represent(self, images, t, labels=None):
    return {"class": self.encode(images, t, labels)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The folder of a quick start in which the network takes the auto-encoder's place."""
  folder = str(tmp_path_factory.mktemp("toy"))
  patch = pytest.MonkeyPatch()
  patch.setitem(models.MODELS, "pixel_mlp", PixelMLP)
  text = "steps=200,finetune_steps=60,num_samples=20,batch_size=64"
  config = quickstart.get_config(text)
  for stage in (config.pretrain, config.finetune):
    stage.model = {"name": "pixel_mlp", "heads": ("x0", "eps"), "width": 48}
    stage.init_fresh = ("hidden",)  # Its input grows by the labels.
    for settings in stage.evals.values():
      settings.every = 0
  config.pretrain.evals.fewshot.features = ("class",)
  yield folder, stages.run(config, folder)
  patch.undo()


def test_it_trains_and_is_evaluated(trained):
  folder, (pretrain, finetune) = trained
  with open(os.path.join(folder, "pretrain", "metrics.jsonl")) as lines:
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
  assert losses[-1] < 0.7 * losses[0]
  metrics = pretrain["metrics"] | finetune["metrics"]
  assert metrics["fewshot/class_strict_10shot_mean"] > 0.5  # ten classes
  assert metrics["reconstruction/masked_mse"] < 1.0
  assert 0 <= metrics["generation/agreement"] <= 1


def test_it_is_saved_and_loaded(trained):
  folder, _ = trained
  model = load(folder)
  images = model.sample(labels=[3, 7], num=4, steps=5)
  assert images.shape == (4, 8, 8, 1) and images.dtype == np.uint8
  assert model.represent(images).shape == (4, 48)
  filled, masks = model.reconstruct(images, mask_ratio=0.75)
  np.testing.assert_array_equal(filled[~masks], images[~masks])
  assert 0.7 < masks.mean() < 0.8


def test_it_is_exported(trained, tmp_path):
  folder, _ = trained
  out = str(tmp_path / "exported")
  export.main(["--workdir", folder, "--out", out])
  assert np.array_equal(load(out).sample(num=2, steps=2), load(folder).sample(num=2, steps=2))

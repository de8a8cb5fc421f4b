"""A small classifier, trained once on a data set's labels, to judge samples of it.

It gives small data sets what Inception gives ImageNet: features for a Frechet distance,
probabilities for an Inception-style score, and labels to compare with those that were asked for.
"""

import hashlib
import os
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from umd.data import Source

FEATURES = 64
EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY = 30, 64, 3e-3, 1e-2


class Classifier(nn.Module):
  """Two convolutions, a pool, a hidden layer -> (logits [B, classes], features [B, 64])."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]):
    x = nn.relu(nn.Conv(32, (3, 3), name="conv1")(x))
    x = nn.relu(nn.Conv(64, (3, 3), name="conv2")(x))
    x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
    features = nn.relu(nn.Dense(FEATURES, name="hidden")(x))
    return nn.Dense(self.num_classes, name="logits")(features), features


def _fingerprint(source: Source) -> str:
  """Changes with the images, the labels or this file: names the cached weights."""
  with open(__file__, "rb") as f:
    digest = hashlib.sha256(f.read())
  for array in (source.images, source.labels):
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]


def _train(model: Classifier, params, source: Source, seed: int):
  """AdamW with a one-cycle schedule; the order of the examples is a function of the seed."""
  per_epoch = max(len(source) // BATCH, 1)
  schedule = optax.cosine_onecycle_schedule(EPOCHS * per_epoch, PEAK_LR)
  tx = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

  def loss(params, x, y):
    logits, _ = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  # One call a step: inside a loop, XLA's CPU convolutions lose their threads.
  @jax.jit
  def step(params, opt_state, x, y):
    updates, opt_state = tx.update(jax.grad(loss)(params, x, y), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state, rng = tx.init(params), np.random.default_rng(seed)
  for _ in range(EPOCHS):
    for ids in rng.permutation(len(source))[: per_epoch * BATCH].reshape(per_epoch, -1):
      params, opt_state = step(params, opt_state, source.images[ids], source.labels[ids])
  return params


def load_or_train(source: Source, cache: str, seed: int = 0) -> Callable:
  """Returns `classify(images) -> (probabilities [B, classes], features [B, 64])`.

  The weights are trained on first use, deterministically, and kept in `cache` under a name that
  changes with the data and with this code.

  Args:
    source: labelled training images.
    cache: folder of the weights.
    seed: of initialisation and order.
  """
  model = Classifier(source.num_classes)
  params = model.init(jax.random.key(seed), jnp.zeros((1, *source.image_size)))["params"]
  path = os.path.join(cache, f"classifier_{_fingerprint(source)}_{seed}.msgpack")
  if os.path.exists(path):
    with open(path, "rb") as f:
      params = flax.serialization.from_bytes(params, f.read())
  else:
    params = _train(model, params, source, seed)
    if jax.process_index() == 0:
      os.makedirs(cache, exist_ok=True)
      with open(path + ".tmp", "wb") as f:
        f.write(flax.serialization.to_bytes(params))
      os.replace(path + ".tmp", path)

  def classify(images):
    logits, features = model.apply({"params": params}, images)
    return jax.nn.softmax(logits), features

  return classify

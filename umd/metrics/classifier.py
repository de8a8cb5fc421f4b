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
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from umd.data import Source
from umd.runs.progress import Clock, Tell, during, say

FEATURES = 64
EPOCHS, MAX_STEPS, BATCH, PEAK_LR, WEIGHT_DECAY = 30, 4000, 64, 3e-3, 1e-2
MAX_BYTES = 2**33  # Of training images, all of which are held in memory.


class Classifier(nn.Module):
  """Two convolutions, a pool, a hidden layer -> (logits [B, classes], features [B, 64]).

  Images of more than 8 pixels are first halved, a convolution and a pool at a time.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]):
    level = 0
    while min(x.shape[1:3]) > 8:
      level += 1
      x = nn.relu(nn.Conv(32, (3, 3), name=f"halve{level}")(x))
      x = nn.avg_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Conv(32, (3, 3), name="conv1")(x))
    x = nn.relu(nn.Conv(64, (3, 3), name="conv2")(x))
    x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
    features = nn.relu(nn.Dense(FEATURES, name="hidden")(x))
    return nn.Dense(self.num_classes, name="logits")(features), features


def check(source: Source) -> None:
  """Raises ValueError, with the remedy, if no classifier can be trained on the source."""
  if not source.num_classes:
    raise ValueError(
      f"{source.name} has no labels, and samples are judged by a classifier of its classes. Name "
      "labelled data, or leave this evaluator out."
    )
  size = 4 * len(source) * int(np.prod(source.image_size))
  if size > MAX_BYTES:
    raise ValueError(
      f"{source.name} takes {size / 2**30:.1f} GB in memory; the classifier that judges samples is "
      f"trained on {MAX_BYTES / 2**30:.0f} GB at most. Name a part, such as split='train[:50000]'."
    )


def load_or_train(source: Source, cache: str, seed: int = 0, tell: Tell = say) -> Callable:
  """Returns `classify(images) -> (probabilities [B, classes], features [B, 64])`.

  The weights are trained on first use, deterministically, and kept in `cache` under a name that
  changes with the data and with this code. Of several processes each trains on one of its own
  devices, and all then take the weights of the first.

  Args:
    source: labelled training images; all of them are held in memory.
    cache: folder of the weights.
    seed: of the initialisation and of the order of examples.
    tell: takes a line now and then while training.

  Raises:
    ValueError: the source has no labels or is too large.
  """
  check(source)
  model = Classifier(source.num_classes)
  params = model.init(jax.random.key(seed), jnp.zeros((1, *source.image_size)))["params"]
  source.arrays()  # Reads and decodes the images, and says so.
  with during(f"looking whether {source.name} has changed", tell):
    path = os.path.join(cache, f"classifier_{_fingerprint(source)}_{seed}.msgpack")
  if os.path.exists(path):
    with open(path, "rb") as f:
      params = flax.serialization.from_bytes(params, f.read())
  else:
    params = _train(model, params, source, seed, tell)
    if jax.process_index() == 0:
      _save(path, params)
  if jax.process_count() > 1:
    params = multihost_utils.broadcast_one_to_all(params)
  params = jax.tree.map(np.asarray, params)

  def classify(images):
    logits, features = model.apply({"params": params}, images)
    return jax.nn.softmax(logits), features

  return classify


def _fingerprint(source: Source) -> str:
  """Names the cached weights: it changes with the images, the labels and this file."""
  with open(__file__, "rb") as f:
    digest = hashlib.sha256(f.read())
  for array in source.arrays():
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]


def _train(model: Classifier, params, source: Source, seed: int, tell: Tell):
  """Trains with AdamW and a one-cycle schedule; the seed decides the order of the examples."""
  images, labels = source.arrays()
  per_epoch = max(len(images) // BATCH, 1)
  steps = min(EPOCHS * per_epoch, MAX_STEPS)
  schedule = optax.cosine_onecycle_schedule(steps, PEAK_LR)
  tx = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

  def loss(params, x, y):
    logits, _ = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  # One call a step, no lax loop: inside a loop XLA's convolutions run on one thread of a CPU.
  @jax.jit
  def step(params, opt_state, x, y):
    updates, opt_state = tx.update(jax.grad(loss)(params, x, y), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = tx.init(params)
  rng = np.random.default_rng(seed)
  clock = Clock(tell, f"training the classifier of {source.name}, step", steps)
  for number in range(steps):
    if number % per_epoch == 0:
      order = rng.permutation(len(images))
    start = number % per_epoch * BATCH
    ids = order[start : start + BATCH]
    params, opt_state = step(params, opt_state, images[ids], labels[ids])
    clock(number + 1)
  return params


def _save(path: str, params) -> None:
  """Writes weights to a file that is whole or not there."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path + ".tmp", "wb") as f:
    f.write(flax.serialization.to_bytes(params))
  os.replace(path + ".tmp", path)

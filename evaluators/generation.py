"""Samples of the model, looked at and measured."""

import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from evaluators.classifier import load_or_train
from evaluators.context import Context
from umd import fid
from umd.data import Source, load
from umd.inference import example_keys
from umd.metrics import Images, to_grid
from umd.state import TrainState


class Evaluator:
  """Draws `num` samples from the EMA weights, the classes in turn, and judges them.

  The judge is a small classifier of the training split (see `evaluators.classifier`), so the
  distances are between its features and are not FIDs. Yields:

    frechet_classifier: Frechet distance of the samples to the training split.
    frechet_classifier_floor: the same of real images, the test split: as good as it gets.
    frechet_classifier_ceiling: the same of clipped noise.
    frechet_classifier_position: (distance - floor) / (ceiling - floor); 0 is real, 1 is noise.
    score_classifier, score_classifier_test: Inception-style score of samples and of the test split.
    agreement: share of samples that the classifier takes for the class asked for (with labels).
    classifier_accuracy: of the classifier, on the test split.
    images: a grid, one row per class.
  """

  def __init__(
    self,
    context: Context,
    *,
    data: str,
    train_split: str,
    test_split: str,
    num: int,
    sampling: Mapping,
    columns: int = 10,
    scale: int = 6,
  ):
    """`sampling`: arguments of `umd.inference.Inference.sample`, tried out here on shapes."""
    self._train, self._test = load(data, train_split), load(data, test_split)
    self._context, classes = context, self._train.num_classes
    if num < 2 or num % classes:
      raise ValueError(
        f"num={num} must be a positive multiple of the {classes} classes, so that each is sampled "
        "equally often."
      )
    self._columns, self._scale = min(columns, num // classes), scale
    model, inference = context.inference.model, context.inference
    self._conditional = model.num_classes > 0
    # Position i asks for class i mod C; its key is a function of (seed, i).
    labels = np.arange(num, dtype=np.int32) % classes
    blank = np.zeros((num, *self._train.image_size), np.float32)
    self._wanted = Source("samples", blank, labels, classes)

    def sample(params, batch):
      keys = example_keys(context.seed, batch["index"])
      labels = batch["label"] if self._conditional else None
      images = inference.sample(params, keys, labels, **sampling)
      return {"image": jnp.clip(images, -1.0, 1.0)}

    self._sample = context.jit(sample)
    self._try_out(model, sample)

  @staticmethod
  def _try_out(model, sample) -> None:
    """Traces the sampler, so that what it refuses it refuses at start."""
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    init = lambda key: model.init(key, jnp.zeros((1, *model.image_size)), jnp.zeros(1, jnp.int32))
    params = jax.eval_shape(init, jax.random.key(0))["params"]
    jax.eval_shape(sample, params, {"index": one, "label": one})

  @functools.cached_property
  def _judge(self):
    """Classifies a batch; the classifier is trained (or read) when it is first needed."""
    classify = load_or_train(self._train, self._context.cache)

    def judge(params, batch):
      probs, features = classify(batch["image"])
      return {"probs": probs, "features": features}

    return self._context.jit(judge)

  def _verdict(self, source: Source) -> dict[str, np.ndarray]:
    return self._context.map(self._judge, {}, source)

  @functools.cached_property
  def _reference(self):
    return fid.moments(self._verdict(self._train)["features"])

  def _distance(self, features: np.ndarray) -> float:
    return fid.frechet_distance(*fid.moments(features), *self._reference)

  @functools.cached_property
  def _baselines(self) -> dict[str, float]:
    real = self._verdict(self._test)
    rng = np.random.default_rng(self._context.seed)
    noise = rng.normal(size=self._wanted.images.shape).clip(-1, 1).astype(np.float32)
    noise = Source("noise", noise, self._wanted.labels, self._wanted.num_classes)
    return {
      "frechet_classifier_floor": self._distance(real["features"]),
      "frechet_classifier_ceiling": self._distance(self._verdict(noise)["features"]),
      "score_classifier_test": fid.inception_score(real["probs"]),
      "classifier_accuracy": float((real["probs"].argmax(axis=1) == self._test.labels).mean()),
    }

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float | Images]]:
    images = self._context.map(self._sample, state.ema_params, self._wanted)["image"]
    labels, classes = self._wanted.labels, self._wanted.num_classes
    verdict = self._verdict(Source("samples", images, labels, classes))
    distance = self._distance(verdict["features"])
    floor = self._baselines["frechet_classifier_floor"]
    ceiling = self._baselines["frechet_classifier_ceiling"]
    yield "frechet_classifier", distance
    yield "frechet_classifier_position", (distance - floor) / (ceiling - floor)
    yield "score_classifier", fid.inception_score(verdict["probs"])
    if self._conditional:
      yield "agreement", float((verdict["probs"].argmax(axis=1) == labels).mean())
    yield from self._baselines.items()
    by_class = [images[labels == c][: self._columns] for c in range(classes)]
    yield "images", to_grid(np.concatenate(by_class), self._columns, self._scale)

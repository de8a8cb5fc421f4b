"""Samples of the model, looked at and measured."""

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from evaluators import classifier
from evaluators.context import Context, open_data
from umd import fid
from umd.inference import example_keys, example_normal
from umd.metrics import Images, to_grid
from umd.state import TrainState


class Evaluator:
  """Draws `num` samples from the EMA weights, the classes in turn, and judges them.

  The judge is a small classifier of the training data (see `evaluators.classifier`), so the
  distances are between its features and are not FIDs. Samples are judged where they are drawn: only
  those shown leave the devices. Yields:

    frechet_classifier: Frechet distance of the samples to the training data.
    frechet_classifier_floor: the same of real images, the test data: as good as it gets.
    frechet_classifier_ceiling: the same of clipped noise.
    frechet_classifier_position: (distance - floor) / (ceiling - floor); 0 is real, 1 is noise.
    score_classifier, score_classifier_test: Inception-style score of samples and of the test data.
    agreement: share of samples that the classifier takes for the class asked for (with labels).
    classifier_accuracy: of the classifier, on the test data.
    images: a grid, with labels one row per class.
  """

  def __init__(
    self,
    context: Context,
    *,
    train: Mapping,
    test: Mapping,
    num: int,
    sampling: Mapping,
    rows: int = 10,
    columns: int = 10,
    scale: int = 6,
  ):
    """`sampling`: arguments of `umd.inference.Inference.sample`, tried out here on shapes.

    `rows`: so many classes are shown, spread over all.
    """
    self._train, self._test = open_data("train", train), open_data("test", test)
    self._context, self._num, self._scale = context, num, scale
    model, inference = context.inference.model, context.inference
    self._check_data(model)
    classes = model.num_classes
    if num < 2 or (classes and num % classes):
      raise ValueError(
        f"num={num} must be at least 2, and a multiple of the model's {classes} classes, so that "
        "each is sampled equally often."
      )

    def sample(params, batch):
      # Position i asks for class i mod C; its key is a function of (seed, i).
      keys = example_keys(context.seed, batch["index"])
      labels = batch["index"] % classes if classes else None
      return jnp.clip(inference.sample(params, keys, labels, **sampling), -1.0, 1.0)

    self._sample, self._image_size = sample, model.image_size
    self._columns = min(columns, num // classes if classes else num)
    self._shown = np.arange(min(rows * columns, num))
    if classes:
      of = np.unique(np.linspace(0, classes - 1, min(rows, classes)).astype(int))
      self._shown = (of[:, None] + classes * np.arange(self._columns)).ravel()
    self._try_out(model)

  def _check_data(self, model) -> None:
    classifier.check(self._train)
    for key, source in (("train", self._train), ("test", self._test)):
      if source.image_size != tuple(model.image_size):
        raise ValueError(
          f"{key}: images of {source.name} are {source.image_size}, the model's are "
          f"{tuple(model.image_size)}. Set {key}.pp to what the model is trained on."
        )
      for what, classes in (("train", self._train.num_classes), ("the model", model.num_classes)):
        if classes and source.num_classes != classes:
          raise ValueError(
            f"{key}: {source.name} has {source.num_classes} classes, {what} has {classes}. Name "
            "data with the same classes."
          )

  def _try_out(self, model) -> None:
    """Traces the sampler, so that what it refuses it refuses at start."""
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    init = lambda key: model.init(key, jnp.zeros((1, *model.image_size)), jnp.zeros(1, jnp.int32))
    params = jax.eval_shape(init, jax.random.key(0))["params"]
    jax.eval_shape(self._sample, params, {"index": one})

  @functools.cached_property
  def _classify(self) -> Callable:
    """The classifier is trained (or read) when it is first needed."""
    return classifier.load_or_train(
      self._train, self._context.cache, progress=self._context.progress
    )

  def _judge(self, draw: Callable, shown=()) -> Callable:
    """Compiles: draw images by `draw(params, batch)`, classify them."""
    classify = self._classify  # Trained here, not while `judge` is traced.

    def judge(params, batch):
      images = draw(params, batch)
      probs, features = classify(images)
      label = {"label": batch["label"]} if "label" in batch else {}
      return {"probs": probs, "features": features, "image": images, **label}

    return self._context.jit(judge, ("image",), shown)

  @functools.cached_property
  def _judge_samples(self) -> Callable:
    return self._judge(self._sample, self._shown)

  @functools.cached_property
  def _baselines(self) -> tuple[Callable, dict[str, float]]:
    """How far features are from those of the training data; what real images and noise get."""
    context, real = self._context, self._judge(lambda params, batch: batch["image"])
    reference = fid.moments(context.map(real, {}, self._train, keep=("features",))["features"])
    distance = lambda features: fid.frechet_distance(*fid.moments(features), *reference)
    test = context.map(real, {}, self._test)

    def noise(params, batch):
      keys = example_keys(context.seed, batch["index"])
      return jnp.clip(example_normal(keys, self._image_size), -1.0, 1.0)

    noisy = context.map_positions(self._judge(noise), {}, self._num, "noise")
    return distance, {
      "frechet_classifier_floor": distance(test["features"]),
      "frechet_classifier_ceiling": distance(noisy["features"]),
      "score_classifier_test": fid.inception_score(test["probs"]),
      "classifier_accuracy": float((test["probs"].argmax(axis=1) == test["label"]).mean()),
    }

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float | Images]]:
    classes = self._context.inference.model.num_classes
    found = self._context.map_positions(self._judge_samples, state.ema_params, self._num, "samples")
    measure, baselines = self._baselines
    distance = measure(found["features"])
    floor, ceiling = (baselines[f"frechet_classifier_{k}"] for k in ("floor", "ceiling"))
    yield "frechet_classifier", distance
    yield "frechet_classifier_position", (distance - floor) / (ceiling - floor)
    yield "score_classifier", fid.inception_score(found["probs"])
    if classes:
      wanted = np.arange(self._num) % classes
      yield "agreement", float((found["probs"].argmax(axis=1) == wanted).mean())
    yield from baselines.items()
    yield "images", to_grid(found["image"], self._columns, self._scale)

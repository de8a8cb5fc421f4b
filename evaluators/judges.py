"""Who judges samples: a small classifier of the training data, or Inception.

A judge looks at images on the devices (`look`, traced, with `params` as an argument) and turns what
it saw of all of them into metrics (`measure`). What it needs besides the samples is checked when it
is built and computed when it is first needed, once.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evaluators import classifier
from evaluators.context import Context, open_data
from umd import extraction, fid, progress, quantize, statistics
from umd.data import Source
from umd.inference import example_keys, example_normal
from umd.sharding import all_agree
from umd.weights import INCEPTION

KEPT = 10_000  # Reference images whose features are kept, as many as in ADM's files.


def check_images(key: str, source: Source, image_size: tuple[int, int, int]) -> None:
  """Raises ValueError unless the images of the setting `key` are as large as the samples."""
  if source.image_size != tuple(image_size):
    raise ValueError(
      f"{key}: images of {source.name} are {source.image_size}, the samples are "
      f"{tuple(image_size)}. Set {key}.pp so that they are of the same size."
    )


class Classifier:
  """Yields frechet_classifier and the metrics that go with it, see `evaluators.generation`.

  Distances are between features of a classifier of the training data (`evaluators.classifier`), so
  they are no FIDs.
  """

  own = ()
  params: Mapping = {}

  def __init__(self, context: Context, num: int, *, train: Mapping | None, test: Mapping | None):
    """`num`: of samples; `train`, `test`: specs of labelled data of the model's size."""
    if not train or not test:
      raise ValueError("features='classifier' needs the data train= and test=.")
    self._train, self._test = open_data("train", train), open_data("test", test)
    self._context, self._num = context, num
    model = context.inference.model
    self._image_size, self._classes = context.image_size, model.num_classes
    classifier.check(self._train)
    for key, source in (("train", self._train), ("test", self._test)):
      check_images(key, source, context.image_size)
      for what, classes in (("train", self._train.num_classes), ("the model", model.num_classes)):
        if classes and source.num_classes != classes:
          raise ValueError(
            f"{key}: {source.name} has {source.num_classes} classes, {what} has {classes}. Name "
            "data with the same classes."
          )

  def prepare(self) -> None:
    """Trains the classifier, or reads it: here, not while `look` is traced."""
    _ = self._classify

  @functools.cached_property
  def _classify(self) -> Callable:
    context = self._context
    return classifier.load_or_train(self._train, context.cache, progress=context.progress)

  def look(self, params, images) -> dict[str, jax.Array]:
    """{probs [B, classes], features [B, 64]} of images in [-1, 1]."""
    probs, features = self._classify(images)
    return {"probs": probs, "features": features}

  def listen(self) -> None:
    """Nothing is gathered on the way: every process gets all rows."""

  def measure(self, found: Mapping[str, np.ndarray], listener) -> Iterator[tuple[str, float]]:
    """Metrics of the samples, of which `found` holds the rows of `look`."""
    measure, baselines = self._baselines
    distance = measure(found["features"])
    floor, ceiling = (baselines[f"frechet_classifier_{k}"] for k in ("floor", "ceiling"))
    yield "frechet_classifier", distance
    yield "frechet_classifier_position", (distance - floor) / (ceiling - floor)
    yield "score_classifier", fid.inception_score(found["probs"])
    if self._classes:
      wanted = np.arange(self._num) % self._classes
      yield "agreement", float((found["probs"].argmax(axis=1) == wanted).mean())
    yield from baselines.items()

  @functools.cached_property
  def _baselines(self) -> tuple[Callable, dict[str, float]]:
    """How far features are from those of the training data; what real images and noise get."""
    context = self._context

    def judge(params, batch):
      return {**self.look(params, batch["image"]), "label": batch["label"]}

    def noise(params, batch):
      keys = example_keys(context.seed, batch["index"])
      return self.look(params, jnp.clip(example_normal(keys, self._image_size), -1.0, 1.0))

    real = context.jit(judge)
    reference = fid.moments(context.map(real, {}, self._train, keep=("features",))["features"])
    distance = lambda features: fid.frechet_distance(*fid.moments(features), *reference)
    test = context.map(real, {}, self._test)
    noisy = context.map_positions(context.jit(noise), {}, self._num, "noise")
    return distance, {
      "frechet_classifier_floor": distance(test["features"]),
      "frechet_classifier_ceiling": distance(noisy["features"]),
      "score_classifier_test": fid.inception_score(test["probs"]),
      "classifier_accuracy": float((test["probs"].argmax(axis=1) == test["label"]).mean()),
    }


class Inception:
  """Yields FID and the other metrics of `umd.statistics.METRICS`, as papers report them."""

  own = ("pool", "spatial", "logits")

  def __init__(
    self,
    context: Context,
    num: int,
    *,
    reference: str | Mapping | None,
    weights: str,
    rounding: str,
    metrics: Sequence[str],
  ):
    """Finds the weights, fetching them if need be, and reads the reference if it is a file.

    Args:
      context: of the evaluator.
      num: number of samples.
      reference: a file that `umd.statistics.read` takes; or the spec of the data to compare with,
        whose statistics are computed when they are first needed and kept in the cache.
      weights: file of Inception's weights, "" for the cached one.
      rounding: of the samples to 256 levels, a key of `umd.quantize.QUANTIZERS`.
      metrics: keys of `umd.statistics.METRICS`.
    """
    if not reference:
      raise ValueError("features='inception' needs reference=, a file of statistics or data.")
    quantize.check(rounding)
    statistics.check(metrics, num)
    channels = context.image_size[2]
    if channels not in (1, 3):
      raise ValueError(f"features='inception': images have {channels} channels, not 1 or 3.")
    self._context, self._num, self._rounding, self._metrics = context, num, rounding, metrics
    self._kept = num if any(statistics.METRICS[m].needs == ("features",) for m in metrics) else 0
    if isinstance(reference, str):
      self._file, self._source = statistics.read(reference), None
      statistics.check_serves(self._file, metrics)
      statistics.check_weights(self._file, INCEPTION.sha256)
    else:
      self._file, self._source = None, open_data("reference", reference)
      check_images("reference", self._source, context.image_size)
    self._weights = extraction.find_network(weights, context.progress)
    if num < statistics.FEW:
      context.progress(
        f"num={num} samples are fewer than the {statistics.FEW} features of Inception: an FID of "
        "so few is far too high, and only to be compared with others of as many."
      )

  def prepare(self) -> None:
    """Places the network on the devices."""
    _ = self._network

  @functools.cached_property
  def _network(self) -> extraction.Network:
    return extraction.load_network(self._weights, self._context.mesh)

  @property
  def params(self):
    return self._network.params

  def look(self, params, images) -> dict[str, jax.Array]:
    """{pool [B, 2048], spatial [B, 2023], logits [B, 1008]} of images in [-1, 1]."""
    return extraction.look(params, images, self._rounding, self._context.mesh)

  def listen(self) -> extraction.Gatherer:
    """Takes this process's rows of `look`, batch by batch."""
    sha256, kept = self._network.sha256, self._kept
    return extraction.Gatherer("samples", self._num, sha256, keep=kept, scores=True)

  def measure(self, found, listener: extraction.Gatherer) -> Iterator[tuple[str, float | str]]:
    """Metrics of the samples that `listener` gathered; their number stands in their names."""
    samples, number = listener.statistics(), statistics.label(self._num)
    tell = self._context.progress
    for name, value in statistics.compare(samples, self._reference, self._metrics, tell).items():
      yield f"{name}_{number}", value
    yield "reference", self._reference.name
    yield "quantize", self._rounding

  @functools.cached_property
  def _reference(self) -> statistics.Statistics:
    if self._file:
      return self._file
    context, source = self._context, self._source
    network = self._network
    with progress.during(f"looking whether {source.name} has changed", context.progress):
      name = extraction.fingerprint(source, network)
    path = os.path.join(context.cache, f"inception_{name}.npz")
    if all_agree(os.path.exists(path)):
      return dataclasses.replace(statistics.read(path), name=source.name)
    context.progress(
      f"statistics of {source.name} under Inception are computed once and kept in {path}. To have "
      "them beforehand, make a file with tools.fid_reference and name it as the reference."
    )
    settings = dict(keep=KEPT, tell=context.progress)
    found = extraction.describe(source, network, context.mesh, context.batch_size, **settings)
    statistics.write(path, found)  # All processes: their caches may be folders of their own.
    return found


def make(features: str, context: Context, num: int, settings: Mapping) -> dict[str, object]:
  """{name: judge} for `features`, names of judges joined by "+".

  Args:
    features: "classifier", "inception" or "classifier+inception".
    context, num: of the evaluator.
    settings: {name: arguments of the judge}.
  """
  kinds = {"classifier": Classifier, "inception": Inception}
  names = features.split("+")
  if unknown := [name for name in names if name not in kinds]:
    raise ValueError(f"features={features!r}: {unknown} are not among {list(kinds)}.")
  return {name: kinds[name](context, num, **settings[name]) for name in names}

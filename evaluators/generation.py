"""Samples of the model, looked at and measured."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evaluators.context import Context, Weights, open_data
from umd.data import Source
from umd.devices.mesh import all_agree
from umd.metrics import classifier, frechet, quantize, statistics
from umd.metrics import features as extraction
from umd.models.network import param_shapes
from umd.runs import progress
from umd.runs.writers import Images, to_grid
from umd.samplers import Sampling
from umd.samplers.keys import example_keys, example_normal
from umd.state import TrainState
from umd.weights.download import INCEPTION

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

  Distances are between features of a classifier of the training data (`umd.metrics.classifier`), so
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
    yield "score_classifier", frechet.inception_score(found["probs"])
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
    reference = frechet.moments(context.map(real, {}, self._train, keep=("features",))["features"])
    distance = lambda features: frechet.frechet_distance(*frechet.moments(features), *reference)
    test = context.map(real, {}, self._test)
    noisy = context.map_positions(context.jit(noise), {}, self._num, "noise")
    return distance, {
      "frechet_classifier_floor": distance(test["features"]),
      "frechet_classifier_ceiling": distance(noisy["features"]),
      "score_classifier_test": frechet.inception_score(test["probs"]),
      "classifier_accuracy": float((test["probs"].argmax(axis=1) == test["label"]).mean()),
    }


class Inception:
  """Yields FID and the other metrics of `umd.metrics.statistics.METRICS`, as papers report them."""

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
      reference: a file that `umd.metrics.statistics.read` takes; or the spec of the data to compare with,
        whose statistics are computed when they are first needed and kept in the cache.
      weights: file of Inception's weights, "" for the cached one.
      rounding: of the samples to 256 levels, a key of `umd.metrics.quantize.QUANTIZERS`.
      metrics: keys of `umd.metrics.statistics.METRICS`.
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


class Evaluator:
  """Draws `num` samples from the EMA weights, the classes in turn, and judges them.

  Samples are drawn once for all judges and pictures, and judged where they are drawn: only those
  shown leave the devices. Sample i is a function of the seed, i and the weights, whatever the
  number of devices.

  features="inception" yields what papers report, named after the number of samples (fid_10k; see
  `umd.metrics.statistics.METRICS`), in ADM's way but for the labels, which are equally many of each class,
  in turn:

    fid_N, sfid_N: Frechet distance of pool and of spatial features to the reference.
    is_N, is_std_N: Inception score, mean and deviation over splits of 5000 in order.
    is_shuffled_N, is_shuffled_std_N: the same over ten random splits, as torch-fidelity has it.
    precision_N, recall_N: of 3-nearest-neighbour manifolds.
    kid_N, kid_std_N: kernel distance.
    reference, quantize: what it was measured against, how samples were rounded to 256 levels.

  features="classifier" is for small data sets: the judge is a small classifier of the training data
  (see `umd.metrics.classifier`), so the distances are no FIDs. It yields:

    frechet_classifier: Frechet distance of the samples to the training data.
    frechet_classifier_floor: the same of real images, the test data: as good as it gets.
    frechet_classifier_ceiling: the same of clipped noise.
    frechet_classifier_position: (distance - floor) / (ceiling - floor); 0 is real, 1 is noise.
    score_classifier, score_classifier_test: Inception-style score of samples and of the test data.
    agreement: share of samples that the classifier takes for the class asked for (with labels).
    classifier_accuracy: of the classifier, on the test data.

  Both yield sampler and cfg_scale, and images: a grid, with labels one row per class.
  """

  def __init__(
    self,
    context: Context,
    *,
    num: int,
    sampling: Mapping,
    features: str = "classifier",
    train: Mapping | None = None,
    test: Mapping | None = None,
    reference: str | Mapping | None = None,
    weights: str = "",
    quantize: str = "round",
    metrics: Sequence[str] = ("fid", "sfid", "is"),
    rows: int = 10,
    columns: int = 10,
    scale: int = 6,
  ):
    """Builds the judges and tries the sampler out on shapes.

    Args:
      context: shared by all evaluators.
      num: number of samples; a multiple of the number of classes.
      sampling: fields of `umd.samplers.Sampling`.
      features: "classifier", "inception", or both joined by "+".
      train, test: specs of labelled data, for the classifier.
      reference, weights, quantize, metrics: for Inception, see `evaluators.generation.Inception`.
      rows, columns: of the grid; so many classes are shown, spread over all.
      scale: each pixel is drawn `scale` x `scale`.

    Raises:
      ValueError: settings that make no sense, data that does not fit the model or one another.
      FileNotFoundError: data, reference or weights that are not there.
    """
    self._context, self._num, self._scale = context, num, scale
    sampling = Sampling().updated(sampling)
    clip_x0 = sampling.clip_x0 and context.codec.bounded  # Latents have no bounds.
    self._sampling = dataclasses.replace(sampling, clip_x0=clip_x0)
    self._classes = classes = context.inference.model.num_classes
    if num < 2 or (classes and num % classes):
      raise ValueError(
        f"num={num} must be at least 2, and a multiple of the model's {classes} classes, so that "
        "each is sampled equally often."
      )
    self._columns = min(columns, num // classes if classes else num)
    self._shown = _shown(num, classes, rows, self._columns)
    self._try_out()
    settings = {
      "classifier": dict(train=train, test=test),
      "inception": dict(reference=reference, weights=weights, rounding=quantize, metrics=metrics),
    }
    self._judges = make(features, context, num, settings)

  def _sample(self, weights: Weights, batch) -> jax.Array:
    """The samples at positions batch["index"]."""
    # Position i asks for class i mod C; its key is a function of (seed, i).
    keys = example_keys(self._context.seed, batch["index"])
    labels = batch["index"] % self._classes if self._classes else None
    context = self._context
    made = context.inference.sample(weights.model, keys, labels, self._sampling)
    return jnp.clip(context.codec.decode(weights.codec, made), -1.0, 1.0)

  def _try_out(self) -> None:
    """Traces the sampler, so that what it refuses it refuses at start."""
    model, size = self._context.inference.model, self._context.mesh.size
    index = jax.ShapeDtypeStruct((size,), jnp.int32)
    params = param_shapes(model)
    jax.eval_shape(self._sample, self._context.weights(params), {"index": index})

  @functools.cached_property
  def _draw(self) -> Callable:
    """Compiles: draw samples, let every judge look at them."""

    def draw(params, batch):
      images = self._sample(params["weights"], batch)
      rows = {"image": images}
      for name, judge in self._judges.items():
        rows |= judge.look(params[name], images)
      return rows

    own = [name for judge in self._judges.values() for name in judge.own]
    return self._context.jit(draw, ("image",), self._shown, own)

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float | str | Images]]:
    for judge in self._judges.values():
      judge.prepare()
    params = {name: judge.params for name, judge in self._judges.items()}
    params["weights"] = self._context.weights(state.ema_params)
    listeners = {name: judge.listen() for name, judge in self._judges.items()}

    def listen(rows, index):
      for listener in filter(None, listeners.values()):
        listener(rows, index)

    found = self._context.map_positions(self._draw, params, self._num, "samples", listen)
    for name, judge in self._judges.items():
      yield from judge.measure(found, listeners[name])
    yield "sampler", f"{self._sampling.sampler}, {self._sampling.steps} steps"
    yield "cfg_scale", float(self._sampling.cfg_scale)
    yield "images", to_grid(found["image"], self._columns, self._scale)


def _shown(num: int, classes: int, rows: int, columns: int) -> np.ndarray:
  """Positions of the samples in the grid, row by row; with labels a row per class, spread out."""
  if not classes:
    return np.arange(min(rows * columns, num))
  of = np.unique(np.linspace(0, classes - 1, min(rows, classes)).astype(int))
  return (of[:, None] + classes * np.arange(columns)).ravel()

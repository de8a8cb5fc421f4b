"""Samples of a trained model, drawn once, looked at and measured.

The file reads from the outside in: the settings, the evaluator that draws samples, and the two
judges that measure them.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evaluators.context import Context, Listener, Weights, open_data, setting
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
REFERENCE = "A file of statistics (see tools.fid_reference), or the data to compare with."


@dataclasses.dataclass(frozen=True)
class Settings:
  num: int = setting(
    "The number of samples, a multiple of the number of classes.", within="[2, inf)"
  )
  sampling: Mapping = setting("How samples are drawn: fields of `umd.samplers.Sampling`.")
  features: str = setting(
    "The judges: classifier, inception, or classifier+inception.", "classifier"
  )
  train: Mapping | None = setting("The data with labels that train the classifier.", None)
  test: Mapping | None = setting("The data with labels that the classifier is compared on.", None)
  reference: str | Mapping | None = setting(REFERENCE, None)
  weights: str = setting("The file of Inception's weights; '' for the downloaded one.", "")
  quantize: str = setting(
    "How samples become 8 bits for Inception: round, adm, dit, none.", "round"
  )
  metrics: Sequence[str] = setting("The metrics by Inception's features.", ("fid", "sfid", "is"))
  rows: int = setting(
    "The rows of the grid that is shown; with labels one class each.", 10, "[1, inf)"
  )
  columns: int = setting("The columns of the grid that is shown.", 10, "[1, inf)")
  scale: int = setting("Each pixel is drawn as so many by so many.", 6, "[1, inf)")


class Evaluator:
  """Draws samples from the averaged weights, the classes in turn, and has them judged.

  Samples are drawn once for all judges and pictures, and judged on the devices where they are
  drawn: only those that are shown leave them. Sample i is a function of the seed, of i and of the
  weights, whatever the number of devices. Its class is i modulo the number of classes; ADM draws
  classes at random instead.

  Yields what the judges yield (see `InceptionJudge` and `ClassifierJudge`); "sampler" and
  "cfg_scale"; and "images", a grid which shows one class per row if there are labels.
  """

  def __init__(self, context: Context, settings: Settings):
    """Builds the judges and tries the sampler out on shapes.

    Raises:
      ValueError: settings make no sense, or data do not fit the model or one another.
      FileNotFoundError: data, a reference or weights are not there.
    """
    num, classes = settings.num, context.inference.model.num_classes
    if num < 2 or (classes and num % classes):
      raise ValueError(
        f"num={num} must be at least 2, and a multiple of the model's {classes} classes, so that "
        "each is sampled equally often."
      )
    self._context, self._settings = context, settings
    sampling = Sampling().updated(settings.sampling)
    clip_x0 = sampling.clip_x0 and context.codec.bounded  # Latents have no bounds.
    self._sampling = dataclasses.replace(sampling, clip_x0=clip_x0)
    self._try_out()
    self._judges = make_judges(context, settings)
    self._columns = min(settings.columns, num // classes if classes else num)
    shown = positions_shown(num, classes, settings.rows, self._columns)
    local = [name for judge in self._judges.values() for name in judge.local]
    self._draw = context.jit(self._draw_batch, ("image",), shown, local)

  def _try_out(self) -> None:
    """Traces the sampler, so that it refuses at start what it refuses."""
    index = jax.ShapeDtypeStruct((self._context.mesh.size,), jnp.int32)
    params = self._context.weights(param_shapes(self._context.inference.model))
    jax.eval_shape(self._sample, params, {"index": index})

  def _sample(self, weights: Weights, batch) -> jax.Array:
    """Draws the samples at positions batch["index"], each by a key of its own."""
    context, classes = self._context, self._context.inference.model.num_classes
    keys = example_keys(context.seed, batch["index"])
    labels = batch["index"] % classes if classes else None
    drawn = context.inference.sample(weights.model, keys, labels, self._sampling)
    return jnp.clip(context.codec.decode(weights.codec, drawn), -1.0, 1.0)

  def _draw_batch(self, params, batch):
    """Draws samples and lets every judge look at them."""
    images = self._sample(params["weights"], batch)
    rows = {"image": images}
    for name, judge in self._judges.items():
      rows |= judge.look(params[name], images)
    return rows

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float | str | Images]]:
    params = {name: judge.prepare() for name, judge in self._judges.items()}
    params["weights"] = self._context.weights(state.ema_params)
    listeners = {name: judge.listen() for name, judge in self._judges.items()}

    def listen(rows, index):
      for listener in filter(None, listeners.values()):
        listener(rows, index)

    rows = self._context.map_positions(self._draw, params, self._settings.num, "samples", listen)
    for name, judge in self._judges.items():
      yield from judge.measure(rows, listeners[name])
    yield "sampler", f"{self._sampling.sampler}, {self._sampling.steps} steps"
    yield "cfg_scale", float(self._sampling.cfg_scale)
    yield "images", to_grid(rows["image"], self._columns, self._settings.scale)


def positions_shown(num: int, classes: int, rows: int, columns: int) -> np.ndarray:
  """Lists the samples of the grid, row by row; with labels a row per class, spread over all."""
  if not classes:
    return np.arange(min(rows * columns, num))
  labels = np.unique(np.linspace(0, classes - 1, min(rows, classes)).astype(int))
  return (labels[:, None] + classes * np.arange(columns)).ravel()


class Judge:
  """What measures samples: `look` runs on the devices, all else on the host.

  Attributes:
    local: names of the rows of `look` that stay with the process whose devices computed them.
  """

  local: Sequence[str] = ()

  def prepare(self):
    """Loads or trains the network that looks, once; returns the parameters that `look` takes."""

  def look(self, params, images: jax.Array) -> dict[str, jax.Array]:
    """Returns {name: [B, ...]} of images [B, H, W, C] in [-1, 1]."""

  def listen(self) -> Listener | None:
    """Returns what takes the local rows of `look` batch by batch, if there are any."""

  def measure(
    self, rows: Mapping[str, np.ndarray], listener: Listener | None
  ) -> Iterator[tuple[str, float | str]]:
    """Yields metrics of all samples, from the rows of `look` and what the listener gathered."""


class ClassifierJudge(Judge):
  """Judges samples of small data sets by a classifier of the training data.

  See `umd.metrics.classifier`. The distances are between its features, so they are no FIDs. Yields:

    frechet_classifier: Frechet distance of the samples to the training data.
    frechet_classifier_floor: the same of real images, the test data: as good as it gets.
    frechet_classifier_ceiling: the same of clipped noise.
    frechet_classifier_position: (distance - floor) / (ceiling - floor); 0 is real, 1 is noise.
    score_classifier, score_classifier_test: Inception-style score of samples and of the test data.
    agreement: share of samples that the classifier takes for the class asked for (with labels).
    classifier_accuracy: of the classifier, on the test data.
  """

  def __init__(self, context: Context, settings: Settings):
    if not settings.train or not settings.test:
      raise ValueError("features='classifier' needs the data train= and test=.")
    self._context, self._num = context, settings.num
    self._classes = context.inference.model.num_classes
    self._train = open_data("train", settings.train)
    self._test = open_data("test", settings.test)
    classifier.check(self._train)
    for key, source in (("train", self._train), ("test", self._test)):
      check_size(key, source, context.image_size)
      for what, classes in (("train", self._train.num_classes), ("the model", self._classes)):
        if classes and source.num_classes != classes:
          raise ValueError(
            f"{key}: {source.name} has {source.num_classes} classes, {what} has {classes}. Name "
            "data with the same classes."
          )

  def prepare(self):
    _ = self._classify  # Here, since training cannot happen while `look` is traced.
    return {}

  @functools.cached_property
  def _classify(self) -> Callable:
    context = self._context
    return classifier.load_or_train(self._train, context.cache, tell=context.progress)

  def look(self, params, images) -> dict[str, jax.Array]:
    probs, features = self._classify(images)
    return {"probs": probs, "features": features}

  def measure(self, rows, listener) -> Iterator[tuple[str, float]]:
    distance_of, baselines = self._baselines
    distance = distance_of(rows["features"])
    floor = baselines["frechet_classifier_floor"]
    ceiling = baselines["frechet_classifier_ceiling"]
    yield "frechet_classifier", distance
    yield "frechet_classifier_position", (distance - floor) / (ceiling - floor)
    yield "score_classifier", frechet.inception_score(rows["probs"])
    if self._classes:
      wanted = np.arange(self._num) % self._classes
      yield "agreement", float((rows["probs"].argmax(axis=1) == wanted).mean())
    yield from baselines.items()

  @functools.cached_property
  def _baselines(self) -> tuple[Callable, dict[str, float]]:
    """The distance of features to the training data, and what real images and noise score."""
    context = self._context

    def look_at_data(params, batch):
      return {**self.look(params, batch["image"]), "label": batch["label"]}

    def look_at_noise(params, batch):
      keys = example_keys(context.seed, batch["index"])
      noise = example_normal(keys, context.image_size)
      return self.look(params, jnp.clip(noise, -1.0, 1.0))

    real = context.jit(look_at_data)
    train = context.map(real, {}, self._train, keep=("features",))
    test = context.map(real, {}, self._test)
    noise = context.map_positions(context.jit(look_at_noise), {}, self._num, "noise")
    reference = frechet.moments(train["features"])

    def distance_of(features):
      return frechet.frechet_distance(*frechet.moments(features), *reference)

    return distance_of, {
      "frechet_classifier_floor": distance_of(test["features"]),
      "frechet_classifier_ceiling": distance_of(noise["features"]),
      "score_classifier_test": frechet.inception_score(test["probs"]),
      "classifier_accuracy": float((test["probs"].argmax(axis=1) == test["label"]).mean()),
    }


class InceptionJudge(Judge):
  """Judges samples as papers do, in ADM's way; metrics are named after their number (fid_10k).

  Yields what `metrics` chooses (see `umd.metrics.statistics.METRICS`):

    fid_N, sfid_N: Frechet distance of pool and of spatial features to the reference.
    is_N, is_std_N: Inception score, mean and deviation over splits of 5000 in order.
    is_shuffled_N, is_shuffled_std_N: the same over ten random splits, as torch-fidelity has it.
    precision_N, recall_N: of 3-nearest-neighbour manifolds.
    kid_N, kid_std_N: kernel distance.
    reference, quantize: what it was measured against, how samples were rounded to 256 levels.
  """

  local = ("pool", "spatial", "logits")

  def __init__(self, context: Context, settings: Settings):
    """Finds the weights, fetching them if need be, and reads the reference if it is a file."""
    num, metrics, reference = settings.num, settings.metrics, settings.reference
    if not reference:
      raise ValueError("features='inception' needs reference=, a file of statistics or data.")
    quantize.check(settings.quantize)
    statistics.check(metrics, num)
    channels = context.image_size[2]
    if channels not in (1, 3):
      raise ValueError(f"features='inception': images have {channels} channels, not 1 or 3.")
    self._context, self._settings = context, settings
    self._file = self._source = None
    if isinstance(reference, str):
      self._file = statistics.read(reference)
      statistics.check_serves(self._file, metrics)
      statistics.check_weights(self._file, INCEPTION.sha256)
    else:
      self._source = open_data("reference", reference)
      check_size("reference", self._source, context.image_size)
    self._weights = extraction.find_network(settings.weights, context.progress)
    if num < statistics.FEW:
      context.progress(
        f"num={num} samples are fewer than the {statistics.FEW} features of Inception: an FID of "
        "so few is far too high, and only to be compared with others of as many."
      )

  def prepare(self):
    return self._network.params

  @functools.cached_property
  def _network(self) -> extraction.LoadedInception:
    return extraction.load_network(self._weights, self._context.mesh)

  def look(self, params, images) -> dict[str, jax.Array]:
    return extraction.look(params, images, self._settings.quantize, self._context.mesh)

  def listen(self) -> extraction.Gatherer:
    num, metrics = self._settings.num, self._settings.metrics
    pairs = any("features" in statistics.METRICS[metric].needs for metric in metrics)
    keep = num if pairs else 0
    return extraction.Gatherer("samples", num, self._network.sha256, keep=keep, scores=True)

  def measure(self, rows, listener: extraction.Gatherer) -> Iterator[tuple[str, float | str]]:
    samples, reference = listener.statistics(), self._reference
    suffix = statistics.label(self._settings.num)
    tell = self._context.progress
    values = statistics.compare(samples, reference, self._settings.metrics, tell)
    yield from ((f"{name}_{suffix}", value) for name, value in values.items())
    yield "reference", reference.name
    yield "quantize", self._settings.quantize

  @functools.cached_property
  def _reference(self) -> statistics.Statistics:
    """The statistics of the reference: of a file, or of data, kept in the cache."""
    if self._file:
      return self._file
    context, source = self._context, self._source
    with progress.during(f"looking whether {source.name} has changed", context.progress):
      name = extraction.fingerprint(source, self._network)
    path = os.path.join(context.cache, f"inception_{name}.npz")
    if all_agree(os.path.exists(path)):
      return dataclasses.replace(statistics.read(path), name=source.name)
    context.progress(
      f"statistics of {source.name} under Inception are computed once and kept in {path}. To have "
      "them beforehand, make a file with tools.fid_reference and name it as the reference."
    )
    reference = extraction.describe(
      source, self._network, context.mesh, context.batch_size, keep=KEPT, tell=context.progress
    )
    statistics.write(path, reference)  # By all processes: their caches may be their own folders.
    return reference


def check_size(key: str, source: Source, image_size: tuple[int, int, int]) -> None:
  """Raises ValueError unless the images of the setting `key` are as large as the samples."""
  if source.image_size != tuple(image_size):
    raise ValueError(
      f"{key}: images of {source.name} are {source.image_size}, the samples are "
      f"{tuple(image_size)}. Set {key}.pp so that they are of the same size."
    )


JUDGES = {"classifier": ClassifierJudge, "inception": InceptionJudge}


def make_judges(context: Context, settings: Settings) -> dict[str, Judge]:
  """Builds {name: judge} of the names that settings.features joins by "+"."""
  names = settings.features.split("+")
  if unknown := [name for name in names if name not in JUDGES]:
    raise ValueError(f"features={settings.features!r}: {unknown} are not among {list(JUDGES)}.")
  return {name: JUDGES[name](context, settings) for name in names}

"""Samples of the model, looked at and measured."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evaluators import judges
from evaluators.context import Context, Weights
from umd.inference import Inference, example_keys
from umd.metrics import Images, to_grid
from umd.state import TrainState

SAMPLING = {
  name: parameter.default
  for name, parameter in inspect.signature(Inference.sample).parameters.items()
  if parameter.default is not parameter.empty
}


class Evaluator:
  """Draws `num` samples from the EMA weights, the classes in turn, and judges them.

  Samples are drawn once for all judges and pictures, and judged where they are drawn: only those
  shown leave the devices. Sample i is a function of the seed, i and the weights, whatever the
  number of devices.

  features="inception" yields what papers report, named after the number of samples (fid_10k; see
  `umd.statistics.METRICS`), in ADM's way but for the labels, which are equally many of each class,
  in turn:

    fid_N, sfid_N: Frechet distance of pool and of spatial features to the reference.
    is_N, is_std_N: Inception score, mean and deviation over splits of 5000 in order.
    is_shuffled_N, is_shuffled_std_N: the same over ten random splits, as torch-fidelity has it.
    precision_N, recall_N: of 3-nearest-neighbour manifolds.
    kid_N, kid_std_N: kernel distance.
    reference, quantize: what it was measured against, how samples were rounded to 256 levels.

  features="classifier" is for small data sets: the judge is a small classifier of the training data
  (see `evaluators.classifier`), so the distances are no FIDs. It yields:

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
      sampling: arguments of `umd.inference.Inference.sample`.
      features: "classifier", "inception", or both joined by "+".
      train, test: specs of labelled data, for the classifier.
      reference, weights, quantize, metrics: for Inception, see `evaluators.judges.Inception`.
      rows, columns: of the grid; so many classes are shown, spread over all.
      scale: each pixel is drawn `scale` x `scale`.

    Raises:
      ValueError: settings that make no sense, data that does not fit the model or one another.
      FileNotFoundError: data, reference or weights that are not there.
    """
    self._context, self._num, self._scale = context, num, scale
    # Unless it is said: latents have no bounds.
    self._sampling = {**SAMPLING, "clip_x0": context.codec.bounded, **sampling}
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
    self._judges = judges.make(features, context, num, settings)

  def _sample(self, weights: Weights, batch) -> jax.Array:
    """The samples at positions batch["index"]."""
    # Position i asks for class i mod C; its key is a function of (seed, i).
    keys = example_keys(self._context.seed, batch["index"])
    labels = batch["index"] % self._classes if self._classes else None
    context = self._context
    made = context.inference.sample(weights.model, keys, labels, **self._sampling)
    return jnp.clip(context.codec.decode(weights.codec, made), -1.0, 1.0)

  def _try_out(self) -> None:
    """Traces the sampler, so that what it refuses it refuses at start."""
    model, size = self._context.inference.model, self._context.mesh.size
    index = jax.ShapeDtypeStruct((size,), jnp.int32)
    init = lambda key: model.init(key, jnp.zeros((1, *model.image_size)), jnp.zeros(1, jnp.int32))
    params = jax.eval_shape(init, jax.random.key(0))["params"]
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
    yield "sampler", "{sampler}, {steps} steps".format(**self._sampling)
    yield "cfg_scale", float(self._sampling["cfg_scale"])
    yield "images", to_grid(found["image"], self._columns, self._scale)


def _shown(num: int, classes: int, rows: int, columns: int) -> np.ndarray:
  """Positions of the samples in the grid, row by row; with labels a row per class, spread out."""
  if not classes:
    return np.arange(min(rows * columns, num))
  of = np.unique(np.linspace(0, classes - 1, min(rows, classes)).astype(int))
  return (of[:, None] + classes * np.arange(columns)).ravel()

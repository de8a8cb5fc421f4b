"""Probes of the frozen representation: few-shot ridge, nearest neighbours, pixels beside them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from evaluators.context import Context, setting
from umd.data import Source
from umd.metrics import knn as neighbours
from umd.metrics.ridge import Ridge
from umd.runs import progress
from umd.samplers.keys import example_keys
from umd.state import TrainState

PROTOCOLS = ("strict", "umd")
UMD_L2 = 1024.0  # The penalty of UMD's own code.
PENALTIES = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)


@dataclasses.dataclass(frozen=True)
class Settings:
  train: Mapping = setting("The data with labels on which classifiers are fitted.")
  test: Mapping = setting("The data with the same classes on which they are tested.")
  shots: Sequence[int] = setting("Numbers of training examples of each class.", (1, 5, 10))
  protocol: str | Sequence[str] = setting("'strict', 'umd', or both; see Evaluator.", "strict")
  seeds: int = setting("The number of draws of the shots.", 3)
  l2: Sequence[float] = setting("The penalties among which 'strict' chooses.", PENALTIES)
  held_out: int = setting("At most so many training examples serve to choose the penalty.", 1000)
  features: Sequence[str] = setting("Features of the network: class, mean, patches.", ("class",))
  t: int = setting("The time to which the images are noised; 0 is clean.", 0)
  knn: Sequence[int] = setting("Numbers of nearest neighbours that vote; () for none.", ())
  pixels: bool = setting("Whether raw pixels are probed as well.", True)


class Evaluator:
  """Fits classifiers to frozen features of the training data and tests them (top-1).

  Features are those of the averaged weights at timestep t (see `umd.trained.inference.Inference`),
  extracted once for all classifiers, and raw pixels. The classifiers are:

    strict: ridge regression on exactly k examples of each class (Big Vision's protocol). The
      penalty is chosen from `l2` by training examples that are not among the shots, at most
      `held_out` of them, drawn at random.
    umd: ridge regression with penalty 1024 on at most k examples of each class; a class may have
      fewer. UMD's own code does so, with 100 shots from the split "train[:100000]".
    knn: the k nearest of all training examples vote, weighted by similarity (DINO's protocol).

  Yields "<features>_<protocol>_<k>shot_mean" and "..._std", over the draws, and
  "<features>_knn<k>".
  """

  def __init__(self, context: Context, settings: Settings):
    protocols = settings.protocol
    self._protocols = (protocols,) if isinstance(protocols, str) else tuple(protocols)
    self._context, self._settings = context, settings
    context.check_time(settings.t)
    self._train, self._test = self._open("train"), self._open("test")
    self._check()
    if self._train.labels is not None:
      self._check_labels(self._train.labels)

    def represent(weights, batch):
      keys = example_keys(context.seed, batch["index"])
      seen = context.see(weights, batch)
      features = context.inference.represent(weights.model, seen, keys, settings.t)
      return {"label": batch["label"]} | {name: features[name] for name in settings.features}

    self._represent = context.jit(represent)

  def _open(self, key: str) -> Source:
    source = self._context.open(key, getattr(self._settings, key))
    if not source.num_classes:
      raise ValueError(f"{key}: {source.name} has no labels, which fewshot needs.")
    return source

  def _check(self) -> None:
    """Raises ValueError for settings that make no sense together or with the data."""
    settings, train, test = self._settings, self._train, self._test
    if train.num_classes != test.num_classes:
      raise ValueError(
        f"{train.name} has {train.num_classes} classes, {test.name} has {test.num_classes}: name "
        "data with the same classes."
      )
    choices = {
      "features": (settings.features, self._context.inference.features()),
      "protocol": (self._protocols, PROTOCOLS),
    }
    for key, (given, known) in choices.items():
      if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{key}={unknown} are not among {known}.")
    numbers = {"shots": settings.shots, "knn": settings.knn, "seeds": [settings.seeds]}
    for key, given in numbers.items():
      if wrong := [number for number in given if number < 1]:
        raise ValueError(f"{key}={wrong} must be at least 1.")
    if settings.knn and max(settings.knn) > len(train):
      raise ValueError(f"knn={max(settings.knn)}, but {train.name} has {len(train)} examples.")

  def _check_labels(self, labels: np.ndarray) -> None:
    """Raises ValueError if the strict protocol cannot have its examples."""
    if "strict" in self._protocols:
      for k in self._settings.shots:
        check_shots(labels, k, self._train.num_classes)

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float]]:
    weights = self._context.weights(state.ema_params)
    train, test = self._extract(self._represent, weights)
    for name in self._settings.features:
      yield from self._probe(name, train, test)
    if self._settings.pixels:
      yield from self._pixels.items()

  @functools.cached_property
  def _pixels(self) -> dict[str, float]:
    """The accuracies on raw pixels, which never change and are therefore computed once."""
    flat = lambda batch: batch["image"].reshape(len(batch["image"]), -1)
    fn = self._context.jit(lambda _, batch: {"label": batch["label"], "pixels": flat(batch)})
    return dict(self._probe("pixels", *self._extract(fn, {})))

  def _extract(self, fn, params) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Maps `fn` over the training and over the test data."""
    train, test = (self._context.map(fn, params, s) for s in (self._train, self._test))
    for source, rows in ((self._train, train), (self._test, test)):
      if rows["label"].min() < 0 or rows["label"].max() >= source.num_classes:
        raise ValueError(f"{source.name} has examples without a label; name a labelled split.")
    self._check_labels(train["label"])
    return train, test

  def _probe(self, name: str, train: Mapping, test: Mapping) -> Iterator[tuple[str, float]]:
    """Yields the accuracies of all classifiers on the features `name`."""
    settings, classes = self._settings, self._train.num_classes
    x, y = train[name], train["label"]
    queries, answers = test[name], test["label"]
    accuracies = {(protocol, k): [] for protocol in self._protocols for k in settings.shots}
    total = len(settings.shots) * settings.seeds
    clock = progress.Clock(self._context.progress, f"fewshot: fits on {name}", total)
    for i, k in enumerate(settings.shots):
      for seed in range(settings.seeds):
        ids = draw_shots(y, k, classes, seed)
        # Both protocols take their penalties from one decomposition.
        ridge = Ridge(x[ids], y[ids], classes)
        for protocol in self._protocols:
          l2 = UMD_L2 if protocol == "umd" else self._penalty(ridge, x, y, ids, seed)
          accuracies[protocol, k].append(ridge.accuracy(queries, answers, l2))
        clock(i * settings.seeds + seed + 1)
    for (protocol, k), values in accuracies.items():
      yield f"{name}_{protocol}_{k}shot_mean", float(np.mean(values))
      yield f"{name}_{protocol}_{k}shot_std", float(np.std(values))
    if settings.knn:
      with progress.during(f"fewshot: nearest neighbours of {name}", self._context.progress):
        votes = neighbours.accuracies(
          (x, y), (queries, answers), classes, settings.knn, self._context.mesh
        )
      yield from ((f"{name}_knn{k}", accuracy) for k, accuracy in votes.items())

  def _penalty(self, ridge: Ridge, x: np.ndarray, y: np.ndarray, ids: np.ndarray, seed: int):
    """Chooses the penalty that is best on examples that are not among the shots `ids`."""
    settings = self._settings
    rest = np.setdiff1d(np.arange(len(x)), ids)
    rest = np.random.default_rng(seed).permutation(rest)[: settings.held_out]
    # Without anything held out there is nothing to choose by: the first penalty stands.
    accuracy = lambda l2: ridge.accuracy(x[rest], y[rest], l2)
    return max(settings.l2, key=accuracy) if len(rest) else settings.l2[0]


def check_shots(labels: np.ndarray, shots: int, num_classes: int) -> None:
  """Raises ValueError, naming class and count, if a class has fewer than `shots` examples."""
  counts = np.bincount(labels, minlength=num_classes)
  if len(short := np.flatnonzero(counts < shots)):
    raise ValueError(
      f"shots={shots}, but class {short[0]} has {counts[short[0]]} training examples. Ask for "
      "fewer shots, name a larger train split, or use protocol='umd', which takes what there is."
    )


def draw_shots(labels: np.ndarray, shots: int, num_classes: int, seed: int) -> np.ndarray:
  """Draws the ids of `shots` examples of every class (of all, where a class has fewer)."""
  rng = np.random.default_rng(seed)
  order = np.argsort(labels, kind="stable")
  ends = np.cumsum(np.bincount(labels, minlength=num_classes))[:-1]
  return np.concatenate([rng.permutation(ids)[:shots] for ids in np.split(order, ends)])

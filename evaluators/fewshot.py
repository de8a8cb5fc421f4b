"""Probes of the frozen representation: few-shot ridge, nearest neighbours, pixels beside them."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from evaluators.context import Context
from umd.metrics import knn as neighbours
from umd.metrics.ridge import Ridge
from umd.runs import progress
from umd.samplers.keys import example_keys
from umd.state import TrainState

PROTOCOLS = ("strict", "umd")
UMD_L2 = 1024.0


def check_shots(labels: np.ndarray, shots: int, num_classes: int) -> None:
  """Raises ValueError, naming class and count, if a class has fewer than `shots` examples."""
  counts = np.bincount(labels, minlength=num_classes)
  if len(short := np.flatnonzero(counts < shots)):
    raise ValueError(
      f"shots={shots}, but class {short[0]} has {counts[short[0]]} training examples. Ask for "
      "fewer shots, name a larger train split, or use protocol='umd', which takes what there is."
    )


def draw_shots(labels: np.ndarray, shots: int, num_classes: int, seed: int) -> np.ndarray:
  """Ids of `shots` examples of every class (all, if there are fewer), by (labels, shots, seed)."""
  rng = np.random.default_rng(seed)
  order, ends = np.argsort(labels, kind="stable"), np.bincount(labels, minlength=num_classes)
  by_class = np.split(order, np.cumsum(ends)[:-1])
  return np.concatenate([rng.permutation(of_class)[:shots] for of_class in by_class])


class Evaluator:
  """Classifiers on frozen features of the training data, tested on the test data (top-1).

  Features are those of the EMA weights at timestep t (see `umd.trained.inference.Inference.represent`),
  extracted once for everything, and raw pixels. Classifiers:

    strict: ridge on exactly k examples of each class (Big Vision's protocol). The penalty is chosen
      from `l2` on those training examples that are not among the shots (at most `held_out`, drawn
      at random).
    umd: ridge with penalty 1024 on at most k examples of each class; that a class has fewer is
      accepted. UMD's own code does so, with 100 shots from the split "train[:100000]".
    knn: the k nearest of all training examples vote, weighted by similarity (DINO's protocol).

  Yields "<features>_<protocol>_<k>shot_mean" and "..._std", over the seeds, and
  "<features>_knn<k>".
  """

  def __init__(
    self,
    context: Context,
    *,
    train: Mapping,
    test: Mapping,
    shots: Sequence[int] = (1, 5, 10),
    protocol: str | Sequence[str] = "strict",
    seeds: int = 3,
    l2: Sequence[float] = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0),
    held_out: int = 1000,
    features: Sequence[str] = ("class",),
    t: int = 0,
    knn: Sequence[int] = (),
    pixels: bool = True,
  ):
    """`train`, `test`: data with the same classes; `knn`: numbers of neighbours."""
    context.check_timestep(t)
    self._context, self._train, self._test = context, *self._open(context, train, test)
    self._protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
    for key, given, known in [
      ("features", features, context.inference.features()),
      ("protocol", self._protocols, PROTOCOLS),
    ]:
      if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{key}={unknown} are not among {known}.")
    for key, numbers in [("shots", shots), ("knn", knn), ("seeds", [seeds])]:
      if wrong := [n for n in numbers if n < 1]:
        raise ValueError(f"{key}={wrong} must be at least 1.")
    if knn and max(knn) > len(self._train):
      raise ValueError(f"knn={max(knn)}, but {self._train.name} has {len(self._train)} examples.")
    self._shots, self._seeds, self._knn = tuple(shots), seeds, tuple(knn)
    self._l2, self._held_out = tuple(l2), held_out
    if "strict" in self._protocols and self._train.labels is not None:
      self._check_labels(self._train.labels)
    self._features, self._with_pixels = tuple(features), pixels

    def represent(weights, batch):
      keys = example_keys(context.seed, batch["index"])
      seen = context.see(weights, batch)
      found = context.inference.represent(weights.model, seen, keys, t)
      return {"label": batch["label"], **{name: found[name] for name in self._features}}

    self._represent = context.jit(represent)

  @staticmethod
  def _open(context: Context, train: Mapping, test: Mapping):
    sources = context.open("train", train), context.open("test", test)
    for key, source in zip(("train", "test"), sources, strict=True):
      if not source.num_classes:
        raise ValueError(f"{key}: {source.name} has no labels, which fewshot needs.")
    train, test = (source.num_classes for source in sources)
    if train != test:
      raise ValueError(
        f"{sources[0].name} has {train} classes, {sources[1].name} has {test}: name data with the "
        "same classes."
      )
    return sources

  def _check_labels(self, labels: np.ndarray) -> None:
    """Raises ValueError if the strict protocol cannot have its examples."""
    if "strict" in self._protocols:
      for k in self._shots:
        check_shots(labels, k, self._train.num_classes)

  def _extract(self, fn, params) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `fn` makes of the training and of the test data."""
    train, test = (self._context.map(fn, params, s) for s in (self._train, self._test))
    for source, found in ((self._train, train), (self._test, test)):
      if found["label"].min() < 0 or found["label"].max() >= source.num_classes:
        raise ValueError(f"{source.name} has examples without a label; name a labelled split.")
    self._check_labels(train["label"])
    return train, test

  @functools.cached_property
  def _pixels(self) -> dict[str, float]:
    """What raw pixels get; they never change, so it is found out once."""
    flat = lambda batch: batch["image"].reshape(len(batch["image"]), -1)
    fn = self._context.jit(lambda _, batch: {"label": batch["label"], "pixels": flat(batch)})
    return dict(self._judge("pixels", *self._extract(fn, {})))

  def _penalty(self, ridge: Ridge, x: np.ndarray, y: np.ndarray, ids: np.ndarray, seed: int):
    """The penalty that is best on examples that are not among the shots."""
    rest = np.setdiff1d(np.arange(len(x)), ids)
    rest = np.random.default_rng(seed).permutation(rest)[: self._held_out]
    # Without anything held out there is nothing to choose by: the first penalty stands.
    score = lambda l2: ridge.accuracy(x[rest], y[rest], l2)
    return max(self._l2, key=score) if len(rest) else self._l2[0]

  def _judge(self, name: str, train: Mapping, test: Mapping) -> Iterator[tuple[str, float]]:
    """All classifiers on the features `name`."""
    (x, y), (queries, answers) = ((part[name], part["label"]) for part in (train, test))
    classes = self._train.num_classes
    found = {(protocol, k): [] for protocol in self._protocols for k in self._shots}
    total = len(self._shots) * self._seeds
    clock, done = progress.Clock(self._context.progress, f"fewshot: fits on {name}", total), 0
    for k in self._shots:
      for seed in range(self._seeds):
        ids = draw_shots(y, k, classes, seed)
        ridge = Ridge(x[ids], y[ids], classes)  # Both protocols' penalties on one decomposition.
        for protocol in self._protocols:
          l2 = UMD_L2 if protocol == "umd" else self._penalty(ridge, x, y, ids, seed)
          found[protocol, k].append(ridge.accuracy(queries, answers, l2))
        clock(done := done + 1)
    for (protocol, k), accuracies in found.items():
      yield f"{name}_{protocol}_{k}shot_mean", float(np.mean(accuracies))
      yield f"{name}_{protocol}_{k}shot_std", float(np.std(accuracies))
    if self._knn:
      with progress.during(f"fewshot: nearest neighbours of {name}", self._context.progress):
        votes = neighbours.accuracies(
          (x, y), (queries, answers), classes, self._knn, self._context.mesh
        )
      yield from ((f"{name}_knn{k}", accuracy) for k, accuracy in votes.items())

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float]]:
    weights = self._context.weights(state.ema_params)
    train, test = self._extract(self._represent, weights)
    for name in self._features:
      yield from self._judge(name, train, test)
    if self._with_pixels:
      yield from self._pixels.items()

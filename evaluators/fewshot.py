"""Few-shot linear probe of the frozen representation, with raw pixels beside it."""

from collections.abc import Iterator, Sequence

import numpy as np

from evaluators.context import Context
from evaluators.ridge import Ridge
from umd.data import load
from umd.inference import FEATURES, example_keys
from umd.state import TrainState


def draw_shots(labels: np.ndarray, shots: int, num_classes: int, seed: int) -> np.ndarray:
  """Ids of exactly `shots` examples of every class, a function of (labels, shots, seed).

  Raises:
    ValueError: a class has too few.
  """
  rng = np.random.default_rng(seed)
  ids = []
  for c in range(num_classes):
    (of_class,) = np.nonzero(labels == c)
    if len(of_class) < shots:
      raise ValueError(
        f"shots={shots}, but class {c} has {len(of_class)} training examples. Ask for fewer shots."
      )
    ids.append(rng.permutation(of_class)[:shots])
  return np.concatenate(ids)


class Evaluator:
  """Ridge classifier on k examples of each class (Big Vision's protocol), tested on a split.

  The penalty is chosen on those training examples that are not among the shots (at most
  `held_out`, drawn at random), the same way for every kind of features: those of the EMA weights
  at timestep t (`features`, see `umd.inference.Inference.represent`) and raw pixels.

  Yields "<features>_<k>shot_mean" and "<features>_<k>shot_std", over the seeds.
  """

  def __init__(
    self,
    context: Context,
    *,
    data: str,
    train_split: str,
    test_split: str,
    shots: Sequence[int] = (1, 5, 10),
    seeds: int = 3,
    l2: Sequence[float] = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0),
    held_out: int = 1000,
    features: Sequence[str] = ("class",),
    t: int = 0,
  ):
    context.check_timestep(t)
    if unknown := set(features) - set(FEATURES):
      raise ValueError(f"features={sorted(unknown)} are not among {FEATURES}.")
    self._context, self._l2, self._held_out, self._seeds = context, tuple(l2), held_out, seeds
    self._train, self._test = load(data, train_split), load(data, test_split)
    self._shots = {
      k: [draw_shots(self._train.labels, k, self._train.num_classes, s) for s in range(seeds)]
      for k in shots
    }
    flat = lambda source: source.images.reshape(len(source), -1)
    self._pixels = dict(self._probe("pixels", flat(self._train), flat(self._test)))
    self._features = tuple(features)

    def represent(params, batch):
      keys = example_keys(context.seed, batch["index"])
      found = context.inference.represent(params, batch["image"], keys, t)
      return {name: found[name] for name in self._features}

    self._represent = context.jit(represent)

  def _accuracy(self, train: np.ndarray, test: np.ndarray, ids: np.ndarray, seed: int) -> float:
    ridge = Ridge(train[ids], self._train.labels[ids], self._train.num_classes)
    rest = np.setdiff1d(np.arange(len(train)), ids)
    rest = np.random.default_rng(seed).permutation(rest)[: self._held_out]
    # Without anything held out there is nothing to choose by: the first penalty stands.
    score = lambda l2: ridge.accuracy(train[rest], self._train.labels[rest], l2)
    best = max(self._l2, key=score) if len(rest) else self._l2[0]
    return ridge.accuracy(test, self._test.labels, best)

  def _probe(self, name: str, train: np.ndarray, test: np.ndarray) -> Iterator[tuple[str, float]]:
    for k, draws in self._shots.items():
      accuracies = [self._accuracy(train, test, ids, seed) for seed, ids in enumerate(draws)]
      yield f"{name}_{k}shot_mean", float(np.mean(accuracies))
      yield f"{name}_{k}shot_std", float(np.std(accuracies))

  def __call__(self, state: TrainState) -> Iterator[tuple[str, float]]:
    train, test = (
      self._context.map(self._represent, state.ema_params, source)
      for source in (self._train, self._test)
    )
    for name in self._features:
      yield from self._probe(name, train[name], test[name])
    yield from self._pixels.items()

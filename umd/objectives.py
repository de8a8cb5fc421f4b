"""Objectives: a method is a set of streams, each with terms, and nothing else.

A *stream* is a part of the batch with its own timesteps and mask ratio; a *term* scores one head
on the tokens it names. MAE, UMD, DiT and MaskDiT differ in these values only, so a new method is
a new row of data (see `configs/common.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from umd.devices.placement import take_rows
from umd.masks import mask_from_noise, patchify
from umd.models.autoencoder import AutoEncoder, Input
from umd.paths import Path


@dataclasses.dataclass(frozen=True)
class Term:
  """Mean squared error of one head.

  Attributes:
    head: what is predicted and compared, one of the model's heads.
    where: the tokens scored: "all", "visible" or "masked".
    weight: factor in the stream's loss.
  """

  head: str
  where: str = "all"
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Stream:
  """A part of the batch that is noised, masked and scored alike.

  Attributes:
    name: appears in the metrics.
    terms: what is scored, by name.
    rows: (from, to) as fractions of the batch. Streams may overlap.
    timesteps: key of TIMESTEPS.
    mask_ratio: share of tokens that the encoder does not see.
    labels: whether the stream is shown labels (some still drop to "no label").
  """

  name: str
  terms: Mapping[str, Term]
  rows: tuple[float, float] = (0.0, 1.0)
  timesteps: str = "uniform"
  mask_ratio: float = 0.0
  labels: bool = True


def make_streams(config: Mapping) -> tuple[Stream, ...]:
  """A config's `streams` as dataclasses."""
  streams = []
  for name, settings in config.items():
    settings = dict(settings)
    terms = {k: Term(**dict(term)) for k, term in dict(settings.pop("terms")).items()}
    rows = tuple(settings.pop("rows"))
    streams.append(Stream(name, terms, rows, **settings))
  return tuple(streams)


def describe(params, streams, batch_size: int) -> str:
  """One line per run: parameters, and the rows that each stream really gets."""
  size = period(streams, batch_size)
  shares = []
  for s in streams:
    start, stop = stream_rows(s, size)
    rows = (stop - start) * batch_size // size
    shares.append(f"{s.name} {rows}/{batch_size} rows, mask {s.mask_ratio:g}, {s.timesteps}")
  count = sum(x.size for x in jax.tree.leaves(params))
  return f"{count / 1e6:.2f}M parameters; streams: {'; '.join(shares)}"


# Which tokens a term scores, from the mask [B, N] (1 = dropped from the encoder's input).
WHERE: Mapping[str, Callable] = {
  "all": jnp.ones_like,
  "visible": lambda masked: 1.0 - masked,
  "masked": lambda masked: masked,
}

# How a stream draws its timesteps in 0..T from uniform noise u in [0, 1).
TIMESTEPS: Mapping[str, Callable] = {
  "clean": lambda u, timesteps: jnp.zeros_like(u, jnp.int32),
  "uniform": lambda u, timesteps: 1 + jnp.floor(u * timesteps).astype(jnp.int32),
}

# A share of rows may be off by this much of the batch, so that the pattern of rows can be short.
SHARE_TOLERANCE = 1 / 64


def period(streams: Sequence[Stream], batch_size: int) -> int:
  """Length of the pattern by which rows of the batch are dealt to streams.

  Every `period` rows hold each stream in its share, so a device that holds a multiple of it finds
  all its rows at home: no image crosses devices, and which rows are clean does not depend on how
  many devices there are. It is the smallest divisor of the batch whose shares are right to
  SHARE_TOLERANCE, or the batch itself.
  """
  shares = np.array([s.rows for s in streams])
  for size in range(1, batch_size):
    if batch_size % size == 0:
      edges = np.round(shares * size)
      error = np.abs((edges[:, 1] - edges[:, 0]) / size - (shares[:, 1] - shares[:, 0]))
      if (edges[:, 1] > edges[:, 0]).all() and error.max() <= SHARE_TOLERANCE:
        return size
  return batch_size


def stream_rows(stream: Stream, size: int) -> tuple[int, int]:
  """The stream's rows (from, to) within a pattern of `size` rows."""
  start, stop = (round(edge * size) for edge in stream.rows)
  return start, stop


def _check_term(name: str, term: Term, stream: Stream, model: AutoEncoder, path: Path) -> None:
  where = f"streams.{stream.name}.terms.{name}"
  if term.head not in model.heads:
    raise ValueError(
      f"{where}: head={term.head!r} is not among the model's heads {model.heads}. "
      "Add it to model.heads or score another head."
    )
  if term.where not in WHERE:
    raise ValueError(f"{where}: where={term.where!r} is not one of {list(WHERE)}.")
  if term.where == "masked" and model.keep(stream.mask_ratio) == model.tokens:
    raise ValueError(
      f"{where} scores masked tokens but mask_ratio={stream.mask_ratio} masks none of "
      f"{model.tokens}. Set where='all' or a larger mask_ratio."
    )
  if path.unpredictable(term.head)[0] and stream.timesteps == "clean":
    raise ValueError(
      f"{where}: head={term.head!r} asks for noise at timesteps='clean', where the input has "
      "none. Score 'x0' there, or draw other timesteps."
    )


def check(streams: Sequence[Stream], model: AutoEncoder, path: Path, batch_size: int) -> None:
  """Raises ValueError, naming value and remedy, for streams that cannot mean what they say."""
  if not streams:
    raise ValueError("streams is empty: there is nothing to train. Name at least one stream.")
  size = period(streams, batch_size)
  for s in streams:
    if s.timesteps not in TIMESTEPS:
      raise ValueError(
        f"streams.{s.name}: timesteps={s.timesteps!r} is not one of {list(TIMESTEPS)}."
      )
    if not 0 <= s.rows[0] < s.rows[1] <= 1:
      raise ValueError(
        f"streams.{s.name}: rows={s.rows} must satisfy 0 <= from < to <= 1 (fractions)."
      )
    start, stop = stream_rows(s, size)
    if stop == start:
      raise ValueError(
        f"streams.{s.name}: rows={s.rows} rounds to no row of a batch of {batch_size}. "
        "Enlarge batch_size or the share."
      )
    model.keep(s.mask_ratio)  # Raises if the encoder would see nothing.
    if not s.terms:
      raise ValueError(f"streams.{s.name} has no terms. Give it at least one.")
    for name, term in s.terms.items():
      _check_term(name, term, s, model, path)


class Draw(NamedTuple):
  """What a stream is trained on in a step: images [B, H, W, C], labels, and all that is random.

  Attributes:
    x0: clean images.
    labels: [B] those shown, or None.
    t: timesteps [B].
    eps: noise [B, H, W, C].
    mask_noise: [B, N]; see `umd.masks.mask_from_noise`.
  """

  x0: Array
  labels: Array | None
  t: Array
  eps: Array
  mask_noise: Array


def shown(model: AutoEncoder, path: Path, stream: Stream, draw: Draw) -> Input:
  """What the model is shown of a stream's draw."""
  keep = model.keep(stream.mask_ratio)
  mask = mask_from_noise(draw.mask_noise, keep) if keep < model.tokens else None
  return Input(path.combine("x_t", draw.x0, draw.eps, draw.t), draw.t, draw.labels, mask)


def errors(
  model: AutoEncoder, path: Path, stream: Stream, draw: Draw, masked: Array, preds: Mapping
) -> dict[str, Float[Array, "b"]]:
  """Every term of a stream, per example, of predictions (eq. 3-5); `masked` is 1 where dropped."""
  out = {}
  for name, term in stream.terms.items():
    target = patchify(path.combine(term.head, draw.x0, draw.eps, draw.t), model.shape.patch)
    error = jnp.square(preds[term.head] - target).mean(axis=-1)
    weight = WHERE[term.where](masked)
    out[name] = (error * weight).sum(axis=1) / weight.sum(axis=1)
  return out


def score(
  model: AutoEncoder, path: Path, streams: Sequence[Stream], params, draws: Sequence[Draw]
) -> list[dict[str, Float[Array, "b"]]]:
  """Every term of the streams, per example, for given timesteps, noise and mask noise (eq. 3-5).

  Returns `{term: [B]}` of each stream: squared error, mean over the scored tokens, their pixels and
  channels, without the term's weight.
  """
  inputs = [shown(model, path, s, draw) for s, draw in zip(streams, draws, strict=True)]
  counts = [len(draw.x0) for draw in draws]
  groups = functools.reduce(math.gcd, counts)
  preds = model.apply({"params": params}, inputs, groups, method="predict")
  everywhere = lambda draw: jnp.zeros_like(draw.mask_noise)
  return [
    errors(model, path, s, draw, everywhere(draw) if x.mask is None else x.mask.masked, pred)
    for s, draw, x, pred in zip(streams, draws, inputs, preds, strict=True)
  ]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
  """The loss of streams: `objective(params, objective.draw(batch, key))`.

  Each stream counts by its realised share of the rows, its terms by their weights: for UMD,
  L = r0 L(t=0) + (1 - r0) L(t>=1).

  Attributes:
    model: predicts the heads that the terms score.
    path: mixes images and noise.
    streams: see `Stream`; checked here.
    batch_size: B, over all devices.
    label_drop_prob: probability of showing "no label" instead of a label.

  Raises:
    ValueError: see `check`.
  """

  model: AutoEncoder
  path: Path
  streams: Sequence[Stream]
  batch_size: int
  label_drop_prob: float = 0.0

  def __post_init__(self):
    check(self.streams, self.model, self.path, self.batch_size)

  @property
  def period(self) -> int:
    """Rows of the pattern by which they are dealt to streams."""
    return period(self.streams, self.batch_size)

  def draw(self, batch: Mapping, key: Array) -> list[Draw]:
    """What each stream is trained on; a row is drawn alike on any number of devices."""
    draws = []
    for i, stream in enumerate(self.streams):
      keys = jax.random.split(jax.random.fold_in(key, i), 4)
      rows = stream_rows(stream, self.period)
      x0 = take_rows(batch["image"], rows, self.period)
      u = jax.random.uniform(keys[0], x0.shape[:1])
      t = TIMESTEPS[stream.timesteps](u, self.path.timesteps)
      eps = jax.random.normal(keys[1], x0.shape)
      mask_noise = jax.random.uniform(keys[2], (len(x0), self.model.tokens))
      labels = self._labels(batch, stream, rows, keys[3])
      draws.append(Draw(x0, labels, t, eps, mask_noise))
    return draws

  def _labels(self, batch: Mapping, stream: Stream, rows: tuple[int, int], key: Array):
    if not self.model.num_classes or not stream.labels:
      return None
    labels = take_rows(batch["label"], rows, self.period)
    drop = jax.random.bernoulli(key, self.label_drop_prob, labels.shape)
    return jnp.where(drop, self.model.num_classes, labels)

  def __call__(self, params, draws: Sequence[Draw]) -> tuple[Array, dict[str, Array]]:
    """(loss, {"stream/term": value}) of all rows, or of a part that has each stream's share."""
    scores = score(self.model, self.path, self.streams, params, draws)
    total, metrics = 0.0, {}
    for stream, values in zip(self.streams, scores, strict=True):
      start, stop = stream_rows(stream, self.period)
      for name, value in values.items():
        metrics[f"{stream.name}/{name}"] = value.mean()
        total += (stop - start) / self.period * stream.terms[name].weight * value.mean()
    return total, metrics

"""Objectives: a method is a set of streams, each with terms, and nothing else.

A *stream* is a part of the batch with its own times and mask; a *term* scores one head of the
network on the tokens it names. MAE, UMD, DiT and MaskDiT differ in these values only, so a new
method is a new row of data (see `configs/methods.py`).

A training step draws all randomness first, shows each stream's noised images to the network, and
adds up the terms:

  t ~ stream.timesteps,   eps ~ N(0, I),   x_t = alpha(t) x0 + sigma(t) eps,   mask ~ stream.mask
  L = sum over streams of (share of rows) * sum over terms of weight * E[w(t) * mean error]

with the mean over the tokens that the term names.
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

from umd.devices.mesh import take_rows
from umd.losses import LOSSES, WEIGHTS, WITHOUT_TARGET, Scored
from umd.masks import Mask, Masking, complement, patchify
from umd.models.network import Input, Network, grid, num_tokens
from umd.paths import Path

# Which tokens a term scores, from the mask [B, N] (1 = dropped from the encoder's input).
WHERE: Mapping[str, Callable] = {
  "all": jnp.ones_like,
  "visible": lambda masked: 1.0 - masked,
  "masked": lambda masked: masked,
}


def clean(u: Float[Array, "*b"], path: Path) -> Array:
  """No noise: t = 0."""
  return jnp.zeros_like(u, jnp.int32 if path.timesteps else jnp.float32)


def uniform(u: Float[Array, "*b"], path: Path) -> Array:
  """All times alike: one of 1..T where times are whole numbers, else a real one in (0, end]."""
  if path.timesteps:
    return 1 + jnp.floor(u * path.timesteps).astype(jnp.int32)
  return path.end * (1.0 - u)


def log_normal(u: Float[Array, "*b"], path: Path) -> Array:
  """EDM's noise levels (Karras et al. 2022, table 1): log t ~ N(-1.2, 1.2^2), at most the end."""
  return jnp.minimum(jnp.exp(-1.2 + 1.2 * jax.scipy.special.ndtri(u)), path.end)


# How a stream draws its times from uniform noise u in [0, 1).
TIMESTEPS: Mapping[str, Callable] = {"clean": clean, "uniform": uniform, "log_normal": log_normal}

# The share of a stream's rows may be off by this much of the batch, so that the pattern by which
# rows are dealt can be short.
SHARE_TOLERANCE = 1 / 64


@dataclasses.dataclass(frozen=True)
class Term:
  """The loss of one head.

  Attributes:
    head: the prediction that is scored, one of the network's heads.
    where: the tokens scored: "all", "visible" or "masked".
    weight: factor in the stream's loss.
    loss: the error, a key of `umd.losses.LOSSES`.
    target: the quantity of the path that is compared; "" for that of the head's own name.
    weight_of_t: how much a time counts, a key of `umd.losses.WEIGHTS`.
  """

  head: str
  where: str = "all"
  weight: float = 1.0
  loss: str = "mse"
  target: str = ""
  weight_of_t: str = "one"


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
    mask_kind: which tokens those are, key of `umd.masks.KINDS`.
    mask_side: of a block or window, in tokens.
    mask_rounding: how the number of tokens is rounded, see `umd.masks.Masking`.
    complement_of: the name of another stream of the same rows; this one is shown exactly the tokens
      that the other is not, whatever its own mask settings would be. "" for a mask of its own.
  """

  name: str
  terms: Mapping[str, Term]
  rows: tuple[float, float] = (0.0, 1.0)
  timesteps: str = "uniform"
  mask_ratio: float = 0.0
  labels: bool = True
  mask_kind: str = "random"
  mask_side: int = 1
  mask_rounding: str = "kept"
  complement_of: str = ""

  @property
  def masking(self) -> Masking:
    """How tokens are dropped; of a complement, how the other stream drops them."""
    return Masking(self.mask_ratio, self.mask_kind, self.mask_side, self.mask_rounding)


MASK_SETTINGS = ("mask_ratio", "mask_kind", "mask_side", "mask_rounding")


def make_streams(config: Mapping) -> tuple[Stream, ...]:
  """A config's `streams` as dataclasses."""
  streams = []
  for name, settings in config.items():
    settings = dict(settings)
    terms = {k: Term(**dict(term)) for k, term in dict(settings.pop("terms")).items()}
    rows = tuple(settings.pop("rows"))
    streams.append(Stream(name, terms, rows, **settings))
  return with_complements(streams)


def with_complements(streams: Sequence[Stream]) -> tuple[Stream, ...]:
  """The streams, of which each complement has the mask settings of the stream that it completes.

  Raises:
    ValueError: a complement of no stream, of a complement, or of one with other rows.
  """
  by_name = {stream.name: stream for stream in streams}
  resolved = []
  for stream in streams:
    if stream.complement_of:
      key, other = f"streams.{stream.name}", by_name.get(stream.complement_of)
      if other is None or other.complement_of or stream not in streams[streams.index(other) :]:
        masked = [s.name for s in streams if not s.complement_of and s is not stream]
        raise ValueError(
          f"{key}: complement_of={stream.complement_of!r} must be an earlier stream with a mask "
          f"of its own: one of {masked}."
        )
      if other.rows != stream.rows:
        raise ValueError(
          f"{key}: rows={stream.rows} differ from those of {other.name!r}, {other.rows}, whose "
          "complement it is shown. Give both the same rows."
        )
      settings = {name: getattr(other, name) for name in MASK_SETTINGS}
      stream = dataclasses.replace(stream, **settings)
    resolved.append(stream)
  return tuple(resolved)


def period(streams: Sequence[Stream], batch_size: int) -> int:
  """The length of the pattern by which rows of the batch are dealt to streams.

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


def num_visible(stream: Stream, network: Network) -> int:
  """K, the number of patches of an image that the network sees in this stream."""
  kept = stream.masking.num_kept(grid(network))
  if not stream.complement_of:
    return kept
  if kept == num_tokens(network):
    raise ValueError(
      f"streams.{stream.name}: {stream.complement_of!r} drops no token, so its complement would be "
      "shown none. Give it a mask."
    )
  return num_tokens(network) - kept


def _check_term(key: str, term: Term, stream: Stream, network: Network, path: Path) -> None:
  """Raises ValueError if the term cannot be computed, or is about nothing."""
  choices = {"where": WHERE, "loss": LOSSES, "weight_of_t": WEIGHTS}
  for name, known in choices.items():
    if (value := getattr(term, name)) not in known:
      raise ValueError(f"{key}: {name}={value!r} is not one of {list(known)}.")
  for head in (term.head, *WITHOUT_TARGET.get(term.loss, ())):
    if head not in network.heads:
      raise ValueError(
        f"{key}: head={head!r} is not among the model's heads {network.heads}. "
        "Add it to model.heads or score another head."
      )
  if term.where == "masked" and num_visible(stream, network) == num_tokens(network):
    raise ValueError(
      f"{key} scores masked tokens but mask_ratio={stream.mask_ratio} masks none of "
      f"{num_tokens(network)}. Set where='all' or a larger mask_ratio."
    )
  if term.loss in WITHOUT_TARGET:
    if stream.timesteps == "clean":
      raise ValueError(
        f"{key}: loss={term.loss!r} compares steps of the noise process, and timesteps='clean' "
        "takes none. Draw other timesteps."
      )
    return
  quantity = term.target or term.head
  if path.unpredictable(quantity, 0) and stream.timesteps == "clean":
    raise ValueError(
      f"{key}: head={quantity!r} asks for noise at timesteps='clean', where the input has "
      "none. Score 'x0' there, or draw other timesteps."
    )


def check(streams: Sequence[Stream], network: Network, path: Path, batch_size: int) -> None:
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
    num_visible(s, network)  # Raises if the network would see nothing.
    if not s.terms:
      raise ValueError(f"streams.{s.name} has no terms. Give it at least one.")
    for name, term in s.terms.items():
      _check_term(f"streams.{s.name}.terms.{name}", term, s, network, path)


class Draw(NamedTuple):
  """What a stream is trained on in a step: images, labels, and all that is random.

  Attributes:
    x0: clean images [B, H, W, C].
    labels: those shown, [B], or None.
    t: times [B], or [B, N] where every token has its own.
    eps: noise [B, H, W, C].
    mask_noise: [B, N], uniform; see `umd.masks.Masking`.
  """

  x0: Array
  labels: Array | None
  t: Array
  eps: Array
  mask_noise: Array


def times_of_pixels(t: Array, network: Network) -> Array:
  """Times of images, [B, 1, 1, 1], or of pixels, [B, H, W, 1], where tokens have their own."""
  if t.ndim == 1:
    return t[:, None, None, None]
  t = t.reshape(-1, *grid(network))
  return jnp.repeat(jnp.repeat(t, network.patch, axis=1), network.patch, axis=2)[..., None]


def network_input(network: Network, path: Path, stream: Stream, draw: Draw) -> Input:
  """What the network is shown of a stream's draw: x_t and t as the path has it told, and a mask."""
  mask = None
  if num_visible(stream, network) < num_tokens(network):
    mask = stream.masking(draw.mask_noise, grid(network))
    mask = complement(mask) if stream.complement_of else mask
  t = times_of_pixels(draw.t, network)
  x_t = path.input_scale(t) * path.combine("x_t", draw.x0, draw.eps, t)
  return Input(x_t, path.time_input(draw.t), draw.labels, mask)


def errors(
  network: Network,
  path: Path,
  stream: Stream,
  draw: Draw,
  mask: Mask | None,
  predictions: Mapping,
) -> dict[str, Float[Array, "b"]]:
  """Every term of a stream, per example: its error, weighted by t, mean over the scored tokens."""
  cut = lambda images: patchify(images, network.patch)
  patches = {head: cut(prediction) for head, prediction in predictions.items()}
  x0, eps = cut(draw.x0), cut(draw.eps)
  scored = Scored(patches, x0, eps, path.combine("x_t", x0, eps, draw.t), draw.t)
  masked = jnp.zeros_like(draw.mask_noise) if mask is None else mask.masked
  values = {}
  for name, term in stream.terms.items():
    error = LOSSES[term.loss](path, term.head, term.target or term.head, scored)
    weight_of_t = WEIGHTS[term.weight_of_t](path, term.head, draw.t)
    if jnp.ndim(weight_of_t) == 1:
      weight_of_t = weight_of_t[:, None]
    counted = WHERE[term.where](masked)
    values[name] = (weight_of_t * error * counted).sum(axis=1) / counted.sum(axis=1)
  return values


def score(
  network: Network, path: Path, streams: Sequence[Stream], params, draws: Sequence[Draw]
) -> list[dict[str, Float[Array, "b"]]]:
  """Every term of the streams, per example, for given times, noise and mask noise.

  Returns `{term: [B]}` of each stream, without the term's weight.
  """
  inputs = [network_input(network, path, s, draw) for s, draw in zip(streams, draws, strict=True)]
  groups = functools.reduce(math.gcd, [len(draw.x0) for draw in draws])
  predictions = network.apply({"params": params}, inputs, groups, method="predict")
  return [
    errors(network, path, stream, draw, shown.mask, prediction)
    for stream, draw, shown, prediction in zip(streams, draws, inputs, predictions, strict=True)
  ]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
  """The loss of streams: `objective(params, objective.draw(batch, key))`.

  Each stream counts by its realised share of the rows, its terms by their weights: for UMD,
  L = r0 L(t=0) + (1 - r0) L(t>=1).

  Attributes:
    model: the network that predicts the heads.
    path: mixes images and noise.
    streams: see `Stream`; checked here.
    batch_size: B, over all devices.
    label_drop_prob: probability of showing "no label" instead of a label.

  Raises:
    ValueError: see `check`.
  """

  model: Network
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
    draws, names = [], [stream.name for stream in self.streams]
    for i, stream in enumerate(self.streams):
      keys = jax.random.split(jax.random.fold_in(key, i), 4)
      rows = stream_rows(stream, self.period)
      x0 = take_rows(batch["image"], rows, self.period)
      u = jax.random.uniform(keys[0], x0.shape[:1])
      t = TIMESTEPS[stream.timesteps](u, self.path)
      eps = jax.random.normal(keys[1], x0.shape)
      mask_noise = jax.random.uniform(keys[2], (len(x0), num_tokens(self.model)))
      if stream.complement_of in names[:i]:
        # The same noise, so that the other stream's mask is known: this one is its complement.
        mask_noise = draws[names.index(stream.complement_of)].mask_noise
      labels = self._labels(batch, stream, rows, keys[3])
      draws.append(Draw(x0, labels, t, eps, mask_noise))
    return draws

  def _labels(self, batch: Mapping, stream: Stream, rows: tuple[int, int], key: Array):
    """The labels that a stream is shown, some of them dropped to "no label"; None for none."""
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
      share = (stop - start) / self.period
      for name, value in values.items():
        mean = value.mean()
        metrics[f"{stream.name}/{name}"] = mean
        total += share * stream.terms[name].weight * mean
    return total, metrics


def describe(params, streams: Sequence[Stream], batch_size: int) -> str:
  """One line per run: the number of parameters, and the rows that each stream really gets."""
  size = period(streams, batch_size)
  shares = []
  for s in streams:
    start, stop = stream_rows(s, size)
    rows = (stop - start) * batch_size // size
    shares.append(f"{s.name} {rows}/{batch_size} rows, mask {s.mask_ratio:g}, {s.timesteps}")
  count = sum(x.size for x in jax.tree.leaves(params))
  return f"{count / 1e6:.2f}M parameters; streams: {'; '.join(shares)}"

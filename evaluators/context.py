"""What every evaluator is given, and the one way in which evaluators run over a data set."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from umd.codecs.codec import Codec, Pixels, Weights, encode_examples
from umd.data import Source, eval_batches, load
from umd.devices.mesh import batch_sharding, local_rows, replicated, run_ahead
from umd.devices.placement import gathered_at_once, on
from umd.objectives import Stream
from umd.runs import preemption, progress
from umd.samplers.keys import example_keys
from umd.trained.inference import Inference


def say(text: str) -> None:
  """Prints a line about a long evaluation, once for all processes."""
  progress.say(f"[evaluation] {text}")


def open_data(key: str, spec: Mapping) -> Source:
  """The source that the setting `key` of an evaluator names; reads no images.

  Args:
    key: name of the setting, for messages.
    spec: arguments of `umd.data.load`.

  Raises:
    ValueError: not a mapping, or arguments that `load` does not take; see also there.
  """
  if not isinstance(spec, Mapping):
    raise ValueError(f"{key}={spec!r} must be dict(name=..., split=..., pp=...).")
  parameters = inspect.signature(load).parameters
  missing = {k for k, p in parameters.items() if p.default is p.empty} - spec.keys()
  if (unknown := spec.keys() - parameters.keys()) or missing:
    raise ValueError(
      f"{key}: unknown settings {sorted(unknown)}, missing settings {sorted(missing)}. "
      f"Data takes {list(parameters)}."
    )
  return load(**spec)


def count(source: Source, num: int) -> int:
  """How many examples `num` stands for: the first `num`, or all if it is 0."""
  if num < 0:
    raise ValueError(f"num={num} must be a number of examples, or 0 for all.")
  return min(num or len(source), len(source))


def index_batches(
  num: int, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
  """Positions 0..num - 1 as `eval_batches` gives them, without images: {index [b], _mask [b]}."""
  local = batch_size // process_count
  for start in range(0, num, batch_size):
    index = start + process_index * local + np.arange(local, dtype=np.int32)
    yield {"index": index, "_mask": (index < num).astype(np.float32)}


Listener = Callable[[dict[str, np.ndarray], np.ndarray], None]


class Output(NamedTuple):
  """What a function that `Context.jit` compiled makes of a batch.

  Attributes:
    rows: {name: [B, ...]}, whole in every process.
    own: the same, split over the devices: each process has the rows of its own.
    pictures: {name: [R, ...]}, of the R examples to be shown; those not `found` mean nothing.
    found: [R], whether the example is in this batch.
    index: [B], places in the source.
    mask: [B], 0 for filling.
  """

  rows: dict
  own: dict
  pictures: dict
  found: jax.Array
  index: jax.Array
  mask: jax.Array


@dataclasses.dataclass(frozen=True)
class Context:
  """What an evaluator may use.

  Attributes:
    inference: the model and its path.
    streams: what it is trained on.
    mesh: all devices.
    batch_size: of evaluation, over all devices; results do not depend on it.
    seed: of everything random in evaluation.
    cache: folder for what is computed once per workdir.
    progress: takes a line now and then about what takes long.
    codec: between images and what the model sees.
  """

  inference: Inference
  streams: Sequence[Stream]
  mesh: Mesh
  batch_size: int
  seed: int
  cache: str
  progress: Callable[[str], None] = say
  codec: Codec = dataclasses.field(default_factory=Pixels)

  @property
  def image_size(self) -> tuple[int, int, int]:
    """(H, W, C) of the images that are made of what the model makes."""
    return self.codec.pixel_size(self.inference.model.image_size)

  def weights(self, params) -> Weights:
    """The model's parameters with those of the codec, for functions that need both."""
    return Weights(params, self.codec.params)

  def see(self, weights: Weights, batch) -> jax.Array:
    """What the model sees of a batch's images; latents are drawn by (seed, example)."""
    keys = example_keys(self.seed, batch["index"])
    return encode_examples(self.codec, weights.codec, batch["image"], keys)

  def open(self, key: str, spec: Mapping) -> Source:
    """Like `open_data`, of images or latents of the size that the model is trained on."""
    source = open_data(key, spec)
    size, own = self.codec.source_size(key, source), self.inference.model.image_size
    if size != tuple(own):
      raise ValueError(
        f"{key}: of {source.name} the model would see {size}, but it is trained on {tuple(own)}. "
        f"Set {key}.pp to what the model is trained on."
      )
    return source

  def check_timestep(self, t: int) -> None:
    """Raises ValueError unless t is a timestep of the path; JAX would clamp it in silence."""
    timesteps = self.inference.path.timesteps
    if not 0 <= t <= timesteps:
      raise ValueError(f"t={t} must be in [0, timesteps={timesteps}].")

  def jit(
    self,
    fn: Callable,
    pictures: Collection[str] = (),
    shown: Sequence[int] = (),
    own: Collection[str] = (),
  ) -> Callable:
    """Compiles `fn(params, batch) -> {name: [B, ...]}` for `map`; every process gets the result.

    Of the outputs named in `pictures` only the examples `shown` leave the devices; of those named
    in `own` each process gets the rows that its devices computed. Parameters may be split over the
    devices; `fn` sees them whole but for those of layers, which gather their own.
    """
    shown, everywhere = np.asarray(shown, np.int32), replicated(self.mesh)

    def whole(params, batch, **kwargs):
      with on(self.mesh):
        rows = fn(gathered_at_once(params), batch, **kwargs)
      index, mask = batch["index"], batch["_mask"]
      hits = (index[:, None] == shown) & (mask[:, None] > 0)
      few = {name: rows.pop(name)[hits.argmax(axis=0)] for name in pictures}
      split = {name: rows.pop(name) for name in own}
      return Output(rows, {**split, "index": index, "_mask": mask}, few, hits.any(0), index, mask)

    shardings = Output(*[everywhere] * len(Output._fields))
    return jax.jit(whole, out_shardings=shardings._replace(own=batch_sharding(self.mesh)))

  def map(
    self,
    fn: Callable,
    params,
    source: Source,
    *,
    num: int = 0,
    keep: Collection[str] | None = None,
  ) -> dict[str, np.ndarray]:
    """Runs a function that `jit` compiled over the source, or over its first `num` examples.

    Returns {name: [n, ...]}, one row per example in the source's order, whatever the order in which
    they come; filling is gone, and so are examples that could not be read and need not be. Pictures
    are [len(shown), ...], in the order of `shown`. Names not in `keep` stay on the devices.
    """
    batches = eval_batches(source, self.batch_size, **self.place())
    return self._collect(fn, params, batches, count(source, num), source.name, keep)

  def map_positions(
    self, fn: Callable, params, num: int, what: str, listen: Listener | None = None
  ) -> dict[str, np.ndarray]:
    """Like `map`, over positions 0..num - 1 without images; `what` names them in messages.

    `listen(rows, index)` is given the rows of `own`, batch by batch, and their positions.
    """
    batches = index_batches(num, self.batch_size, **self.place())
    return self._collect(fn, params, batches, num, what, None, listen)

  def place(self) -> dict[str, int]:
    """This process among all, as `eval_batches` wants to know it."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}

  def _collect(self, fn, params, batches, n, what, keep, listen=None) -> dict[str, np.ndarray]:
    whole, seen, read = {}, np.zeros(n, bool), np.zeros(n, bool)
    clock = progress.Clock(self.progress, what, n)

    def fill(name, size, to, values, rows):
      if name not in whole:
        whole[name] = np.zeros((size, *values.shape[1:]), values.dtype)
      whole[name][to] = np.asarray(values)[rows]

    for out in run_ahead(lambda batch: fn(params, batch), batches, self.mesh):
      index = np.asarray(out.index)
      inside = index < n
      rows = inside & (np.asarray(out.mask) > 0)  # Others inside could not be read: left out.
      names = [name for name in out.rows if keep is None or name in keep]
      for name in names:
        fill(name, n, index[rows], out.rows[name], rows)
      found = np.asarray(out.found)
      if found.any():  # Pictures of other batches are never fetched.
        for name, values in out.pictures.items():
          fill(name, len(found), found, values, found)
      if listen:
        own = {name: local_rows(values) for name, values in out.own.items()}
        real = (own["_mask"] > 0) & (own["index"] < n)
        listen({name: values[real] for name, values in own.items()}, own["index"][real])
      seen[index[inside]], read[index[rows]] = True, True
      clock(int(seen.sum()))
      preemption.check()  # A run that is to end does not wait for a long evaluation.
      if seen.all():
        break
    if not seen.all() or not read.any():
      raise ValueError(f"{what}: {n - read.sum()} of {n} examples could not be read.")
    return whole if read.all() else whole | {name: whole[name][read] for name in names}

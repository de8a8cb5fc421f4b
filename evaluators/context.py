"""What every evaluator is given, and the one way in which evaluators run over a data set."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from umd.codecs.codec import Codec, Pixels, Weights, encode_examples
from umd.data import Source, eval_batches, load
from umd.devices.mesh import batch_sharding, gathered_at_once, local_rows, on, replicated, run_ahead
from umd.objectives import Stream
from umd.runs import preemption, progress
from umd.samplers.keys import example_keys
from umd.trained.inference import Inference


def setting(help: str, default=dataclasses.MISSING, within: str | tuple[str, ...] | None = None):
  """Makes a field of an evaluator's `Settings`, with what `--help_config` and the check read there.

  Args:
    help: the meaning, a sentence.
    default: its value unless it is set; without one it must be set.
    within: an interval such as "[1, inf)", or the values that there are.
  """
  return dataclasses.field(default=default, metadata={"help": help, "within": within})


def say(text: str) -> None:
  """Prints a line about a long evaluation, once for all processes."""
  progress.say(f"[evaluation] {text}")


def open_data(key: str, spec: Mapping) -> Source:
  """Opens the data that the setting `key` of an evaluator names, without reading images.

  Args:
    key: the name of the setting, for messages.
    spec: arguments of `umd.data.load`.

  Raises:
    ValueError: the setting is no mapping; see also `umd.data.load`.
  """
  if not isinstance(spec, Mapping):
    raise ValueError(f"{key}={spec!r} must be dict(name=..., split=..., pp=...).")
  return load(**spec)


def count(source: Source, num: int) -> int:
  """Returns how many examples `num` stands for: the first `num`, or all where it is 0."""
  if num < 0:
    raise ValueError(f"num={num} must be a number of examples, or 0 for all.")
  return min(num or len(source), len(source))


def index_batches(
  num: int, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
  """Yields positions 0..num - 1 as `eval_batches` does, without images: {index [b], _mask [b]}."""
  local = batch_size // process_count
  for start in range(0, num, batch_size):
    index = start + process_index * local + np.arange(local, dtype=np.int32)
    yield {"index": index, "_mask": (index < num).astype(np.float32)}


Listener = Callable[[dict[str, np.ndarray], np.ndarray], None]


class Output(NamedTuple):
  """What a function that `Context.jit` compiled makes of a batch of B examples.

  Attributes:
    rows: {name: [B, ...]}, whole in every process.
    local: {name: [B, ...]}, split over the devices, so that a process has its devices' rows only.
    pictures: {name: [R, ...]} of the R examples that are shown, wherever `present` says so.
    present: [R], whether the example is in this batch.
    index: [B], positions in the source.
    mask: [B], 0 where a row is filling, or an example that could not be read.
  """

  rows: dict
  local: dict
  pictures: dict
  present: jax.Array
  index: jax.Array
  mask: jax.Array


class _Collector:
  """Puts the outputs of batches, which come in any order, into arrays in the source's order."""

  def __init__(self, num: int, keep: Collection[str] | None):
    self.num = num
    self.arrays = {}
    self.names = set()  # Of the arrays that have one row per example.
    self.seen = np.zeros(num, bool)
    self.read = np.zeros(num, bool)
    self._keep = keep

  def add(self, out: Output) -> None:
    index = np.asarray(out.index)
    inside = index < self.num
    rows = inside & (np.asarray(out.mask) > 0)
    for name, values in out.rows.items():
      if self._keep is None or name in self._keep:
        self.names.add(name)
        self._put(name, self.num, index[rows], np.asarray(values)[rows])
    present = np.asarray(out.present)
    if present.any():  # The pictures of other batches are never fetched from the devices.
      for name, values in out.pictures.items():
        self._put(name, len(present), present, np.asarray(values)[present])
    self.seen[index[inside]] = True
    self.read[index[rows]] = True

  def _put(self, name, size, places, values) -> None:
    if name not in self.arrays:
      self.arrays[name] = np.zeros((size, *values.shape[1:]), values.dtype)
    self.arrays[name][places] = values

  def result(self, what: str) -> dict[str, np.ndarray]:
    """Returns the arrays without the examples that could not be read.

    Raises:
      ValueError: some examples never came, or none could be read.
    """
    if not self.seen.all() or not self.read.any():
      missing = self.num - self.read.sum()
      raise ValueError(f"{what}: {missing} of {self.num} examples could not be read.")
    return {
      name: values[self.read] if name in self.names else values
      for name, values in self.arrays.items()
    }


@dataclasses.dataclass(frozen=True)
class Context:
  """What an evaluator may use.

  Attributes:
    inference: the model and its path.
    streams: what the model is trained on.
    mesh: all devices.
    batch_size: examples at a time over all devices; results do not depend on it.
    seed: the seed of everything random in evaluation.
    cache: the folder for what is computed once per workdir.
    progress: a function that takes a line now and then about what takes long.
    codec: what stands between images and the model.
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
    """(H, W, C) of the images into which the codec decodes what the model makes."""
    return self.codec.pixel_size(self.inference.model.image_size)

  def weights(self, params) -> Weights:
    """Puts the codec's parameters beside the model's, for functions that need both."""
    return Weights(params, self.codec.params)

  def see(self, weights: Weights, batch) -> jax.Array:
    """Encodes a batch's images as the model sees them; latents are drawn by (seed, example)."""
    keys = example_keys(self.seed, batch["index"])
    return encode_examples(self.codec, weights.codec, batch["image"], keys)

  def open(self, key: str, spec: Mapping) -> Source:
    """Opens data as `open_data` does, and checks that the model sees them in its own size."""
    source = open_data(key, spec)
    size = self.codec.source_size(key, source)
    model_size = tuple(self.inference.model.image_size)
    if size != model_size:
      raise ValueError(
        f"{key}: of {source.name} the model would see {size}, but it is trained on {model_size}. "
        f"Set {key}.pp to what the model is trained on."
      )
    return source

  def check_time(self, t: float) -> None:
    """Raises ValueError unless t is a time of the path; JAX would clamp it in silence."""
    end = self.inference.path.end
    if not 0 <= t <= end:
      raise ValueError(f"t={t} must be in [0, {end}], where the noise path ends.")

  def jit(
    self,
    fn: Callable,
    pictures: Collection[str] = (),
    shown: Sequence[int] = (),
    local: Collection[str] = (),
  ) -> Callable:
    """Compiles `fn(params, batch) -> {name: [B, ...]}` for `map` and `map_positions`.

    Every process gets all rows of an output, with two exceptions. Of the outputs named in
    `pictures` only the examples at positions `shown` leave the devices. Of those named in `local` a
    process gets the rows that its own devices computed. Parameters may be split over the devices;
    `fn` sees them whole, but for those of layers, which are gathered where they are used.
    """
    shown = np.asarray(shown, np.int32)

    def whole(params, batch, **kwargs):
      with on(self.mesh):
        rows = fn(gathered_at_once(params), batch, **kwargs)
      index, mask = batch["index"], batch["_mask"]
      hits = (index[:, None] == shown) & (mask[:, None] > 0)
      few = {name: rows.pop(name)[hits.argmax(axis=0)] for name in pictures}
      split = {name: rows.pop(name) for name in local}
      split |= {"index": index, "_mask": mask}
      return Output(rows, split, few, hits.any(0), index, mask)

    everywhere = Output(*[replicated(self.mesh)] * len(Output._fields))
    return jax.jit(whole, out_shardings=everywhere._replace(local=batch_sharding(self.mesh)))

  def map(
    self,
    fn: Callable,
    params,
    source: Source,
    *,
    num: int = 0,
    keep: Collection[str] | None = None,
  ) -> dict[str, np.ndarray]:
    """Runs a function that `jit` compiled over a source, or over its first `num` examples.

    Args:
      fn: what `jit` returned.
      params: its first argument.
      source: the data.
      num: the number of examples, 0 for all.
      keep: the outputs that are fetched from the devices; None for all.

    Returns {name: [n, ...]}, one row per example in the source's order. Filling is gone, and so are
    the few examples that data.max_bad allows to be unreadable. Pictures are [len(shown), ...].

    Raises:
      ValueError: examples could not be read.
    """
    batches = eval_batches(source, self.batch_size, **self.place())
    return self._collect(fn, params, batches, count(source, num), source.name, keep)

  def map_positions(
    self, fn: Callable, params, num: int, what: str, listen: Listener | None = None
  ) -> dict[str, np.ndarray]:
    """Runs a function as `map` does, over positions 0..num - 1 without images.

    `what` names them in messages. `listen(rows, index)` is given the rows of the local outputs,
    batch by batch, with their positions.
    """
    batches = index_batches(num, self.batch_size, **self.place())
    return self._collect(fn, params, batches, num, what, None, listen)

  def place(self) -> dict[str, int]:
    """Returns this process's place among all, as arguments of `eval_batches`."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}

  def _collect(self, fn, params, batches, num, what, keep, listen=None) -> dict[str, np.ndarray]:
    collector = _Collector(num, keep)
    clock = progress.Clock(self.progress, what, num)
    for out in run_ahead(lambda batch: fn(params, batch), batches, self.mesh):
      collector.add(out)
      if listen:
        rows = {name: local_rows(values) for name, values in out.local.items()}
        real = (rows["_mask"] > 0) & (rows["index"] < num)
        listen({name: values[real] for name, values in rows.items()}, rows["index"][real])
      clock(int(collector.seen.sum()))
      preemption.check()  # A run that is asked to stop does not wait for a long evaluation.
      if collector.seen.all():
        break
    return collector.result(what)

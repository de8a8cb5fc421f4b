"""Finds what is not finite in a step of training: a parameter, an image, a layer, a gradient."""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from trainers.loop import train_batches
from umd.codecs.codec import encode_batch
from umd.devices.mesh import LAYERS, each_process, local_rows, prefetch, replicated
from umd.models.layers.blocks import Part, Stack
from umd.runs import workdir as folder
from umd.state import Loss, step_key

ALL = "all streams"
LISTED = 8  # The number of names in one line of a report.


def inspect(parts, config, params, step: int, workdir: str) -> str:
  """Computes step 1, 2, ... again, writes its batch and a report; returns the verdict, in words.

  Every process must call it.

  Args:
    parts: the trainer's, with `mesh`, `source`, `codec`, `objective` and `streams`.
    config: the trainer's, with `batch_size` and `seed`.
    params: those before the step. A step that was not applied leaves them as they were.
    step: the number of the step.
    workdir: `nonfinite_step_N.npz` and `.txt` are written here.
  """
  batches = train_batches(parts.source, config.batch_size, config.seed, step - 1)
  batch = next(prefetch(batches, parts.mesh, 1))
  key = step_key(config.seed, step - 1)
  encode = jax.jit(functools.partial(encode_batch, parts.codec))
  streams = [stream.name for stream in parts.streams]
  report = diagnose(parts.objective, streams, params, encode(parts.codec.params, batch, key), key)
  path = _save(workdir, step, batch, f"Step {step}\n{report}")
  return f"Found: {report.splitlines()[0]} The batch is in {path}, the report next to it (.txt)."


def diagnose(objective: Loss, streams: Sequence[str], params, batch: Mapping, key) -> str:
  """Computes a step again and says what is not finite in it, and where that begins.

  It looks at parameters, images, layers in the order of the computation, terms, and gradients from
  the loss backwards, and stops at the first kind that is not finite. Every process must call it.

  Args:
    objective: of an `AutoEncoder` or a `KLAutoEncoder`.
    streams: names of the streams, in the order in which the model encodes them.
    params: those before the step.
    batch: the step's, split over the devices.
    key: the step's, see `umd.state.step_key`.

  Returns:
    A verdict in the first line, and below it the values that it rests on.
  """
  everywhere = replicated(batch["image"].sharding.mesh)
  fetch = lambda fn, *args: jax.device_get(jax.jit(fn, out_shardings=everywhere)(*args))

  largest_params = fetch(by_layer, params)
  lines = _table("Largest absolute value of each parameter:", largest_params.items())
  if bad := _not_finite(largest_params):
    return "\n".join([f"parameters not finite before the step: {_listed(bad)}.", *lines])

  images = fetch(lambda x: largest(x, tuple(range(1, x.ndim))), batch["image"])
  lines = [f"Images: {len(images)}, largest absolute value {images.max():.5g}.", *lines]
  if rows := np.flatnonzero(~np.isfinite(images)).tolist():
    verdict = f"images not finite: rows {_listed(rows)} of the batch of {len(images)}."
    return "\n".join([verdict, *lines])

  drawn = jax.jit(objective.draw)(batch, key)
  watch = Watch(streams)

  def watched(params, drawn):
    with nn.intercept_methods(watch):
      total, terms = objective(jax.lax.with_sharding_constraint(params, everywhere), drawn)
    return total, terms, watch.values

  total, terms, layers = fetch(watched, params, drawn)
  lines += _table("Terms of the loss, without their weights:", terms.items())
  title = "Largest absolute value that leaves each part, or is on its way within it:"
  lines += _table(title, zip(watch.names, layers, strict=True))
  wrong = np.flatnonzero(~np.isfinite(layers))
  if wrong.size:
    verdict = f"activations not finite, the first in {watch.names[wrong[0]]}."
  elif bad := _not_finite(terms):
    verdict = f"terms not finite, from finite predictions: {_listed(bad)}."
  elif not np.isfinite(total):
    verdict = "loss not finite, the sum of finite terms: they or their weights are too large."
  else:
    gradient = jax.grad(objective, has_aux=True)
    gradients = fetch(lambda *args: by_layer(gradient(*args)[0]), params, drawn)
    lines += _table("Largest absolute value of each gradient:", gradients.items())
    # The gradient flows backwards: what was computed last is the first that can go wrong.
    order = {part: i for i, part in enumerate(watch.parts)}
    nearness = lambda name: -order.get(name.rpartition("/")[0], -1)
    bad = sorted(_not_finite(gradients), key=nearness)
    verdict = f"gradients not finite, from the loss backwards: {_listed(bad)}."
    if not bad:
      verdict = f"nothing: computed again, the step is finite, with a loss of {total:.5g}."
  return "\n".join([verdict, *lines])


def largest(x, axes: tuple[int, ...] | None = None):
  """Returns the largest absolute value over `axes`; it is not finite if any value is not."""
  return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes)


def by_layer(tree) -> dict[str, jax.Array]:
  """Returns {"encoder/blocks/1/mlp/out/kernel": largest absolute value}, layer by layer."""
  values = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if LAYERS not in names:
      values["/".join(names)] = largest(leaf)
      continue
    at = names.index(LAYERS) + 1
    for i, value in enumerate(largest(leaf, tuple(range(1, leaf.ndim)))):
      values["/".join([*names[:at], str(i), *names[at:]])] = value
  return values


class Watch:
  """Notes, while a model is traced, the largest value that enters and leaves each of its parts.

  It is an interceptor for `flax.linen.intercept_methods`. A value that was noted before is not
  noted again.

  Attributes:
    names: "STREAM: PART" of what each value would blame, in the order of the computation.
    values: the same number of float32 scalars, tracers.
    parts: names of the parts, in the order in which they are entered.
  """

  def __init__(self, streams: Sequence[str]):
    """Takes the names of the streams, in the order in which the model encodes them."""
    self.names = []
    self.values = []
    self.parts = []
    self._streams = list(streams)
    self._upcoming = iter(streams)  # Those that the model has not begun to encode.
    self._all = ALL if len(streams) > 1 else f"stream {streams[0]!r}"
    self._stream = self._all
    self._prefix = ()
    self._inside: list[str] = []  # The parts that are being computed, outermost first.
    self._noted: list = []

  def __call__(self, next_fun: Callable, args, kwargs, context):
    """Computes a method of a module, and notes what enters and leaves it."""
    module, method = context.module, context.method_name
    if module.scope is None or method == "setup":
      return next_fun(*args, **kwargs)  # No computation: a question to the model, such as `patch`.
    if method in ("encoder_input", "encode"):  # Of an AutoEncoder, of a KLAutoEncoder.
      self._stream = f"stream {next(self._upcoming, '?')!r}"
    elif method in ("pool", "decode"):
      self._stream = self._all
    path = [*self._prefix, *module.path]
    if method != "__call__":
      path.append(method)
    name = "/".join(path) or "model"
    # What enters a part was made by the one around it, after the parts before.
    around = f"{self._inside[-1]}, before {name}" if self._inside else "its input x_t"
    self._note(around, (args, kwargs))
    self._inside.append(name)
    self.parts.append(name)
    if isinstance(module, Stack) and method == "__call__":
      out = self._layer_by_layer(module, *args, **kwargs)
    else:
      out = next_fun(*args, **kwargs)
    self._inside.pop()
    self._note(name, out)
    return out

  def _note(self, blamed: str, tree) -> None:
    is_new = lambda x: all(x is not noted for noted in self._noted)
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    if floats := [x for x in jax.tree.leaves(tree) if is_float(x) and is_new(x)]:
      self._noted += floats
      self.names.append(f"{self._stream}: {blamed}")
      self.values.append(jnp.stack([largest(x) for x in floats]).max())

  def _layer_by_layer(self, stack: Stack, parts):
    """Computes what a Stack does without its loop, from which no value could be brought out."""
    outputs = []
    around = self._stream
    params = stack.variables["params"]
    unrolled = stack.clone(scan=False, remat="none", parent=None)
    at_layer = lambda i: self._at(stack, LAYERS, str(i))
    for number, part in enumerate(parts):
      self._stream = f"stream {self._streams[number]!r}" if len(parts) > 1 else around
      (x,) = unrolled.run(params, [Part(*part)], at_layer)
      if stack.last_norm:
        with self._at(stack, "norm"):
          x = stack.norm.clone(parent=None).apply({"params": params["norm"]}, x)
      outputs.append(x)
    self._stream = around
    return outputs

  @contextlib.contextmanager
  def _at(self, stack: Stack, *names: str) -> Iterator[None]:
    """Modules applied within are named as parts of the stack, of which they know nothing."""
    before = self._prefix
    self._prefix = (*before, *stack.path, *names)
    yield
    self._prefix = before


def _not_finite(values: Mapping) -> list[str]:
  return [name for name, value in values.items() if not np.isfinite(value)]


def _listed(names: Sequence) -> str:
  more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
  return ", ".join(map(str, names[:LISTED])) + more


def _table(title: str, rows) -> list[str]:
  return [title, *(f"  {value:<12.5g} {name}" for name, value in rows)]


def _save(workdir: str, step: int, batch: Mapping, report: str) -> str:
  """Writes nonfinite_step_N.npz (images [B, H, W, C], labels [B]) and .txt; returns the npz's path.

  Every process must call it; process 0 writes the rows of all.
  """
  rows = [local_rows(batch[key]) for key in ("image", "label")]
  images, labels = (np.concatenate(x) for x in zip(*each_process(rows), strict=True))
  path = folder.join(workdir, f"nonfinite_step_{step}.npz")
  if jax.process_index() == 0:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, labels=labels)
    folder.write_bytes(path, buffer.getvalue())
    folder.write_bytes(path.removesuffix(".npz") + ".txt", report.encode() + b"\n")
  return path

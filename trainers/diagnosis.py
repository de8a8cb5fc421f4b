"""Finds what is not finite in a step of training: a parameter, an image, a layer, a gradient."""

import contextlib
import functools
import io
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from umd.codecs.codec import encode_batch
from umd.devices import mesh
from umd.devices.mesh import each_process, local_rows, replicated
from umd.devices.placement import LAYERS
from umd.models.layers.blocks import Part, Stack
from umd.runs import workdir as folder
from umd.state import Objective, step_key


def inspect(parts, batches_from: Callable, params, step: int, seed: int, workdir: str) -> str:
  """Computes step `step` = 1, 2, ... again, writes its batch and a report; the verdict, in words.

  Every process must call it.

  Args:
    parts: the trainer's, with `mesh`, `codec`, `objective` and `streams`.
    batches_from: `batches_from(n)`: the batches of step n + 1 and those after it.
    params: before the step; those of a step that was not applied are those after it, too.
    step: number of the step.
    seed: of the run.
    workdir: `nonfinite_step_N.npz` and `.txt` go here.
  """
  batch = next(mesh.prefetch(batches_from(step - 1), parts.mesh, 1))
  streams = [stream.name for stream in parts.streams]
  key, encode = step_key(seed, step - 1), functools.partial(encode_batch, parts.codec)
  seen = jax.jit(encode)(parts.codec.params, batch, key)
  report = diagnose(parts.objective, streams, params, seen, key)
  path = save(workdir, step, batch, f"Step {step}\n{report}")
  return f"Found: {report.splitlines()[0]} The batch is in {path}, the report next to it (.txt)."


ALL = "all streams"
LISTED = 8  # names or rows in one line of a report


def largest(x, axes: tuple[int, ...] | None = None):
  """Largest absolute value over `axes`: not finite if any value is not."""
  return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes)


class Watch:
  """Notes, while a model is traced, the largest value that enters and leaves each of its parts.

  A value that was noted before is not noted again.

  Attributes:
    names: in the order of the computation, "STREAM: PART" of what the value would blame.
    values: the same number of float32 scalars, tracers.
    parts: names of the parts, in the order in which they are entered.
  """

  def __init__(self, streams: Sequence[str]):
    """`streams` are the names of what the model encodes, in order."""
    self.names, self.values, self.parts = [], [], []
    self._streams, self._names = iter(streams), list(streams)
    self._all = ALL if len(streams) > 1 else f"stream {streams[0]!r}"
    self._stream, self._prefix = self._all, ()
    self._inside: list[str] = []  # The parts that are being computed, outermost first.
    self._noted: list = []

  def _note(self, blamed: str, tree) -> None:
    is_new = lambda x: all(x is not known for known in self._noted)
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    if floats := [x for x in jax.tree.leaves(tree) if is_float(x) and is_new(x)]:
      self._noted += floats
      self.names.append(f"{self._stream}: {blamed}")
      self.values.append(jnp.stack([largest(x) for x in floats]).max())

  def __call__(self, next_fun: Callable, args, kwargs, context):
    """The interceptor for `flax.linen.intercept_methods`."""
    if context.module.scope is None or context.method_name == "setup":
      return next_fun(*args, **kwargs)  # No computation: a question to the model, such as `keep`.
    if context.method_name in ("show", "encode"):  # Of an AutoEncoder, of a KLAutoEncoder.
      self._stream = f"stream {next(self._streams, '?')!r}"
    elif context.method_name in ("pool", "decode"):
      self._stream = self._all
    path = [*self._prefix, *context.module.path]
    method = [] if context.method_name == "__call__" else [context.method_name]
    name = "/".join([*path, *method]) or "model"
    # What enters a part was made by the one around it, after the parts before.
    around = f"{self._inside[-1]}, before {name}" if self._inside else "its input x_t"
    self._note(around, (args, kwargs))
    self._inside.append(name)
    self.parts.append(name)
    if isinstance(context.module, Stack) and not method:
      out = self._layer_by_layer(context.module, *args, **kwargs)
    else:
      out = next_fun(*args, **kwargs)
    self._inside.pop()
    self._note(name, out)
    return out

  def _layer_by_layer(self, stack: Stack, parts):
    """What a Stack computes; within its own loop values could not be brought out."""
    out, around = [], self._stream
    for i, part in enumerate(parts):
      self._stream = f"stream {self._names[i]!r}" if len(parts) > 1 else around
      out.append(self._layers(stack, *part))
    self._stream = around
    return out

  def _layers(self, stack: Stack, *part):
    params = stack.variables["params"]
    at_layer = lambda i: self._at(stack, LAYERS, str(i))
    unrolled = stack.clone(scan=False, remat="none", parent=None)
    (x,) = unrolled.run(params, [Part(*part)], at_layer)
    if not stack.last_norm:
      return x
    with self._at(stack, "norm"):
      return stack.norm.clone(parent=None).apply({"params": params["norm"]}, x)

  @contextlib.contextmanager
  def _at(self, stack: Stack, *names: str):
    before, self._prefix = self._prefix, (*self._prefix, *stack.path, *names)
    yield
    self._prefix = before


def by_layer(tree) -> dict[str, jax.Array]:
  """{"encoder/blocks/1/mlp/out/kernel": largest absolute value}, each layer of a stack alone."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if LAYERS not in parts:
      found["/".join(parts)] = largest(leaf)
      continue
    at = parts.index(LAYERS) + 1
    for i, value in enumerate(largest(leaf, tuple(range(1, leaf.ndim)))):
      found["/".join([*parts[:at], str(i), *parts[at:]])] = value
  return found


def _bad(values: Mapping) -> list[str]:
  return [name for name, value in values.items() if not np.isfinite(value)]


def _listed(names: Sequence) -> str:
  more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
  return ", ".join(map(str, names[:LISTED])) + more


def _table(title: str, rows) -> list[str]:
  return [title, *(f"  {value:<12.5g} {name}" for name, value in rows)]


def _backwards(gradients: Mapping, parts: Sequence[str]) -> list[str]:
  """The gradients that are not finite, the nearest to the loss first."""
  depth = {part: i for i, part in enumerate(parts)}
  return sorted(_bad(gradients), key=lambda name: -depth.get(name.rpartition("/")[0], -1))


@functools.lru_cache(maxsize=2)
def _watched(objective: Objective, streams: tuple[str, ...], everywhere):
  """(jitted `fn(params, drawn) -> (loss, terms, values)`, list that ends with its Watch)."""
  traced = []

  def watched(params, drawn):
    traced.append(Watch(streams))
    with nn.intercept_methods(traced[-1]):
      total, terms = objective(jax.lax.with_sharding_constraint(params, everywhere), drawn)
    return total, terms, traced[-1].values

  return jax.jit(watched, out_shardings=everywhere), traced


def _rows(images):
  """[B]: largest absolute value of each image."""
  return largest(images, tuple(range(1, images.ndim)))


def diagnose(objective: Objective, streams: Sequence[str], params, batch: Mapping, key) -> str:
  """Computes a step again and says what is not finite in it, and where that begins.

  It looks at parameters, images, layers in the order of the computation, terms, and gradients from
  the loss backwards, and stops at the first kind that is not finite. Every process must call it.

  Args:
    objective: of an `AutoEncoder` or a `KLAutoEncoder`.
    streams: names of the streams, in the order in which the model encodes them.
    params: before the step.
    batch: the step's, split over the devices.
    key: the step's, see `umd.state.step_key`.

  Returns:
    A verdict in the first line, and below it the values that it rests on.
  """
  everywhere = replicated(batch["image"].sharding.mesh)
  fetch = lambda fn, *args: jax.device_get(jax.jit(fn, out_shardings=everywhere)(*args))

  largest_params = fetch(by_layer, params)
  lines = _table("Largest absolute value of each parameter:", largest_params.items())
  if bad := _bad(largest_params):
    return "\n".join([f"parameters not finite before the step: {_listed(bad)}.", *lines])

  images = fetch(_rows, batch["image"])
  lines = [f"Images: {len(images)}, largest absolute value {images.max():.5g}.", *lines]
  if rows := np.flatnonzero(~np.isfinite(images)).tolist():
    verdict = f"images not finite: rows {_listed(rows)} of the batch of {len(images)}."
    return "\n".join([verdict, *lines])

  watched, traced = _watched(objective, tuple(streams), everywhere)
  drawn = jax.jit(objective.draw)(batch, key)
  total, terms, layers = jax.device_get(watched(params, drawn))
  watch = traced[-1]
  lines += _table("Terms of the loss, without their weights:", terms.items())
  lines += _table(
    "Largest absolute value that leaves each part, or is on its way within it:",
    zip(watch.names, layers, strict=True),
  )
  wrong = np.flatnonzero(~np.isfinite(layers))
  if wrong.size:
    verdict = f"activations not finite, the first in {watch.names[wrong[0]]}."
  elif bad := _bad(terms):
    verdict = f"terms not finite, from finite predictions: {_listed(bad)}."
  elif not np.isfinite(total):
    verdict = "loss not finite, the sum of finite terms: they or their weights are too large."
  else:
    gradient = jax.grad(objective, has_aux=True)
    gradients = fetch(lambda *args: by_layer(gradient(*args)[0]), params, drawn)
    lines += _table("Largest absolute value of each gradient:", gradients.items())
    bad = _backwards(gradients, watch.parts)
    verdict = f"gradients not finite, from the loss backwards: {_listed(bad)}."
    if not bad:
      verdict = f"nothing: computed again, the step is finite, with a loss of {total:.5g}."
  return "\n".join([verdict, *lines])


def save(workdir: str, step: int, batch: Mapping, report: str) -> str:
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

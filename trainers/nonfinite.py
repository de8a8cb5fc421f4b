"""What to do when numbers are no longer finite: look into the step and leave it on disk."""

import functools
from collections.abc import Callable

import jax

from umd import diagnosis, sharding
from umd.codec import encode_batch
from umd.state import step_key


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
  batch = next(sharding.prefetch(batches_from(step - 1), parts.mesh, 1))
  streams = [stream.name for stream in parts.streams]
  key, encode = step_key(seed, step - 1), functools.partial(encode_batch, parts.codec)
  seen = jax.jit(encode)(parts.codec.params, batch, key)
  report = diagnosis.diagnose(parts.objective, streams, params, seen, key)
  path = diagnosis.save(workdir, step, batch, f"Step {step}\n{report}")
  return f"Found: {report.splitlines()[0]} The batch is in {path}, the report next to it (.txt)."

"""The training step on stored latents against the step that encodes images itself.

python -m benchmarks.latents --variant B/2 --size 256 --batch_size 4 --repeats 3 --out latents.jsonl

Both steps are the trainer's, with the same model and batch. The
auto-encoder is Stable Diffusion's in size with random weights, which cost as much as trained ones.
Memory is the compiler's account of one device: arguments (state, frozen parameters, batch) and
temporaries. `disk` is what `tools.encode_latents` would write, per million images.
"""

import argparse
import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.harness import Column
from configs import ae_i1k
from tools.command_line import positive
from umd import models, objectives
from umd.codecs.codec import Latents, encode_batch
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.codecs.vae_files import VaeWeights
from umd.devices.mesh import make_mesh, put_batch
from umd.models import network
from umd.objectives import Objective
from umd.paths import make_path
from umd.state import init_state, make_train_step

COLUMNS = (
  Column("", "kind"),
  Column("images/s", "images_per_second", "{:.2f}"),
  Column("times", "times_as_fast", "{:.2f}"),
  Column("state MiB", "arguments_mib", "{:.0f}"),
  Column("temp. MiB", "temporaries_mib", "{:.0f}"),
  Column("GB/million", "disk_gb_per_million_and_view", "{:.2f}"),
)
FLOAT16 = 2  # Bytes of a number on disk.


def random_codec(mesh, size: int, dtype: str, chunk: int) -> Latents:
  """A codec of Stable Diffusion's size."""
  architecture = Architecture()
  noise = jnp.zeros((1, size // 8, size // 8, architecture.latent_channels))
  init = lambda key: KLAutoEncoder(architecture).init(key, jnp.zeros((1, size, size, 3)), noise)
  params = jax.device_get(jax.jit(init)(jax.random.key(0))["params"])
  return Latents(VaeWeights("random", architecture, params, "0" * 64), mesh, dtype, chunk)


def make_steps(args: argparse.Namespace, mesh) -> dict:
  """The trainer's step, a function that makes a state, and a batch of either kind."""
  codec = random_codec(mesh, args.size, args.dtype, args.chunk)
  arguments = f"variant={args.variant},size={args.size},batch_size={args.batch_size}"
  arguments += f",latent_diffusion=True,dtype={args.dtype}"
  config = ae_i1k.get_config(arguments).pretrain.to_dict()
  image_size = (args.size, args.size, 3)
  seen = codec.model_size(image_size)
  model = models.make(image_size=seen, **config["model"])
  streams, path = (
    objectives.make_streams(config["streams"]),
    make_path(**config["path"]),
  )
  loss, tx = Objective(model, path, streams, args.batch_size), optax.adamw(1e-4)
  init = functools.partial(network.init_params, model)
  fresh = lambda: init_state(init, tx, jax.random.key(0), mesh)
  step = make_train_step(
    loss,
    tx,
    lambda step: 1e-4,
    ema_decay=0.9999,
    seed=0,
    state=fresh(),
    encode=functools.partial(encode_batch, codec),
    frozen=codec.params,
  )

  def batch(*shape):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (args.batch_size, *shape)).astype(np.float32)
    return put_batch({"image": images, "label": np.zeros(args.batch_size, np.int32)}, mesh)

  stored = (*seen[:2], 2 * seen[2])
  return {"state": fresh, "step": step, "stored": batch(*stored), "on the fly": batch(*image_size)}


def measure(args: argparse.Namespace) -> Iterator[dict]:
  """A row per kind of step."""
  parts = make_steps(args, make_mesh())
  rows, calls, state = {}, {}, {"now": parts["state"]()}
  for kind in ("stored", "on the fly"):
    start = time.perf_counter()
    compiled = parts["step"].lower(state["now"], parts[kind]).compile()
    memory = compiled.memory_analysis()
    rows[kind] = {
      "kind": kind,
      "compile_seconds": time.perf_counter() - start,
      "arguments_mib": memory.argument_size_in_bytes / 2**20,
      "temporaries_mib": memory.temp_size_in_bytes / 2**20,
    }

    def step(kind=kind):
      state["now"], metrics = parts["step"](state["now"], parts[kind])
      return metrics

    calls[kind] = step
  times = harness.in_turns(calls, args.repeats)
  side = args.size // Architecture().factor
  numbers = side * side * 2 * Architecture().latent_channels
  for kind, row in rows.items():
    row["images_per_second"] = args.batch_size / times[kind].median
    row["times_as_fast"] = times[kind].faster_than(times["on the fly"])[0]
    if kind == "stored":
      row["disk_gb_per_million_and_view"] = 1e6 * numbers * FLOAT16 / 1e9
    yield row


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("latents", __doc__)
  parser.add_argument("--variant", default="B/2", help="of the model, see ae_i1k.py")
  parser.add_argument("--size", type=positive, default=256, help="side of the images in pixels")
  parser.add_argument("--batch_size", type=positive, default=4)
  parser.add_argument("--chunk", type=positive, default=8, help="images that are encoded at a time")
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  harness.main(parser, COLUMNS, measure, argv)


if __name__ == "__main__":
  main()

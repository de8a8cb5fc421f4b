"""Golden run: the first steps of every method on a tiny model, kept to notice changed numbers.

bash run.sh tools.golden            compares with tests/golden/losses.json
bash run.sh tools.golden --write    accepts the numbers of now
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import optax

from configs import quickstart
from trainers import diffusion
from trainers.config.check import read_stage
from trainers.loop import make_step
from umd import data
from umd.devices import mesh
from umd.models.network import init_params
from umd.state import init_state

FILE = Path(__file__).resolve().parent.parent / "tests/golden/losses.json"
ACCEPT = (
  "The numbers of training have changed. If that is meant, say why in the commit and accept them: "
  "bash run.sh tools.golden --write"
)
STEPS = 20
# Arguments of the quick start's pre-training, and whether it is shown labels: between them they
# reach AdaLN and the conditioning token, labels that are dropped, and loops over layers.
SMALL = f"variant=nano/2,batch_size=32,steps={STEPS}"
RUNS = {
  "mae": ("adaln=false", False),
  "umd": ("adaln=true", False),
  "dit": ("adaln=false", True),
  "maskdit": ("adaln=true,scan=true", True),
}
# How far numbers may be off, relative to the largest of their series. One or four devices, SSE4.2,
# AVX2 or AVX-512 and XLA's optimisation level 0 or its default differ by 3e-7 at most here.
RTOL = 1e-4
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def train(method: str) -> dict[str, list[float]]:
  """Metrics of each of the STEPS steps, and of the last how far the average is behind."""
  arguments, labels = RUNS[method]
  config = quickstart.get_config(f"method={method},{arguments},{SMALL}").pretrain
  config.evals, config.use_labels, config.label_drop_prob = {}, labels, 0.2 * labels
  config = read_stage(config)
  with tempfile.TemporaryDirectory() as empty:
    parts = diffusion.prepare(config, empty, empty)
  init = functools.partial(init_params, parts.model)
  key = jax.random.key(config.seed)
  state = init_state(init, parts.tx, key, parts.mesh)
  step = make_step(config, parts, state)
  batches = data.train_batches(parts.source, config.batch_size, seed=config.seed)
  history = []
  for _ in range(STEPS):
    state, metrics = step(state, mesh.put_batch(next(batches), parts.mesh))
    history.append(metrics)
  history = jax.device_get(history)
  series = {k: [float(m[k]) for m in history] for k in history[0] if not k.startswith("skipped")}
  params, average = jax.device_get((state.params, state.ema_params))
  behind = optax.tree.norm(jax.tree.map(np.subtract, params, average))
  return {**series, "average_behind": [float(behind)]}


def compare(method: str, found: Mapping, expected: Mapping, rtol: float = RTOL) -> list[str]:
  """What differs, a line for each series, at its first step that differs."""
  if found.keys() != expected.keys():
    gone, new = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    return [f"{method}: metrics {gone} are gone, {new} are new"]
  lines = []
  for name, golden in expected.items():
    now, golden = np.array(found[name]), np.array(golden)
    off = np.abs(now - golden) / np.abs(golden).max()
    wrong = np.flatnonzero(~(off <= rtol))
    if wrong.size:
      i = wrong[0]
      lines.append(
        f"{method}: {name} of step {i + 1} was {golden[i]:.7g}, is {now[i]:.7g}: off by "
        f"{off[i]:.1e} (of {rtol:.0e} allowed), at most by {np.nanmax(off):.1e}"
      )
  return lines


def read() -> dict:
  """The golden numbers, {"environment": {...}, "runs": {method: {metric: [values]}}}."""
  if not FILE.exists():
    raise FileNotFoundError(f"{FILE} is missing. Write it: bash run.sh tools.golden --write")
  return json.loads(FILE.read_text(encoding="utf-8"))


def _processor() -> str:
  """The vector instructions that this machine has; they decide how sums are rounded."""
  info = Path("/proc/cpuinfo")
  words = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
  found = " ".join(w for w in ("avx", "avx2", "fma", "avx512f", "amx_tile") if w in words)
  return f"{platform.machine()} {found}".strip()


def environment() -> dict:
  """What may make the same program give other numbers."""
  return {
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    "python": platform.python_version(),
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
    "processor": _processor(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog="tools.golden", description=__doc__.split("\n")[0])
  parser.add_argument("--write", action="store_true", help="accept the numbers of now")
  args = parser.parse_args(argv)
  runs = {method: train(method) for method in RUNS}
  if args.write:
    FILE.parent.mkdir(exist_ok=True)
    contents = {"environment": environment(), "runs": runs}
    FILE.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    print(FILE)
    return
  golden = read()
  for method, found in runs.items():
    series = golden["runs"].get(method, {})
    shared = found.keys() & series.keys()
    off = max(
      (np.abs(np.subtract(found[k], series[k])).max() / np.abs(series[k]).max() for k in shared),
      default=np.nan,
    )
    print(f"{method}: off by at most {off:.1e}, {RTOL:.0e} allowed")
  wrong = [line for m in RUNS for line in compare(m, runs[m], golden["runs"].get(m, {}))]
  if wrong:
    sys.exit(
      "\n".join([*wrong, f"golden: {golden['environment']}", f"now: {environment()}", ACCEPT])
    )


if __name__ == "__main__":
  main(sys.argv[1:])

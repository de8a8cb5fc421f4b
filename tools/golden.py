"""Trains the first steps of every method on a tiny model, to notice numbers that have changed.

bash run.sh tools.golden            compares them with tests/golden/losses.json
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
from trainers.optim import make_step
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
# {method: (arguments of the quick start's pre-training, whether it is shown labels)}. Between them
# they reach AdaLN and the conditioning token, labels that are dropped, and loops over layers.
SMALL = f"variant=nano/2,batch_size=32,steps={STEPS}"
RUNS = {
  "mae": ("adaln=false", False),
  "umd": ("adaln=true", False),
  "dit": ("adaln=false", True),
  "maskdit": ("adaln=true,scan=true", True),
}
# The error allowed, relative to the largest number of a series. One or four devices, SSE4.2,
# AVX2 or AVX-512, and XLA's optimisation level 0 or its default differ by 3e-7 at most here.
RTOL = 1e-4
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def train(method: str) -> dict[str, list[float]]:
  """Returns the metrics of each of the STEPS steps, and how far the average is behind."""
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


def relative_errors(now: list[float], golden: list[float]) -> np.ndarray:
  """Returns the error of each number of a series, relative to the largest golden one."""
  return np.abs(np.subtract(now, golden)) / np.abs(golden).max()


def compare(method: str, now: Mapping, golden: Mapping, rtol: float = RTOL) -> list[str]:
  """Returns a line for each series that differs, about the first step at which it does."""
  if now.keys() != golden.keys():
    gone, new = sorted(golden.keys() - now.keys()), sorted(now.keys() - golden.keys())
    return [f"{method}: metrics {gone} are gone, {new} are new"]
  lines = []
  for name, series in golden.items():
    error = relative_errors(now[name], series)
    wrong = np.flatnonzero(~(error <= rtol))  # NaN is wrong, too.
    if wrong.size:
      i = wrong[0]
      lines.append(
        f"{method}: {name} of step {i + 1} was {series[i]:.7g}, is {now[name][i]:.7g}: off by "
        f"{error[i]:.1e} (of {rtol:.0e} allowed), at most by {np.nanmax(error):.1e}"
      )
  return lines


def read() -> dict:
  """Reads the golden numbers, {"environment": {...}, "runs": {method: {metric: [values]}}}."""
  if not FILE.exists():
    raise FileNotFoundError(f"{FILE} is missing. Write it: bash run.sh tools.golden --write")
  return json.loads(FILE.read_text(encoding="utf-8"))


def _processor() -> str:
  """Names the machine's vector instructions, which decide how sums are rounded."""
  info = Path("/proc/cpuinfo")
  flags = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
  known = [name for name in ("avx", "avx2", "fma", "avx512f", "amx_tile") if name in flags]
  return " ".join([platform.machine(), *known])


def environment() -> dict:
  """Returns what may make the same program give other numbers."""
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
  for method, now in runs.items():
    series = golden["runs"].get(method, {})
    errors = [relative_errors(now[k], series[k]).max() for k in now.keys() & series.keys()]
    print(f"{method}: off by at most {max(errors, default=np.nan):.1e}, {RTOL:.0e} allowed")
  wrong = [line for m in RUNS for line in compare(m, runs[m], golden["runs"].get(m, {}))]
  if wrong:
    sys.exit(
      "\n".join([*wrong, f"golden: {golden['environment']}", f"now: {environment()}", ACCEPT])
    )


if __name__ == "__main__":
  main(sys.argv[1:])

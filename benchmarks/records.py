"""The JSON lines of benchmarks: what was measured, with when, where and on what."""

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping

PACKAGES = ("jax", "numpy", "scipy", "tensorflow")


def _versions() -> dict[str, str]:
  """Of the packages that this process has loaded."""
  return {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}


def _devices() -> dict:
  """What JAX computes on here, if this process has loaded it."""
  jax = sys.modules.get("jax")
  return {"device": jax.devices()[0].device_kind, "devices": jax.device_count()} if jax else {}


def append(args: argparse.Namespace, benchmark: str, row: Mapping) -> None:
  """Appends a row to the file `args.out`, if there is one, with the arguments and the machine."""
  if not args.out:
    return
  about = {
    "benchmark": benchmark,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "machine": platform.platform(),
    "cores": os.cpu_count(),
    "load": os.getloadavg()[0],
    **_devices(),
    **_versions(),
    **{name: value for name, value in vars(args).items() if name != "out"},
  }
  with open(args.out, "a", encoding="utf-8") as file:
    file.write(json.dumps({**about, **row}) + "\n")

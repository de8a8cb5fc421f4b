"""Measures Inception's speed, next to torch-fidelity's network where that is installed.

python -m benchmarks.inception --sizes 32 64 256 --batch 16 --out inception.jsonl

Both have the same random weights and give the same outputs from uint8 images: features for FID and
sFID, and logits. PyTorch's runs as it is published and in its faster layout, channels last. They
take turns in one process, each on all cores (or on the GPU), so that what else the machine does
disturbs all of them.
"""

import argparse
import copy
import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from umd.metrics.inception import BN_EPS, Inception


def to_torch(params) -> dict[str, np.ndarray]:
  """The inverse of `from_torch`: batch normalisations of mean 0 and deviation 1."""
  tensors = {"fc.bias": np.zeros(1008, np.float32)}
  for key, value in flatten_dict(jax.device_get(params), sep=".").items():
    layer, kind = key.rsplit(".", 1)
    if layer == "fc":
      tensors["fc.weight"] = value.T
    elif kind == "kernel":
      tensors[f"{layer}.conv.weight"] = value.transpose(3, 2, 0, 1)
    else:
      tensors[f"{layer}.bn.{'weight' if kind == 'scale' else 'bias'}"] = value
      tensors[f"{layer}.bn.running_mean"] = np.zeros_like(value)
      tensors[f"{layer}.bn.running_var"] = np.full_like(value, 1 - BN_EPS)
  return tensors


def ours(params) -> Callable:
  """uint8 [B, H, W, 3] -> outputs, by this repository's network."""
  network = Inception()
  apply = jax.jit(lambda p, x: network.apply({"params": p}, x.astype(jnp.float32)))
  return lambda images: jax.device_get(apply(params, images))


def load_torch(params):
  """torch-fidelity's network with these weights, or None where that or torch is not installed."""
  try:
    import torch

    # Only the network: the package's own __init__ imports all that it can do, and torchvision.
    package = types.ModuleType("torch_fidelity")
    package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
    sys.modules.setdefault("torch_fidelity", package)
    from torch_fidelity import feature_extractor_inceptionv3 as theirs
  except (ImportError, AttributeError):
    return None
  torch.set_num_threads(os.cpu_count())
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
  state = {key: torch.from_numpy(np.array(value)) for key, value in to_torch(params).items()}
  with tempfile.TemporaryDirectory() as folder:  # it takes weights from a file alone
    path = os.path.join(folder, "weights.pth")
    torch.save(state, path)
    network = theirs.FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], path)
  cuda = torch.cuda.is_available() and jax.default_backend() == "gpu"
  return network.to("cuda" if cuda else "cpu")


def torchs(network, channels_last: bool) -> Callable:
  """uint8 [B, H, W, 3] -> outputs, by PyTorch; the network is changed to the layout."""
  import torch

  layout = torch.channels_last if channels_last else torch.contiguous_format
  network = copy.deepcopy(network).to(memory_format=layout)
  device, spatial = network.fc.weight.device, []
  network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[-1][:, :7]))

  def run(images):
    spatial.clear()
    with torch.no_grad():
      images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
      pool, logits = network(images.contiguous(memory_format=layout))
      outputs = {"pool": pool, "spatial": spatial[0].permute(0, 2, 3, 1).flatten(1)}
    return {k: v.cpu().numpy() for k, v in (outputs | {"logits": logits}).items()}

  return run


def versions() -> dict[str, str]:
  found = {}
  for name in ("jax", "jaxlib", "flax", "torch", "torch-fidelity"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def measure(networks: dict[str, Callable], images: np.ndarray, repeats: int) -> dict[str, dict]:
  """Seconds of each network: the first call, and the least and the median of `repeats` more."""
  clock, first, times = time.perf_counter, {}, {name: [] for name in networks}
  for turn in range(repeats + 1):
    for name, run in networks.items():
      start = clock()
      run(images)
      if turn:
        times[name].append(clock() - start)
      else:
        first[name] = clock() - start
  return {
    name: {"first": first[name], "min": min(ts), "median": statistics.median(ts)}
    for name, ts in times.items()
  }


def report(size: int, batch: int, results: dict[str, dict]) -> None:
  """One row a network: images/s, and how many times as fast as it ours is."""
  for name, times in results.items():
    row = f"{size:>6}  {name:<28}"
    row += "".join(f"{batch / times[kind]:>8.1f}" for kind in ("min", "median"))
    row += "".join(f"{times[kind] / results['umd'][kind]:>8.2f}" for kind in ("min", "median"))
    print(f"{row}{times['first'] - times['min']:>8.1f}", flush=True)


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog="benchmarks.inception", description=__doc__.split("\n")[0])
  parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 256], help="pixels a side")
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", default="", help="file to which JSON lines are appended")
  args = parser.parse_args(argv)
  if min(args.batch, args.repeats) < 1 or min(args.sizes) < 2:
    sys.exit("error: --batch and --repeats must be at least 1, --sizes at least 2.")
  params = jax.jit(Inception().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  networks, theirs = {"umd": ours(params)}, load_torch(params)
  if theirs is None:
    print("torch and torch-fidelity are not both installed: measuring this repository's alone.")
  else:
    networks["torch-fidelity"] = torchs(theirs, False)
    networks["torch-fidelity, NHWC layout"] = torchs(theirs, True)
  device = jax.devices()[0].device_kind
  print(f"{device}, {os.cpu_count()} cores, batches of {args.batch}, {args.repeats} repeats")
  print(f"{'':>36}{'images/s':>16}{'umd is faster':>16}{'compile':>8}")
  heads = ["best", "median", "best", "median", "s"]
  print(f"pixels  {'network':<28}" + "".join(f"{head:>8}" for head in heads))
  for size in args.sizes:
    images = np.random.default_rng(size).integers(0, 256, (args.batch, size, size, 3), np.uint8)
    results = measure(networks, images, args.repeats)
    report(size, args.batch, results)
    if args.out:
      about = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
      about |= {"device": device, "cores": os.cpu_count(), "versions": versions()}
      about |= {"size": size, "batch": args.batch, "seconds": results}
      with open(args.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])

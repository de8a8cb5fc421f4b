"""Inception's speed, next to torch-fidelity's network where that is installed.

python -m benchmarks.inception --sizes 32 64 256 --batch 16 --out inception.jsonl

Both have the same random weights and give the same outputs from uint8 images: features for FID and
sFID, and logits. PyTorch's runs as it is published and in its faster layout, channels last, each on
all cores (or on the GPU).
"""

import argparse
import copy
import functools
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks import harness
from benchmarks.harness import Column
from tools.command_line import positive
from umd.metrics.inception import BN_EPS, Inception

COLUMNS = (
  Column("pixels", "size"),
  Column("network", "network", "{:>28}"),
  Column("images/s", "images_per_second", "{:.1f}"),
  Column("best", "images_per_second_best", "{:.1f}"),
  Column("umd faster", "umd_faster", "{:.2f}"),
)


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


def measure(args: argparse.Namespace) -> Iterator[dict]:
  """A row for every size and network."""
  params = jax.jit(Inception().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  networks, theirs = {"umd": ours(params)}, load_torch(params)
  if theirs is None:
    print("torch and torch-fidelity are not both installed: measuring this repository's alone.")
  else:
    networks["torch-fidelity"] = torchs(theirs, False)
    networks["torch-fidelity, NHWC layout"] = torchs(theirs, True)
  for size in args.sizes:
    images = np.random.default_rng(size).integers(0, 256, (args.batch, size, size, 3), np.uint8)
    calls = {name: functools.partial(run, images) for name, run in networks.items()}
    times = harness.in_turns(calls, args.repeats)
    for name, own in times.items():
      yield {
        "size": size,
        "network": name,
        "images_per_second": args.batch / own.median,
        "images_per_second_best": args.batch / own.best,
        "umd_faster": times["umd"].faster_than(own)[0],
      }


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("inception", __doc__)
  parser.add_argument("--sizes", nargs="+", type=positive, default=[32, 64, 256], help="pixels")
  parser.add_argument("--batch", type=positive, default=16)
  harness.main(parser, COLUMNS, measure, argv)


if __name__ == "__main__":
  main()

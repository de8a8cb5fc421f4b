"""The line that says which model a page shows."""

import math
import os

import jax
import numpy as np

from umd.runs import workdir
from umd.runs.writers import read_jsonl
from umd.serve.session import config_of
from umd.trained.model import Pretrained

METRICS = 4  # At most.


def metrics(folder: str) -> list[tuple[str, float]]:
  """The run's first numbers: of its summary, or the newest ones if it was not finished."""
  if summary := workdir.finished(folder):
    names = [name for name in summary["headline"] if name in summary["metrics"]]
    return [(name, summary["metrics"][name]) for name in names[:METRICS]]
  found = {}
  for record in read_jsonl(workdir.join(folder, "metrics.jsonl")):
    found |= {k: v for k, v in record.items() if "/" in k and isinstance(v, (int, float))}
  return list(found.items())[:METRICS]


def parameters(model: Pretrained) -> int:
  """How many the network has, without a codec's."""
  network = model.description.inference().model
  blank = np.zeros((1, *network.image_size), np.float32), np.zeros(1, np.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), *blank)["params"]
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def short(name: str) -> str:
  """The name of data or a VAE, without the folders of this machine that lead there."""
  kind, colon, path = name.rpartition(":") if ":" in name else ("", "", name)
  return f"{kind}{colon}{os.path.basename(path.rstrip('/'))}" if os.path.isabs(path) else name


def line(model: Pretrained) -> str:
  """Markdown: run, step, size, data and metrics."""
  folder, about = model.folder.rstrip("/"), model.description
  config, (height, width, channels) = config_of(folder), model.image_size
  vae = f" through the VAE {short(about.latents['vae'])}" if about.latents else ""
  facts = [
    f"**{'/'.join(folder.split('/')[-2:])}**, step {model.step}, {model.weights} weights",
    f"{about.model['variant']}, {parameters(model) / 1e6:.2g} M parameters",
    f"{height} x {width} x {channels} px{vae}",
    f"{model.num_classes} classes" if model.num_classes else "no labels",
  ]
  if config:
    facts.append(f"trained on {short(config['data']['name'])}, {config['data']['split']}")
  facts += [f"{name} {value:.3g}" for name, value in metrics(folder)]
  return " · ".join(facts)


# One model: of all that is asked of it one thing at a time is done, and the others queue.

"""Measures images against a reference: FID, sFID, Inception score, precision, recall and KID.

bash run.sh tools.evaluate_samples samples.npz VIRTUAL_imagenet256_labeled.npz --out results.json

SAMPLES is a folder of images, or an npz file with `arr_0` (uint8 [n, H, W, 3]), as ADM's scripts
write it. REFERENCE is a file of statistics (tools.fid_reference's, ADM's, pytorch-fid's), or images
as well. As with ADM's evaluator, moments that are in a file are used as they are; precision, recall
and KID, which need single images, use those in the file.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.

from tools.command_line import run
from tools.fid_reference import (
  NOTHING_ELSE,
  add_arguments,
  check_out,
  fitting,
  images_in,
  statistics_file,
)
from umd.data import Source
from umd.data.sources import open_images
from umd.devices import distributed
from umd.devices.mesh import make_mesh
from umd.metrics import features as extraction
from umd.metrics import statistics
from umd.metrics.statistics import METRICS, Statistics
from umd.runs import workdir
from umd.runs.progress import say

KEEP = 50_000  # Images of each side, at most, of which precision, recall and KID compare features.
PAPERS = 50_000  # Samples that papers evaluate.
SUBSET = 1000  # Images in a subset of KID.
SCORES = ("is", "is_shuffled")  # Metrics that look at the samples alone, one by one.
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "tensorflow", "tensorflow-cpu")


@dataclasses.dataclass(frozen=True)
class Side:
  """Samples or reference, before Inception looks at them.

  Attributes:
    path: the path as given.
    stored: the statistics, if that is what the file holds.
    images: the images, if there are any.
  """

  path: str
  stored: Statistics | None
  images: Source | None

  @property
  def count(self) -> int:
    """The number of images that the moments are of, 0 if the file does not say."""
    return self.stored.count if self.stored else len(self.images)

  @property
  def features(self) -> int:
    """The number of images whose features can be had."""
    if self.stored and self.stored.features is not None:
      return len(self.stored.features)
    return min(KEEP, len(self.images)) if self.images else 0

  def number(self, metric: str) -> int:
    """Returns how many images a metric looks at."""
    if metric in SCORES:
      return len(self.images) if self.images else 0
    return self.features if "features" in METRICS[metric].needs else self.count

  def lacks(self, metric: str) -> str:
    """Says why a metric cannot be measured, "" if it can."""
    needs, number = METRICS[metric].needs, self.number(metric)
    if "spatial" in needs and self.stored and self.stored.spatial is None:
      return f"{self.path} has no spatial statistics (mu_s, sigma_s)"
    if (metric in SCORES or "features" in needs) and not number:
      return f"{self.path} has no images"
    if 0 < number < (least := METRICS[metric].least):
      return f"it takes {least} images, and {self.path} has {number}"
    return ""

  def describe(self) -> str:
    """Says in a line what there is."""
    contents = []
    if self.stored:
      contents.append(f"statistics of {self.count or 'an unknown number of'} images")
    if self.images:
      size = " x ".join(str(side) for side in self.images.image_size)
      contents.append(f"{len(self.images)} images, {size}")
    return f"{self.path}: {'; '.join(contents)}"

  def record(self) -> dict:
    """Returns what the JSON file says of this side."""
    size = list(self.images.image_size) if self.images else None
    return {"path": self.path, "count": self.count or None, "size": size}


def open_side(path: str, size: int | None, data_dir: str) -> Side:
  """Looks at what is there, but runs nothing.

  Raises:
    FileNotFoundError, ValueError: there is no such path, or it cannot be measured.
  """
  file = statistics_file(path)
  if file is None:
    return Side(path, None, open_images(path, size, data_dir))
  return Side(path, statistics.read(file), open_images(f"npz:{file}") if images_in(file) else None)


def choose(
  samples: Side, reference: Side, wanted: Sequence[str] | None
) -> tuple[list[str], dict[str, str]]:
  """Returns (metrics, {metric that is left out: why}).

  Raises:
    ValueError: one of the metrics that are wanted cannot be measured.
  """
  why = {}
  for metric in wanted or METRICS:
    why[metric] = samples.lacks(metric) or ("" if metric in SCORES else reference.lacks(metric))
  left_out = {metric: reason for metric, reason in why.items() if reason}
  if wanted and left_out:
    reasons = "; ".join(f"{metric}: {reason}" for metric, reason in left_out.items())
    raise ValueError(f"--metrics: {reasons}. Leave it out, or give a reference of images.")
  return [metric for metric in why if metric not in left_out], left_out


class Eye:
  """Inception, loaded when it is first needed: statistics alone can be compared without."""

  def __init__(self, weights: str, batch_size: int):
    self._weights, self._batch_size = weights, batch_size
    self._mesh = make_mesh()
    self._network = None

  def measure(self, side: Side, metrics: Sequence[str], is_samples: bool) -> Statistics:
    """Returns the statistics of a side with all that the metrics need of it."""
    features = any("features" in METRICS[metric].needs for metric in metrics)
    scores = is_samples and any(metric in SCORES for metric in metrics)
    stored = side.stored
    if stored and not scores and (stored.features is not None or not features):
      return stored
    if self._network is None:
      file = extraction.find_network(self._weights)
      self._network = extraction.load_network(file, self._mesh)
    size = fitting(self._batch_size, len(side.images), self._mesh)
    seen = extraction.describe(
      side.images, self._network, self._mesh, size, keep=KEEP if features else 0, scores=scores
    )
    if not stored:
      return seen
    # As with ADM's evaluator, the moments of the file go before those of the images in it.
    statistics.check_weights(stored, seen.inception)
    features = seen.features if stored.features is None else stored.features
    return dataclasses.replace(stored, features=features, scores=seen.scores)

  @property
  def sha256(self) -> str:
    """The SHA-256 of the weights, "" if they were not needed."""
    return self._network.sha256 if self._network else ""


def remarks(samples: Side, reference: Side, metrics: Sequence[str]) -> list[str]:
  """Lists what to bear in mind about the numbers."""
  notes = []
  counts = {"samples": samples.count, "reference images": reference.count}
  if few := [f"{n} {what}" for what, n in counts.items() if 0 < n < statistics.FEW]:
    notes.append(
      f"warning: {' and '.join(few)} are fewer than Inception's {statistics.FEW} features: the "
      "covariance is singular and FID far too high. Compare it with FIDs of as many only."
    )
  if statistics.FEW <= samples.count < PAPERS:
    notes.append(
      f"note: papers report FID of {PAPERS} samples; of {samples.count} it is somewhat higher."
    )
  smaller = min(samples.features, reference.features)
  if "kid" in metrics and smaller < SUBSET:
    notes.append(f"note: KID is over subsets of {smaller} images, where {SUBSET} are usual.")
  for side in (samples, reference) if "precision_recall" in metrics else ():
    if side.images and side.features == KEEP < len(side.images):
      notes.append(f"note: precision, recall and KID look at {KEEP} images of {side.path} only.")
  sizes = [side.images.image_size[:2] for side in (samples, reference) if side.images]
  if len(set(sizes)) > 1:
    notes.append(
      "note: samples are {} x {}, reference images {} x {}; Inception resizes both to 299 x 299, "
      "but the smaller ones lack detail.".format(*sizes[0], *sizes[1])
    )
  stored = reference.stored
  if stored and not (stored.spatial or stored.count or stored.inception or reference.images):
    notes.append(NOTHING_ELSE)
  return notes


def versions() -> dict[str, str]:
  """Returns the versions of the packages that the numbers depend on."""
  installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
  return {name: installed[name] for name in PACKAGES if name in installed}


def evaluate(args: argparse.Namespace) -> None:
  """Measures, prints and writes."""
  if args.out:
    check_out(args.out)
  samples, reference = (open_side(p, args.size, args.data_dir) for p in (args.samples, args.ref))
  metrics, left_out = choose(samples, reference, args.metrics)
  say(f"samples    {samples.describe()}\nreference  {reference.describe()}")
  eye = Eye(args.weights, args.batch_size)
  pair = [eye.measure(side, metrics, side is samples) for side in (samples, reference)]
  values = {}
  for metric in metrics:
    number = samples.number(metric)
    suffix = f"_{statistics.label(number)}" if number else ""
    for name, value in statistics.compare(*pair, [metric]).items():
      values[name + suffix] = value
  sha256 = eye.sha256 or pair[0].inception or pair[1].inception
  resized = args.size and not (samples.stored and reference.stored)
  quantized = "rounded to uint8 after resizing" if resized else "uint8 as stored"
  say(f"Inception  {sha256[:12] or 'unknown, not needed here'}; images {quantized}\n")
  width = max(map(len, values), default=0)
  for name, value in values.items():
    say(f"{name:{width}s}  {value:12.6g}")
  notes = remarks(samples, reference, metrics)
  notes += [f"left out: {metric}: {reason}" for metric, reason in left_out.items()]
  say("\n" + "\n".join(notes) if notes else "")
  if args.out and distributed.is_main():
    record = {
      "metrics": values,
      "samples": samples.record(),
      "reference": reference.record(),
      "inception": sha256,
      "quantize": quantized,
      "notes": notes,
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "versions": versions(),
    }
    workdir.write_json(os.path.abspath(os.path.expanduser(args.out)), record)
    say(args.out)


def main(argv: list[str]) -> None:
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("tools.evaluate_samples", None, __doc__, formatter_class=text)
  parser.add_argument("samples", metavar="SAMPLES")
  parser.add_argument("ref", metavar="REFERENCE")
  parser.add_argument("--out", metavar="FILE", help="JSON file to be written")
  parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that can be had")
  add_arguments(parser)
  args = parser.parse_args(argv)
  run(lambda: evaluate(args), args)


if __name__ == "__main__":
  main(sys.argv[1:])

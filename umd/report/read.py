"""Reads the workdir of a run for its report.

The run that failed is the one whose report is wanted most, so no file needs to be there, and a file
that is damaged becomes a line in `Run.problems` instead of an error.
"""

import base64
import dataclasses
import datetime
import fnmatch
import io
import os
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from umd.runs import lock, workdir
from umd.runs.writers import read_jsonl

STAGES, DEFAULTS = "stages.json", "default_config.json"
RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
NOT_STARTED = "not started"

# A page must stay a file that can be sent to somebody, however long the run is.
POINTS = 2000  # of a curve; a screen has no more pixels
STEPS_OF_PICTURES = 12  # for each kind of picture
PICTURES = 48  # of all kinds
PICTURE_BYTES = 250_000  # Larger files are shrunk to SIDE pixels and compressed with loss.
SIDE = 1200
PICTURE_FILE = re.compile(r"(?P<name>.+)_(?P<step>\d{8,})\.png")

# Which values of a metric are better. A metric is a path "a/b/c"; the last row counts that has a
# pattern for any part of it. Other metrics have no direction.
DIRECTIONS = (
  (min, ("loss*", "*mse*", "*frechet*", "fid_*", "sfid_*", "kid_*", "*error*")),
  (max, ("*accuracy*", "agreement", "top[15]", "*shot*", "*knn*", "is_*", "score*", "select")),
  (max, ("precision*", "recall*", "images_per_second", "teraflops_per_second", "mfu")),
  (None, ("*_std", "*_std_*", "lr", "*_floor", "*_ceiling", "*_test")),
)


class Series(NamedTuple):
  """A metric over time: steps int64 [n], ascending, and values float64 [n], which may be NaN."""

  steps: np.ndarray
  values: np.ndarray

  @property
  def last(self) -> float:
    return float(self.values[-1])

  def at(self, step: int) -> float | None:
    """Returns the value at a step, None if there is none."""
    values = self.values[self.steps == step]
    return float(values[0]) if len(values) else None


class Picture(NamedTuple):
  """A picture that is part of a page: its size in pixels and its contents as a "data:" address."""

  width: int
  height: int
  address: str


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, as far as its workdir can be read.

  Attributes:
    folder: The workdir.
    name: The workdir's own name.
    label: The name, with that of the folder above in front if the run is one of its stages.
    state: RUNNING, FINISHED, INTERRUPTED, FAILED or NOT_STARTED.
    note: Why the run is in that state, "" if there is nothing to say.
    step: The newest step.
    steps: The last step that the run is to take, None if it is not known.
    config: The config that the run was last started with.
    default: What the config's file says without arguments and flags, None if it is not known.
    environment: Versions, devices and the command.
    metrics: {name: series}.
    words: {name: {step: text}} of logged values that are no numbers.
    headline: Names of the metrics that the config's `summary` selects, in its order.
    pictures: {name: {step: picture}}.
    checkpoints: The steps of the checkpoints that are kept.
    seconds: {activity: wall time}, see `umd.runs.goodput`.
    changes: Changes of the config between two starts, as [{time, key, old, new}].
    bad_data: {file: lines} about examples that could not be read.
    problems: What could not be read, in words.
    time: When all this was read.
  """

  folder: str
  name: str
  label: str
  state: str
  note: str
  step: int
  steps: int | None
  config: dict
  default: dict | None
  environment: dict
  metrics: dict[str, Series]
  words: dict[str, dict[int, str]]
  headline: list[str]
  pictures: dict[str, dict[int, Picture]]
  checkpoints: list[int]
  seconds: dict[str, float]
  changes: list[dict]
  bad_data: dict[str, list[str]]
  problems: list[str]
  time: str

  def evaluator(self, name: str) -> str:
    """Returns the type of the evaluator that logged a metric or picture, "" if it is not known."""
    return str(section(section(self.config, "evals"), name.partition("/")[0]).get("type", ""))

  def direction(self, name: str) -> Callable | None:
    """Returns `min` or `max`, whichever values of a metric are better, or None."""
    return direction(name, str(section(self.config, "checkpoint").get("best", "")))


def section(config: Mapping, name: str) -> dict:
  """Returns a section of a config that may be damaged; {} if there is no such section."""
  value = config.get(name)
  return value if isinstance(value, dict) else {}


def direction(name: str, best: str = "") -> Callable | None:
  """Returns `min` or `max`, whichever values of a metric are better, or None if that is not known.

  Args:
    name: The metric.
    best: "min:NAME" or "max:NAME", which decides for that metric (the config's `checkpoint.best`).
  """
  mode, _, metric = best.partition(":")
  if metric == name and mode in ("min", "max"):
    return {"min": min, "max": max}[mode]
  better = None
  for function, patterns in DIRECTIONS:
    if any(fnmatch.fnmatchcase(part, p) for part in name.split("/") for p in patterns):
      better = function
  return better


def best_step(series: Series, better: Callable | None) -> int | None:
  """Returns the first step with the best finite value; None if all are equal, or better is None."""
  finite = np.isfinite(series.values)
  values = series.values[finite]
  if better is None or len(values) < 2 or values.min() == values.max():
    return None
  index = values.argmin() if better is min else values.argmax()
  return int(series.steps[finite][index])


def deviation(name: str, metrics) -> str:
  """Returns the metric that is the deviation of `name`, "" if there is none.

  It is "a_std" for "a_mean", and "is_std_10k" for "is_10k".
  """
  head, slash, last = name.rpartition("/")
  kind, _, number = last.rpartition("_")
  for guess in (f"{last.removesuffix('_mean')}_std", f"{kind}_std_{number}"):
    if guess != last and f"{head}{slash}{guess}" in metrics:
      return f"{head}{slash}{guess}"
  return ""


def thin(series: Series) -> Series:
  """Returns a series of about POINTS points that looks the same when it is drawn.

  Of each of POINTS / 2 stretches it keeps the minimum and the maximum, and one value that is not
  finite, so that neither peaks nor gaps get lost.
  """
  n = len(series.steps)
  if n <= POINTS:
    return series
  kept = {0, n - 1}
  for stretch in np.array_split(np.arange(n), POINTS // 2):
    values = series.values[stretch]
    finite = np.isfinite(values)
    if finite.any():
      inside = stretch[finite]
      kept |= {int(inside[values[finite].argmin()]), int(inside[values[finite].argmax()])}
    if not finite.all():
      kept.add(int(stretch[~finite][0]))
  chosen = np.array(sorted(kept))
  return Series(series.steps[chosen], series.values[chosen])


def means(series: Series) -> Series:
  """Returns means over stretches of steps: extremes, as `thin` keeps them, must not be smoothed."""
  finite = np.isfinite(series.values)
  steps, values = series.steps[finite], series.values[finite]
  if len(steps) <= POINTS // 4:
    return Series(steps, values)
  stretches = np.array_split(np.arange(len(steps)), POINTS // 4)
  return Series(
    np.array([steps[s][-1] for s in stretches]), np.array([values[s].mean() for s in stretches])
  )


def spread(items: Sequence, most: int) -> list:
  """Returns at most `most` of the items, evenly spaced, the first and the last among them."""
  places = np.linspace(0, len(items) - 1, min(most, len(items)))
  return [items[i] for i in np.round(places).astype(int)]


def encode(contents: bytes) -> Picture:
  """Returns the picture in a PNG file; a large file is shrunk and compressed with loss.

  Raises:
    OSError: The file is damaged.
  """
  from PIL import Image

  image, kind = Image.open(io.BytesIO(contents)), "png"
  image.load()
  if len(contents) > PICTURE_BYTES:
    image, file, kind = image.convert("RGB"), io.BytesIO(), "webp"
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(file, "webp", quality=85)
    contents = file.getvalue()
  return Picture(*image.size, f"data:image/{kind};base64,{base64.b64encode(contents).decode()}")


def _picture_files(folder: str, prefix: str = "") -> dict[str, dict[int, str]]:
  """Returns {name: {step: path}} of the pictures below a folder."""
  files = {}
  for entry in workdir.names(folder):
    path = workdir.join(folder, entry)
    if match := PICTURE_FILE.fullmatch(entry):
      files.setdefault(prefix + match["name"], {})[int(match["step"])] = path
    elif "." not in entry:
      files |= _picture_files(path, f"{prefix}{entry}/")
  return {name: dict(sorted(files[name].items())) for name in sorted(files)}


class _Reader:
  """Reads files of a workdir and writes down what is wrong with them."""

  def __init__(self, folder: str):
    self.folder, self.problems = folder, []

  def attempt(self, name: str, read: Callable, empty: Any):
    """Returns what `read(path)` returns; `empty` if that is None or fails."""
    try:
      value = read(workdir.join(self.folder, name))
    except Exception as error:  # A damaged file, a missing permission, a bucket out of reach.
      self.problems.append(f"{name}: {error}")
      return empty
    return empty if value is None else value

  def json(self, name: str) -> dict:
    value = self.attempt(name, workdir.read_json, {})
    if isinstance(value, dict):
      return value
    self.problems.append(f"{name}: it holds no JSON object")
    return {}

  def jsonl(self, name: str) -> list[dict]:
    return [record for record in self.attempt(name, read_jsonl, []) if isinstance(record, dict)]

  def names(self, name: str) -> list[str]:
    return self.attempt(name, workdir.names, [])

  def lines(self, name: str) -> list[str]:
    return self.attempt(name, workdir.read_bytes, b"").decode(errors="replace").splitlines()

  def pictures(self, cache: MutableMapping[str, Picture]) -> dict[str, dict[int, Picture]]:
    files = self.attempt("images", _picture_files, {})
    most = min(STEPS_OF_PICTURES, max(2, PICTURES // max(1, len(files))))
    pictures = {}
    for name, paths in files.items():
      for step in spread(list(paths), most):
        path = paths[step]
        if path not in cache:
          try:
            cache[path] = encode(workdir.read_bytes(path) or b"")
          except Exception as error:  # PIL has many kinds of errors for damaged files.
            self.problems.append(f"{path}: {error}")
            continue
        pictures.setdefault(name, {})[step] = cache[path]
    return pictures


def _split(records: list[dict]) -> tuple[dict[str, Series], dict[str, dict[int, str]]]:
  """Sorts the records of metrics.jsonl into (numbers, words) by name.

  A run that resumed may have logged a step twice: the later value counts.
  """
  numbers, words = {}, {}
  for record in records:
    step = record.pop("step", None)
    for name, value in record.items() if type(step) is int else ():
      if type(value) in (int, float):
        numbers.setdefault(name, {})[step] = value
      elif isinstance(value, str):
        words.setdefault(name, {})[step] = value
  metrics = {}
  for name, values in numbers.items():
    steps = sorted(values)
    metrics[name] = Series(np.array(steps, np.int64), np.array([values[s] for s in steps], float))
  return metrics, words


def absolute(path: str) -> str:
  """Returns the absolute path of a folder, or its gs:// address."""
  return path.rstrip("/") if workdir.scheme(path) else os.path.abspath(path)


def stages(folder: str) -> list[str]:
  """Returns the names of the stages below a folder, in order; [] for that of one run."""
  return list(_Reader(folder).json(STAGES).get("stages", []))


def add_stages(folder: str, names: list[str]) -> None:
  """Writes down that a folder holds these stages, beside those that were written down before."""
  names = list(dict.fromkeys([*stages(folder), *names]))
  workdir.write_json(workdir.join(folder, STAGES), {"stages": names})


def is_stage(folder: str) -> bool:
  """Returns whether the folder above names this one as one of its stages."""
  top, name = os.path.split(absolute(folder))
  return name in stages(top)


def exists(folder: str) -> bool:
  """Returns whether there is something to report: a config or metrics."""
  files = ("config.json", "metrics.jsonl")
  return any(workdir.exists(workdir.join(folder, name)) for name in files)


def _state(reader: _Reader, config: dict, summary: dict) -> str:
  evaluated = config.get("trainer") == "evaluate" and "evaluations.jsonl" in reader.names("")
  if summary or evaluated:
    return FINISHED
  if not config:
    return NOT_STARTED
  return RUNNING if reader.attempt("", lock.is_held, False) else INTERRUPTED


def _headline(config: dict, names) -> list[str]:
  """Returns the metrics that the config's `summary` selects; all of them for an evaluation."""
  patterns = config.get("summary") if config.get("trainer") != "evaluate" else ["*"]
  patterns = patterns if isinstance(patterns, list) else []
  return list(dict.fromkeys(n for p in patterns for n in fnmatch.filter(names, str(p))))


def read_run(
  folder: str,
  *,
  state: str = "",
  note: str = "",
  steps: int | None = None,
  cache: MutableMapping[str, Picture] | None = None,
) -> Run:
  """Reads a run.

  Args:
    folder: The workdir.
    state: The state of the run if the caller knows it; "" to find out.
    note: Why it is in that state.
    steps: The last step if the caller knows it.
    cache: Pictures that were read before, by path; new ones are added.
  """
  reader = _Reader(folder)
  config, summary = reader.json("config.json"), reader.json("summary.json")
  goodput = reader.json("goodput.json")
  seconds = {"productive": goodput.get("productive"), **section(goodput, "seconds")}
  metrics, words = _split(reader.jsonl("metrics.jsonl"))
  newest = max((int(series.steps[-1]) for series in metrics.values()), default=0)
  last = summary["step"] if type(summary.get("step")) is int else None
  planned = config["steps"] if type(config.get("steps")) is int else None
  top, name = os.path.split(absolute(folder))
  return Run(
    folder=absolute(folder),
    name=name,
    label=f"{os.path.basename(top)}/{name}" if is_stage(folder) else name,
    state=state or _state(reader, config, summary),
    note=note,
    step=newest if last is None else last,
    steps=steps or last or planned,
    config=config,
    default=reader.json(DEFAULTS) or None,
    environment=reader.json("environment.json"),
    metrics=metrics,
    words=words,
    headline=_headline(config, metrics),
    pictures=reader.pictures({} if cache is None else cache),
    checkpoints=sorted(int(step) for step in reader.names("checkpoints") if step.isdigit()),
    seconds={k: float(s) for k, s in seconds.items() if isinstance(s, (int, float))},
    changes=reader.jsonl("config_changes.jsonl"),
    bad_data={n: reader.lines(n) for n in reader.names("") if n.endswith("bad_data.txt")},
    problems=reader.problems,
    time=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
  )

"""What a workdir holds, as far as it can be read: a report of a broken run is wanted most."""

import base64
import dataclasses
import datetime
import fnmatch
import io
import os
import re
import struct
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import numpy as np

from umd.runs import lock, writers
from umd.runs import workdir as folder

NAME = re.compile(r"(?P<name>.+)_(?P<step>\d{8,})\.png")
FRAMES = (12, 8, 5, 3, 2, 1)  # Steps of a kind of picture; fewer where they are too large.
BYTES = 6_000_000  # of all pictures of a page, about
AS_IS = 250_000  # Bytes; larger files are compressed with loss,
SIDE = 1200  # and shrunk to so many pixels.
SIGNATURE, END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Picture(NamedTuple):
  """A picture in a page: width and height in pixels, and its contents as an address "data:..."."""

  width: int
  height: int
  address: str


def encode(contents: bytes) -> Picture:
  """A PNG file for a page; a large one is shrunk.

  Raises:
    ValueError: it is no PNG file, or not whole.
  """
  if not contents.startswith(SIGNATURE) or not contents.endswith(END):
    raise ValueError("it is no PNG file, or not whole")
  width, height = struct.unpack(">II", contents[16:24])
  kind = "png"
  if len(contents) > AS_IS:
    from PIL import Image

    image = Image.open(io.BytesIO(contents)).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out, kind = io.BytesIO(), "webp"
    image.save(out, "webp", quality=85)
    contents, (width, height) = out.getvalue(), image.size
  return Picture(width, height, f"data:image/{kind};base64,{base64.b64encode(contents).decode()}")


def find(workdir: str) -> dict[str, dict[int, str]]:
  """{name: {step: path}} of what is in images/."""
  found, to_look = {}, [""]
  while to_look:
    inside = to_look.pop()
    for entry in folder.names(folder.join(workdir, "images", inside)):
      path = f"{inside}{entry}"
      if match := NAME.fullmatch(path):
        of_name = found.setdefault(match["name"], {})
        of_name[int(match["step"])] = folder.join(workdir, "images", path)
      elif "." not in entry:
        to_look.append(f"{path}/")
  return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def load(
  paths: Mapping[str, Mapping[int, str]], known: MutableMapping[str, Picture], problems: list[str]
) -> dict[str, dict[int, Picture]]:
  """{name: {step: picture}}, spread over the steps, as many as fit into a page.

  Args:
    paths: {name: {step: path}}.
    known: pictures read before, by their paths; new ones are added.
    problems: what cannot be read is added.
  """
  broken = set()

  def picture(path):
    if path not in known and path not in broken:
      try:
        known[path] = encode(folder.read_bytes(path) or b"")
      except Exception as error:  # Whatever the file or the decoder comes up with.
        broken.add(path)
        problems.append(f"{path}: {error}")
    return known.get(path)

  for most in FRAMES:
    chosen = {
      name: {step: picture(steps[step]) for step in spread(list(steps), most)}
      for name, steps in paths.items()
    }
    total = sum(len(p.address) for steps in chosen.values() for p in steps.values() if p)
    if total <= BYTES:
      break
  return {name: {s: p for s, p in steps.items() if p} for name, steps in chosen.items()}


POINTS = 2000  # A line has so many at most: more than a screen has pixels for.

# What is better: the last that fits any part of a name "a/b/c" counts. Others have no direction.
DIRECTIONS = (
  (min, ("loss*", "*mse*", "*frechet*", "fid_*", "sfid_*", "kid_*", "*error*")),
  (max, ("*accuracy*", "agreement", "top[15]", "*shot*", "*knn*", "is_*", "score*", "select")),
  (max, ("precision*", "recall*", "images_per_second", "teraflops_per_second", "mfu")),
  (None, ("*_std", "*_std_*", "lr", "*_floor", "*_ceiling", "*_test")),
)


class Series(NamedTuple):
  """A metric: steps int64 [n], ascending, and values float64 [n], which need not be finite."""

  steps: np.ndarray
  values: np.ndarray


def make(points: dict[int, float]) -> Series:
  """From {step: value}."""
  steps = sorted(points)
  return Series(np.array(steps, np.int64), np.array([points[s] for s in steps], np.float64))


def thin(series: Series, most: int = POINTS) -> Series:
  """At most about `most` points, among them the first, the last and the extremes of every stretch.

  Of a stretch with values that are not finite one of these stays, too: the line keeps its gap.
  """
  n = len(series.steps)
  if n <= most:
    return series
  kept = {0, n - 1}
  for stretch in np.array_split(np.arange(n), max(1, most // 2)):
    values = series.values[stretch]
    finite = np.isfinite(values)
    if finite.any():
      inside = stretch[finite]
      kept |= {int(inside[values[finite].argmin()]), int(inside[values[finite].argmax()])}
    if not finite.all():
      kept.add(int(stretch[~finite][0]))
  chosen = np.array(sorted(kept))
  return Series(series.steps[chosen], series.values[chosen])


def means(series: Series, most: int = POINTS // 4) -> Series:
  """Means over stretches of steps, which is what may be smoothed: extremes are not typical."""
  finite = np.isfinite(series.values)
  steps, values = series.steps[finite], series.values[finite]
  if len(steps) <= most:
    return Series(steps, values)
  stretches = np.array_split(np.arange(len(steps)), most)
  return Series(
    np.array([steps[s][-1] for s in stretches]), np.array([values[s].mean() for s in stretches])
  )


def direction(name: str, chosen: str = ""):
  """Which values of a metric are better: `min`, `max`, or None where that cannot be said.

  Args:
    name: of the metric.
    chosen: "min:NAME" or "max:NAME", which says it for that metric (`checkpoint.best`).
  """
  mode, _, metric = chosen.partition(":")
  if metric == name and mode in ("min", "max"):
    return {"min": min, "max": max}[mode]
  found = None
  for function, patterns in DIRECTIONS:
    if any(fnmatch.fnmatchcase(part, p) for part in name.split("/") for p in patterns):
      found = function
  return found


def best_step(series: Series, better) -> int | None:
  """The first step with the best value; None where there is no choice or no direction."""
  finite = np.isfinite(series.values)
  values = series.values[finite]
  if better is None or len(values) < 2 or values.min() == values.max():
    return None
  index = values.argmin() if better is min else values.argmax()
  return int(series.steps[finite][index])


def spread(items: list, most: int) -> list:
  """At most `most` of the items, evenly, the first and the last among them."""
  if len(items) <= most:
    return list(items)
  chosen = np.unique(np.round(np.linspace(0, len(items) - 1, most)).astype(int))
  return [items[i] for i in chosen]


STAGES, DEFAULTS = "stages.json", "default_config.json"
RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
NOT_STARTED = "not started"


@dataclasses.dataclass(frozen=True)
class Run:
  """A run.

  Attributes:
    folder: its workdir.
    name: of the stage or run.
    label: the same, with the folder of all stages in front if there is one.
    state: RUNNING, FINISHED, INTERRUPTED, FAILED or NOT_STARTED.
    note: why it is in that state, "" if there is nothing to say.
    step, steps: how far it has come, and its last step if that is known.
    config: as it was started.
    default: what the config's file says by itself, None if that was not written down.
    environment: versions, devices, command.
    metrics: {name: numbers over steps}.
    words: {name: {step: text}}.
    headline: names of the metrics that the config's `summary` asks for, in its order.
    pictures: {name: {step: picture}}.
    checkpoints: steps.
    seconds: {what for: wall time}, of `umd.runs.goodput`.
    changes: [{time, key, old, new}] of the config between starts.
    bad_data: {file: lines}.
    problems: what could not be read.
    time: when it was read.
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
  writers: dict[str, Series]
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
    """The type of the evaluator that a metric or picture is of, "" if that is not known."""
    return str(section(section(self.config, "evals"), name.partition("/")[0]).get("type", ""))


def section(config: dict, name: str) -> dict:
  """A section of a config, which may be anybody's; {} if it is none."""
  found = config.get(name)
  return found if isinstance(found, dict) else {}


class _Reader:
  """Reads files of a folder; what is wrong with them it keeps."""

  def __init__(self, workdir: str):
    self.workdir, self.problems = workdir, []

  def attempt(self, read, name: str, empty):
    try:
      found = read(folder.join(self.workdir, name))
    except Exception as error:  # A damaged file, no permission, a bucket that is away.
      self.problems.append(f"{name}: {error}")
      return empty
    return empty if found is None else found

  def json(self, name: str) -> dict:
    found = self.attempt(folder.read_json, name, {})
    if isinstance(found, dict):
      return found
    self.problems.append(f"{name}: holds no JSON object")
    return {}

  def jsonl(self, name: str) -> list[dict]:
    return [r for r in self.attempt(writers.read_jsonl, name, []) if isinstance(r, dict)]

  def names(self, name: str) -> list[str]:
    return self.attempt(folder.names, name, [])


def split(records: list[dict]) -> tuple[dict[str, Series], dict[str, dict[int, str]]]:
  """(numbers, words) by name, from lines of metrics.jsonl; of a step's values the last counts."""
  numbers, words = {}, {}
  for record in records:
    step = record.get("step")
    for name, value in record.items() if type(step) is int else ():
      if name == "step" or isinstance(value, bool):
        continue
      kind = numbers if isinstance(value, (int, float)) else words
      if kind is numbers or isinstance(value, str):
        kind.setdefault(name, {})[step] = value
  return {name: make(points) for name, points in numbers.items()}, words


def stages(workdir: str) -> list[str]:
  """Names of the stages in a folder of several, in their order; none for the folder of one run."""
  return list(_Reader(workdir).json(STAGES).get("stages", []))


def add_stages(workdir: str, names: list[str]) -> None:
  """Notes that a folder holds these stages, beside those noted earlier."""
  folder.write_json(
    folder.join(workdir, STAGES), {"stages": list(dict.fromkeys([*stages(workdir), *names]))}
  )


def exists(workdir: str) -> bool:
  """Whether there is something to report: a config or metrics."""
  return any(folder.exists(folder.join(workdir, name)) for name in ("config.json", "metrics.jsonl"))


def whole(path: str) -> str:
  """A path with its folders' names, without a "/" at its end."""
  return path.rstrip("/") if folder.scheme(path) else os.path.abspath(path)


def is_stage(workdir: str) -> bool:
  """Whether the folder above holds it as one of its stages."""
  top, name = os.path.split(whole(workdir))
  return name in stages(top)


def _is_alive(workdir: str) -> bool:
  """Whether a process holds the run's lock; of a stage the lock lies in the folder above."""
  top, name = os.path.split(whole(workdir))
  claims = lock.Own(top if is_stage(workdir) else workdir, [name]).others()
  return any(claim.is_held and claim.lives() for claim in claims)


def _state(reader: _Reader, config: dict, summary: dict) -> str:
  evaluated = config.get("trainer") == "evaluate" and reader.names("")
  if summary or (evaluated and "evaluations.jsonl" in evaluated):
    return FINISHED
  if not config:
    return NOT_STARTED
  return RUNNING if reader.attempt(_is_alive, "", False) else INTERRUPTED


def _headline(config: dict, names) -> list[str]:
  """What the config's `summary` asks for; of evaluations all."""
  patterns = config.get("summary") if config.get("trainer") != "evaluate" else ["*"]
  patterns = [p for p in patterns if isinstance(p, str)] if isinstance(patterns, list) else []
  return list(dict.fromkeys(n for p in patterns for n in fnmatch.filter(names, p)))


def _seconds(goodput: dict) -> dict[str, float]:
  found = {"productive": goodput.get("productive"), **section(goodput, "seconds")}
  return {kind: float(s) for kind, s in found.items() if isinstance(s, (int, float))}


def read(
  workdir: str,
  *,
  state: str = "",
  note: str = "",
  steps: int | None = None,
  known: MutableMapping[str, Picture] | None = None,
) -> Run:
  """Reads a run.

  Args:
    workdir: its folder.
    state: what is known of it; "" to find out.
    note: why.
    steps: its last step, if it is known.
    known: pictures read before, by their paths; new ones are added.
  """
  reader, top = _Reader(workdir), os.path.split(whole(workdir))
  config, summary = reader.json("config.json"), reader.json("summary.json")
  numbers, words = split(reader.jsonl("metrics.jsonl"))
  paths = reader.attempt(lambda _: find(workdir), "images", {})
  loaded = load(paths, {} if known is None else known, reader.problems)
  newest = max((int(s.steps[-1]) for s in numbers.values()), default=0)
  ended, planned = (
    x if type(x) is int else None for x in (summary.get("step"), config.get("steps"))
  )
  step = newest if ended is None else ended
  bad = [name for name in reader.names("") if name.endswith("bad_data.txt")]
  lines = lambda path: (folder.read_bytes(path) or b"").decode(errors="replace").splitlines()
  stage = is_stage(workdir)
  return Run(
    folder=workdir,
    name=top[1],
    label=f"{os.path.basename(top[0])}/{top[1]}" if stage else top[1],
    state=state or _state(reader, config, summary),
    note=note,
    step=step,
    steps=steps or ended or planned or None,
    config=config,
    default=reader.json(DEFAULTS) or None,
    environment=reader.json("environment.json"),
    metrics=numbers,
    words=words,
    headline=_headline(config, numbers),
    pictures={name: steps for name, steps in loaded.items() if steps},
    checkpoints=sorted(int(n) for n in reader.names("checkpoints") if n.isdigit()),
    seconds=_seconds(reader.json("goodput.json")),
    changes=reader.jsonl("config_changes.jsonl"),
    bad_data={name: reader.attempt(lines, name, []) for name in bad},
    problems=reader.problems,
    time=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
  )

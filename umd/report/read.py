"""What a workdir holds, as far as it can be read: a report of a broken run is wanted most."""

import dataclasses
import datetime
import fnmatch
import os
from collections.abc import MutableMapping

from umd import lock, metrics
from umd import workdir as folder
from umd.report import pictures, series
from umd.report.pictures import Picture
from umd.report.series import Series

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
    seconds: {what for: wall time}, of `umd.goodput`.
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
    return [r for r in self.attempt(metrics.read_jsonl, name, []) if isinstance(r, dict)]

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
  return {name: series.make(points) for name, points in numbers.items()}, words


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
  paths = reader.attempt(lambda _: pictures.find(workdir), "images", {})
  loaded = pictures.load(paths, {} if known is None else known, reader.problems)
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

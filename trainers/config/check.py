"""Looks a whole config over before anything is built, and lists all that is wrong with it at once.

Types and ranges are read from `trainers.config.records`. Here are the rules that no field alone can
state: settings that contradict each other, and stages that start from one another. Whatever depends
on the data is checked where the data are opened.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

from ml_collections import ConfigDict, config_dict

from trainers.config import records
from trainers.config.read import fits, join, near, read
from umd.runs import workdir as folder
from umd.trained import saved

RESERVED = (".", "..", "cache")  # Folders in a workdir that are no stages.


def validate(
  config: ConfigDict | Mapping, workdir: str
) -> tuple[dict[str, records.Stage], list[str]]:
  """Reads all stages of a config; computes and writes nothing.

  Args:
    config: one stage, or `stages` and the sections that they name.
    workdir: the folder of all stages.

  Returns:
    ({name: record of the stage}, remarks). A config that is its only stage is named "". A remark
    is a line on what is allowed and yet may not be meant.

  Raises:
    ValueError: lists every problem: the key as a flag names it, the value, what is allowed.
  """
  config = _plain(config)
  problems = _stage_problems(config) if "stages" in config else []
  names = () if problems else config.get("stages", ("",))
  stages = {}
  for name in names:
    before = len(problems)
    section = config[name] if name else config
    stage = read(section, records.STAGE, name, problems)
    if stage is None and not name and "trainer" not in section:
      # A config of stages whose `stages` is misspelt looks like one stage with strange keys.
      problems[-1] += "".join(near(key, ["stages"]) for key in section)
    if len(problems) == before:
      stages[name] = stage
      problems += [join(name, text) for text in _contradictions(stage)]
  problems += _start_problems(stages, list(names), workdir)
  if problems:
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ValueError(f"the config has {count}:\n" + "\n".join(f"  {text}" for text in problems))
  return stages, [join(name, text) for name, stage in stages.items() for text in _remarks(stage)]


def read_stage(config: ConfigDict | Mapping) -> records.Stage:
  """Reads a config that is its only stage; see `validate`."""
  return validate(config, "")[0][""]


def _plain(node):
  """Returns a config as dicts and values; None where a required placeholder was left open."""
  if not isinstance(node, (ConfigDict, Mapping)):
    return node
  plain = {}
  for key in node:
    try:
      plain[key] = _plain(node[key])
    except config_dict.RequiredValueError:
      plain[key] = None
  return plain


def _is_stage_name(name: str) -> bool:
  """Returns whether a stage of that name would have a folder of its own in the workdir."""
  return name not in ("", *RESERVED) and "/" not in name and "\\" not in name


def _stage_problems(config: Mapping) -> list[str]:
  """Lists what is wrong with `stages`, and with the keys beside it."""
  problems, names = [], config["stages"]
  read(names, tuple[str, ...], "stages", problems, {"filled": True, "distinct": True})
  if not fits(names, tuple[str, ...]):
    return problems
  held = {k: v for k, v in config.items() if isinstance(v, Mapping) and "trainer" in v}
  for name in dict.fromkeys(names):
    if not _is_stage_name(name):
      problems.append(
        f"stages: {name!r} cannot name a stage: it is a folder in the workdir, so without slashes, "
        f"and none of {list(RESERVED)}. Choose another name."
      )
    elif not isinstance(config.get(name), Mapping):
      problems.append(
        f"stages names {name!r}, but the config has no such section.{near(name, held)}"
      )
  known = sorted({"stages", *names})
  problems += (
    f"{key}: there is no such key or stage.{near(key, known)} Known: {', '.join(known)}."
    for key in sorted(config.keys() - {*known, *held}, key=str)
  )
  return problems


def _contradictions(stage: records.Stage) -> Iterator[str]:
  """Yields what cannot be meant together, of a stage whose values are all right by themselves."""
  if isinstance(stage, records.Steps) and (stage.steps > 0) == (stage.epochs > 0):
    yield (
      f"steps={stage.steps} and epochs={stage.epochs}: give one of them, and leave the other 0."
    )
  if not isinstance(stage, records.Diffusion):
    return
  weights = [term.weight for stream in stage.streams.values() for term in stream.terms.values()]
  if weights and not any(weights):
    yield "streams: the weights of all terms are 0, so nothing is trained. Give one a weight."
  evaluator, slash, _ = stage.checkpoint.metric.partition("/")
  measured = [*stage.evals, "loss"]
  if slash and evaluator not in measured:
    best = stage.checkpoint.best
    yield f"checkpoint.best={best!r} is measured by none of {measured}.{near(evaluator, measured)}"


def _remarks(stage: records.Stage) -> Iterator[str]:
  """Yields what is allowed and yet may not be meant."""
  if not isinstance(stage, records.Steps):
    return
  saving, intervals = stage.checkpoint, {"checkpoint.every": stage.checkpoint.every}
  if isinstance(stage, records.Diffusion):
    intervals |= {f"evals.{name}.every": e.every for name, e in stage.evals.items()}
    if stage.label_drop_prob and not stage.use_labels:
      yield f"label_drop_prob={stage.label_drop_prob} means nothing without use_labels=True."
  else:
    intervals["eval_every"] = stage.eval_every
  for key, every in intervals.items():
    if 0 < stage.steps < every:
      yield f"{key}={every} is more than steps={stage.steps}: it happens once, after the last step."
  if saving.every and saving.keep_every % saving.every and saving.every % saving.keep_every:
    yield (
      f"checkpoint.keep_every={saving.keep_every} is no multiple of "
      f"checkpoint.every={saving.every}."
    )


def _start_problems(
  stages: Mapping[str, records.Stage], names: Sequence[str], workdir: str
) -> Iterator[str]:
  """Yields what is wrong with `init_from`, as far as it means stages of this config."""
  place = lambda name: os.path.join(workdir, name) if name else workdir
  names_of = {os.path.normpath(place(name)): name for name in names}
  for name, stage in stages.items():
    start = stage.init_from
    line = f"{join(name, 'init_from')}={start!r}"
    if start.startswith(saved.STAGE) and not _is_stage_name(start.removeprefix(saved.STAGE)):
      yield f"{line} must be 'stage:NAME' with the name of a stage in the same workdir."
      continue
    source = names_of.get(os.path.normpath(saved.locate(start, workdir))) if start else None
    if source is None:
      continue  # It starts from nothing, or from a run that is looked at itself.
    if names.index(source) >= names.index(name):
      what = "the stage itself" if source == name else "a later stage"
      yield f"{line} is {what}. Name an earlier one, or another run."
    elif (earlier := stages.get(source)) is None:
      continue  # What is wrong with that stage is listed already.
    elif not isinstance(earlier, records.Diffusion):
      yield f"{line}: {source}.trainer={earlier.trainer!r} leaves no model. Name a stage that does."
    elif not earlier.checkpoint.every and folder.finished(place(source)) is None:
      yield f"{line}: {source}.checkpoint.every=0 saves nothing to start from. Set it to steps."

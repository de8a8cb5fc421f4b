"""Looks a whole config over before anything is built, and tells all that is wrong with it at once.

Types, ranges and names are data, in `trainers.config.schema`; here is what applies them, and what no
table can say: settings that contradict each other, and stages that start from one another. What
depends on the data is checked by those who open it.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence

from ml_collections import ConfigDict, config_dict

from trainers.config import schema
from trainers.config.schema import Field, check, fits, join, near
from umd import models
from umd.models.autoencoder import parse_variant
from umd.models.network import Network, param_shapes
from umd.runs import workdir as folder
from umd.trained import saved, transfer

RESERVED = (".", "..", "cache")  # Names of folders that no stage may have.


def validate(config: ConfigDict | Mapping, workdir: str) -> list[str]:
  """Checks every key of a config with all its stages; computes and writes nothing.

  Args:
    config: of one stage, or `stages` and theirs; nested dicts will do.
    workdir: of all stages.

  Returns:
    What is no mistake but may not be meant, one line each.

  Raises:
    ValueError: lists every problem: the key as a flag would name it, the value, what is allowed.
  """
  config = _plain(config)
  if "stages" not in config:
    plan, problems = {"": config}, []
  else:
    problems = list(_check_stages(config))
    plan = {} if problems else {name: config[name] for name in config["stages"]}
  sound = {}
  for name, stage in plan.items():
    found = list(_check_stage(stage, name))
    found = found or [join(name, text) for text in _contradictions(stage)]
    problems += found
    if not found:
      sound[name] = stage
  problems += _check_starts(sound, list(plan), workdir)
  if problems:
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ValueError(f"the config has {count}:\n" + "\n".join(f"  {text}" for text in problems))
  return [join(name, text) for name, stage in sound.items() for text in _remarks(stage)]


def _plain(node):
  """A config as dicts and values; None where a required placeholder was left open."""
  if not isinstance(node, (ConfigDict, Mapping)):
    return node
  found = {}
  for key in node:
    try:
      found[key] = _plain(node[key])
    except config_dict.RequiredValueError:
      found[key] = None
  return found


def _unfit(name: str) -> bool:
  """Whether no stage can have that name: its folder would not be its own, in the workdir."""
  return name in ("", *RESERVED) or "/" in name or "\\" in name


def _check_stages(config: Mapping) -> Iterator[str]:
  """What is wrong with `stages` and with the keys beside it."""
  names = config["stages"]
  yield from check(names, Field(tuple[str, ...], None, filled=True, distinct=True), "stages")
  if not fits(names, tuple[str, ...]):
    return
  held = {k: v for k, v in config.items() if isinstance(v, Mapping) and "trainer" in v}
  for name in dict.fromkeys(names):
    if _unfit(name):
      yield (
        f"stages: {name!r} cannot name a stage: it is a folder in the workdir, so without slashes, "
        f"and none of {list(RESERVED)}. Choose another name."
      )
    elif not isinstance(config.get(name), Mapping):
      yield f"stages names {name!r}, of which the config holds nothing.{near(name, held)}"
  known = sorted({"stages", *names})
  for key in sorted(config.keys() - {*known, *held}, key=str):
    yield f"{key}: there is no such key or stage.{near(key, known)} Known: {', '.join(known)}."


def _check_stage(stage: Mapping, name: str) -> Iterator[str]:
  trainer = stage.get("trainer")
  if trainer in list(schema.STAGES):
    return check(stage, schema.stage(trainer), name)
  key = join(name, "trainer")
  found = f"{key}={trainer!r}" if "trainer" in stage else f"{key} is missing: it"
  problem = f"{found} must be one of {list(schema.STAGES)}.{near(trainer, schema.STAGES)}"
  # A config of stages whose `stages` is misspelt looks like one stage with strange keys.
  near_stages = "" if name else "".join(near(k, ["stages"]) for k in stage)
  return iter([problem + near_stages])


def _contradictions(stage: Mapping) -> Iterator[str]:
  """What cannot be meant together, of a stage whose values are all right by themselves."""
  if "steps" in stage and (stage["steps"] > 0) == (stage["epochs"] > 0):
    yield (
      f"steps={stage['steps']} and epochs={stage['epochs']}: give one of them, and leave the other "
      "0."
    )
  terms = [t for s in stage.get("streams", {}).values() for t in s["terms"].values()]
  if terms and not any(term.get("weight", 1.0) for term in terms):
    yield "streams: the weights of all terms are 0, so nothing is trained. Give one a weight."
  best = stage.get("checkpoint", {}).get("best", "")
  evaluator, slash, _ = best.partition(":")[2].partition("/")
  known = [*stage.get("evals", {}), "loss"]
  if slash and "evals" in stage and evaluator not in known:
    yield f"checkpoint.best={best!r} is measured by none of {known}.{near(evaluator, known)}"


def _remarks(stage: Mapping) -> Iterator[str]:
  """What is allowed and yet may not be meant."""
  steps, checkpoint = stage.get("steps", 0), stage.get("checkpoint", {})
  intervals = {f"evals.{k}.every": v["every"] for k, v in stage.get("evals", {}).items()}
  intervals |= {"checkpoint.every": checkpoint.get("every"), "eval_every": stage.get("eval_every")}
  for key, every in intervals.items():
    if every and 0 < steps < every:
      yield f"{key}={every} is more than steps={steps}: it happens once, after the last step."
  every, keep_every = checkpoint.get("every"), checkpoint.get("keep_every")
  if every and keep_every and keep_every % every and every % keep_every:
    yield f"checkpoint.keep_every={keep_every} is no multiple of checkpoint.every={every}."
  if stage.get("label_drop_prob") and not stage["use_labels"]:
    yield f"label_drop_prob={stage['label_drop_prob']} means nothing without use_labels=True."


def _check_starts(sound: Mapping, names: Sequence[str], workdir: str) -> Iterator[str]:
  """What is wrong with `init_from`, as far as it means stages of this config."""
  place = lambda name: os.path.join(workdir, name) if name else workdir
  where = {os.path.normpath(place(name)): name for name in names}
  for name, stage in sound.items():
    start, key = stage["init_from"], join(name, "init_from")
    by_name, unfit = start.startswith(saved.STAGE), _unfit(start.removeprefix(saved.STAGE))
    if by_name and unfit:
      yield f"{key}={start!r} must be 'stage:NAME' with the name of a stage in the same workdir."
    elif (
      start and (source := where.get(os.path.normpath(saved.locate(start, workdir)))) is not None
    ):
      if names.index(source) >= names.index(name):
        what = "the stage itself" if source == name else "a later stage"
        yield f"{key}={start!r} is {what}. Name an earlier one, or another run."
      elif source in sound:
        done = folder.finished(place(source)) is not None
        for text in _check_start(stage, sound[source], source, done):
          yield f"{key}={start!r}: {text}"


def _check_start(stage: Mapping, source: Mapping, name: str, done: bool) -> Iterator[str]:
  """Why a stage cannot start from an earlier one; `done`: it was trained in an earlier command."""
  if source["trainer"] != "diffusion":
    yield f"{name}.trainer={source['trainer']!r} leaves no model. Name a stage that trains one."
  elif done:
    return  # Its checkpoint is there, and is looked at itself.
  elif not source["checkpoint"]["every"]:
    yield f"{name}.checkpoint.every=0 saves nothing to start from. Set it to a number of steps."
  elif stage["trainer"] != "diffusion":
    return
  elif bool(stage["latents"]) != bool(source["latents"]):
    sees = lambda config: "latents" if config["latents"] else "pixels"
    yield f"{name} is trained on {sees(source)}, this stage on {sees(stage)}. Set both alike."
  else:
    # Of equal sizes the smallest will do: what else differs, differs in it, too.
    size = "nano/1" if stage["model"]["variant"] == source["model"]["variant"] else ""
    try:
      transfer.check(_leaves(stage, size), _leaves(source, size), stage["init_fresh"])
    except ValueError as error:
      yield str(error).removeprefix("init_from: ")


def _leaves(stage: Mapping, variant: str) -> dict:
  """{name: shape} of a stage's parameters, in another size if `variant` says one."""
  settings = saved.network_settings(stage["model"])
  settings["variant"] = variant or settings["variant"]
  patch = parse_variant(settings["variant"]).patch
  # One patch in grey: what depends on the images is seen once they are opened.
  image_size, classes = (patch, patch, 1), int(stage["use_labels"])
  return _leaves_of(models.make(image_size=image_size, num_classes=classes, **settings))


@functools.lru_cache(maxsize=8)  # Tracing takes a second.
def _leaves_of(model: Network) -> dict:
  return transfer.leaves(param_shapes(model))

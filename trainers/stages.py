"""Runs a config's stages one after the other, each in a folder of its own."""

import importlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from trainers import logs
from trainers.config import check
from umd import report
from umd.runs import lock, preemption, progress
from umd.runs import workdir as folder
from umd.trained import saved


def stages(config: ConfigDict, workdir: str) -> list[tuple[str, ConfigDict, str]]:
  """[(name, config, folder)] in the order in which they run.

  A config with `stages = ("a", "b")` holds the stages' configs under their names, and they run in
  <workdir>/a and <workdir>/b; any other config is its own only stage and runs in <workdir>.
  """
  if "stages" not in config:
    return [(os.path.basename(workdir.rstrip("/")), config, workdir)]
  return [(name, config[name], os.path.join(workdir, name)) for name in config.stages]


def run(
  config: ConfigDict,
  workdir: str,
  wandb_key: str | None = None,
  default: ConfigDict | None = None,
) -> list[dict]:
  """Runs every stage that is not finished; returns the summaries of all.

  All of them are built once before the first trains, so that a mistake in the last does not wait
  for its turn, and no finished one is passed over that was another run. `init_from` of a stage may
  be "stage:NAME", a stage in the same workdir, or any run's folder. A key for Weights & Biases
  switches it on. `default`, the config as its file has it, is kept for the reports to compare with.
  Until the end no other run of these stages may start in the workdir.
  """
  for remark in check.validate(config, workdir):
    logs.printer("config")(remark)
  plan = stages(config, workdir)
  folder.check_writable(workdir)
  with lock.hold([stage_dir for _, _, stage_dir in plan]):
    return _run(plan, workdir, wandb_key, default or ConfigDict())


class Built(NamedTuple):
  """A stage that is ready to run.

  Attributes:
    name, config, folder: as in `stages`.
    init_from: folder of the run that it starts from; "" for none.
    summary: what it left if it is finished, else None.
    parts: what its trainer's `prepare` made of it.
  """

  name: str
  config: ConfigDict
  folder: str
  init_from: str
  summary: Mapping | None
  parts: Any


def build(plan: list[tuple[str, ConfigDict, str]], workdir: str) -> list[Built]:
  """Builds every stage once, in the order in which they run; writes nothing.

  Raises:
    ValueError, FileNotFoundError: see the `prepare` of the trainers.
  """
  cache, ready, to_come = cache_folder(workdir), [], set()
  for name, stage, stage_dir in plan:
    summary, init_from = folder.finished(stage_dir), saved.locate(stage.init_from, workdir)
    # What an earlier stage is yet to make cannot be looked at; nor need what is done be there.
    known = "" if summary or init_from in to_come else init_from
    with progress.during("opening data, building model and evaluators", logs.printer(name)):
      parts = trainer(stage).prepare(stage, stage_dir, cache, known)
    ready.append(Built(name, stage, stage_dir, init_from, summary, parts))
    to_come |= set() if summary else {stage_dir}
  return ready


def _note(ready: list[Built], workdir: str, default: ConfigDict) -> None:
  """Leaves to the reports which stages there are, and the config as its file has it."""
  several = [stage for stage in ready if stage.folder != workdir]
  if several:
    report.add_stages(workdir, [stage.name for stage in several])
  for stage in ready:
    own = default.get(stage.name) if several else default
    if own and not stage.summary:
      folder.write_json(os.path.join(stage.folder, report.DEFAULTS), own.to_dict())


def _run(plan, workdir: str, wandb_key: str | None, default: ConfigDict) -> list[dict]:
  for _, stage, _ in plan:
    if wandb_key and stage.wandb.mode == "disabled":
      stage.wandb.mode = "online"
  cache, summaries = cache_folder(workdir), []
  ready = build(plan, workdir)
  if jax.process_index() == 0:
    _note(ready, workdir, default)
  for name, stage, stage_dir, init_from, summary, parts in ready:
    if summary:
      logs.printer(name)(f"is finished (step {summary['step']}), see {stage_dir}")
    elif preemption.requested():  # Since the stage before has ended.
      raise preemption.preempted()
    else:
      settings = dict(cache=cache, init_from=init_from, wandb_key=wandb_key)
      summary = trainer(stage).run(parts, stage, stage_dir, name, **settings)
    summaries.append(summary)
  return summaries


def cache_folder(workdir: str) -> str:
  """Where evaluators keep what they compute once: $UMD_CACHE, else the workdir if it is local."""
  local = "~/.cache/umd" if folder.scheme(workdir) else os.path.join(workdir, "cache")
  return os.path.expanduser(os.environ.get("UMD_CACHE") or local)


def trainer(stage: ConfigDict):
  """The module that a stage names."""
  return importlib.import_module(f"trainers.{stage.trainer}")


def table(summaries: list[dict]) -> str:
  """The headline numbers of all stages, as text."""
  rows = [
    (s["name"], metric, f"{s['metrics'][metric]:.4g}")
    for s in summaries
    for metric in s["headline"]
    if metric in s["metrics"]
  ]
  rows += [(s["name"], "seconds", f"{s['seconds']:.0f}") for s in summaries]
  rows = [("stage", "metric", "value"), *rows]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
  return "\n".join(lines)

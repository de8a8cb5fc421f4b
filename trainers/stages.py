"""Runs a config's stages one after the other, each in a folder of its own."""

import contextlib
import importlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from trainers import logs
from trainers.config import check, records
from umd import report
from umd.models.network import param_shapes
from umd.runs import lock, preemption, progress
from umd.runs import workdir as folder
from umd.trained import saved, transfer


class StagePlan(NamedTuple):
  """A stage that is to run.

  Attributes:
    name: shown in front of every line that it prints.
    config: its record, as its trainer takes it.
    folder: its workdir.
  """

  name: str
  config: records.Stage
  folder: str


class Built(NamedTuple):
  """A stage that is ready to run.

  Attributes:
    name, config, folder: as in `StagePlan`.
    init_from: the folder of the run that it starts from; "" for none.
    summary: what it left if it is finished, else None.
    parts: what its trainer's `prepare` made of it.
  """

  name: str
  config: records.Stage
  folder: str
  init_from: str
  summary: Mapping | None
  parts: Any


def plan(config: ConfigDict, workdir: str) -> list[StagePlan]:
  """Turns a config into the records of its stages, in the order in which they run.

  A config with `stages = ("a", "b")` holds the stages' configs under their names, and they run in
  <workdir>/a and <workdir>/b; any other config is its own only stage and runs in <workdir>.

  Raises:
    ValueError: the config makes no sense; lists all that is wrong with it.
  """
  stages, remarks = check.validate(config, workdir)
  for remark in remarks:
    logs.printer("config")(remark)
  only = os.path.basename(workdir.rstrip("/"))
  return [
    StagePlan(name or only, stage, os.path.join(workdir, name) if name else workdir)
    for name, stage in stages.items()
  ]


def build(planned: list[StagePlan], workdir: str) -> list[Built]:
  """Builds every stage once, in the order in which they run; writes nothing.

  So a mistake in the last stage does not wait for its turn.

  Raises:
    ValueError, FileNotFoundError: see the `prepare` of the trainers.
  """
  cache, ready, to_come = cache_folder(workdir), [], {}
  for name, config, stage_dir in planned:
    summary, init_from = folder.finished(stage_dir), saved.locate(config.init_from, workdir)
    # What an earlier stage is yet to make cannot be looked at; nor need what is done be there.
    known = "" if summary or init_from in to_come else init_from
    with progress.during("opening data, building model and evaluators", logs.printer(name)):
      parts = trainer(config).prepare(config, stage_dir, cache, known)
      if init_from in to_come and isinstance(config, records.Diffusion):
        _check_fits(parts, to_come[init_from], config.init_fresh)
    ready.append(Built(name, config, stage_dir, init_from, summary, parts))
    if not summary:
      to_come[stage_dir] = parts
  return ready


def _check_fits(parts, source, fresh: tuple[str, ...]) -> None:
  """Raises ValueError unless a stage can start from what the earlier stage `source` will train."""
  if parts.codec.sha256 != source.codec.sha256:
    raise ValueError("init_from: the two stages see other latents. Set `latents` of both alike.")
  shapes = [transfer.leaves(param_shapes(p.model)) for p in (parts, source)]
  transfer.check(*shapes, fresh)


def run(
  config: ConfigDict,
  workdir: str,
  wandb_key: str | None = None,
  default: ConfigDict | None = None,
) -> list[dict]:
  """Runs every stage that is not finished; returns the summaries of all.

  Until the end no other run of these stages may start in the workdir.

  Args:
    config: of one stage or of several, see `plan`. `init_from` of a stage may be "stage:NAME", a
      stage in the same workdir, or the folder of any run.
    workdir: the folder of all stages.
    wandb_key: an API key of Weights & Biases, which switches it on.
    default: the config as its file has it; kept for the reports to compare with.
  """
  config = ConfigDict(config)
  for section in [config[name] for name in config.get("stages", ())] or [config]:
    if wandb_key and section.wandb.mode == "disabled":
      section.wandb.mode = "online"
  planned = plan(config, workdir)
  folder.check_writable(workdir)
  with lock.hold([stage.folder for stage in planned]):
    ready = build(planned, workdir)
    if jax.process_index() == 0:
      _write_defaults(ready, workdir, default or ConfigDict())
    return [_run_stage(stage, workdir, wandb_key) for stage in ready]


def _run_stage(stage: Built, workdir: str, wandb_key: str | None) -> Mapping:
  """Runs a stage unless it is finished; returns its summary."""
  if stage.summary:
    at = f"(step {stage.summary['step']})"
    logs.printer(stage.name)(f"is finished {at}, see {stage.folder}")
    return stage.summary
  if preemption.requested():  # Since the stage before has ended.
    raise preemption.preempted()
  return trainer(stage.config).run(
    stage.parts,
    stage.config,
    stage.folder,
    stage.name,
    cache=cache_folder(workdir),
    init_from=stage.init_from,
    wandb_key=wandb_key,
  )


def _write_defaults(ready: list[Built], workdir: str, default: ConfigDict) -> None:
  """Leaves to the reports which stages there are, and the config as its file has it."""
  several = [stage for stage in ready if stage.folder != workdir]
  if several:
    report.add_stages(workdir, [stage.name for stage in several])
  for stage in ready:
    section = default.get(stage.name) if several else default
    if section and not stage.summary:
      # As a record, like the config of the run: what neither says does not differ. A file whose
      # config makes no sense without arguments has no defaults to compare with.
      with contextlib.suppress(ValueError):
        values = records.to_dict(check.read_stage(section))
        folder.write_json(os.path.join(stage.folder, report.DEFAULTS), values)


def cache_folder(workdir: str) -> str:
  """Returns where evaluators keep what they compute once: $UMD_CACHE, else a local folder."""
  local = "~/.cache/umd" if folder.scheme(workdir) else os.path.join(workdir, "cache")
  return os.path.expanduser(os.environ.get("UMD_CACHE") or local)


def trainer(stage: records.Stage):
  """Returns the module that a stage names."""
  return importlib.import_module(f"trainers.{stage.trainer}")


def table(summaries: list[Mapping]) -> str:
  """Writes the headline numbers of all stages as text."""
  rows = [
    (s["name"], metric, f"{s['metrics'][metric]:.4g}")
    for s in summaries
    for metric in s["headline"]
    if metric in s["metrics"]
  ]
  rows += [(s["name"], "seconds", f"{s['seconds']:.0f}") for s in summaries]
  rows = [("stage", "metric", "value"), *rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
  return "\n".join(lines)

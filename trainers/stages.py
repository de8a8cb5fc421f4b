"""Runs a config's stages one after the other, each in a folder of its own."""

import importlib
import os

from ml_collections import ConfigDict

from trainers import logs, runs, validate
from umd import lock, preemption
from umd import workdir as folder


def stages(config: ConfigDict, workdir: str) -> list[tuple[str, ConfigDict, str]]:
  """[(name, config, folder)] in the order in which they run.

  A config with `stages = ("a", "b")` holds the stages' configs under their names, and they run in
  <workdir>/a and <workdir>/b; any other config is its own only stage and runs in <workdir>.
  """
  if "stages" not in config:
    return [(os.path.basename(workdir.rstrip("/")), config, workdir)]
  return [(name, config[name], os.path.join(workdir, name)) for name in config.stages]


def run(config: ConfigDict, workdir: str, wandb_key: str | None = None) -> list[dict]:
  """Runs every stage that is not finished; returns the summaries of all.

  All of them are built once before the first trains, so that a mistake in the last does not wait
  for its turn, and no finished one is passed over that was another run. `init_from` of a stage may
  be "stage:NAME", a stage in the same workdir, or any run's folder. A key for Weights & Biases
  switches it on. Until the end no other run of these stages may start in the workdir.
  """
  for remark in validate.validate(config, workdir):
    logs.printer("config")(remark)
  plan = stages(config, workdir)
  folder.check_writable(workdir)
  with lock.hold(workdir, [name for name, _, _ in plan]):
    return _run(plan, workdir, wandb_key)


def _run(plan, workdir: str, wandb_key: str | None) -> list[dict]:
  cache = cache_folder(workdir)
  summaries = {name: folder.finished(stage_dir) for name, _, stage_dir in plan}
  started_from = {name: runs.locate(stage.init_from, workdir) for name, stage, _ in plan}
  to_come = set()
  for name, stage, stage_dir in plan:
    if wandb_key and stage.wandb.mode == "disabled":
      stage.wandb.mode = "online"
    # What an earlier stage is yet to make cannot be looked at; nor need what is done be there.
    known = started_from[name] if not summaries[name] else ""
    trainer(stage).prepare(stage, stage_dir, cache, "" if known in to_come else known)
    to_come |= set() if summaries[name] else {stage_dir}
  for name, stage, stage_dir in plan:
    if summaries[name]:
      logs.printer(name)(f"is finished (step {summaries[name]['step']}), see {stage_dir}")
      continue
    if preemption.requested():  # Since the stage before has ended.
      raise preemption.preempted()
    summaries[name] = trainer(stage).run(
      stage, stage_dir, name, cache=cache, init_from=started_from[name], wandb_key=wandb_key
    )
  return list(summaries.values())


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

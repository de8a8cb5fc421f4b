"""Runs a config's stages one after the other, each in a folder of its own."""

import importlib
import os

from ml_collections import ConfigDict

from umd import workdir as folder


def stages(config: ConfigDict, workdir: str) -> list[tuple[str, ConfigDict, str]]:
  """[(name, config, folder)] in the order in which they run.

  A config with `stages = ("a", "b")` holds the stages' configs under their names, and they run in
  <workdir>/a and <workdir>/b; any other config is its own only stage and runs in <workdir>.
  """
  if "stages" not in config:
    return [(os.path.basename(os.path.normpath(workdir)), config, workdir)]
  return [(name, config[name], os.path.join(workdir, name)) for name in config.stages]


def run(config: ConfigDict, workdir: str, wandb_key: str | None = None) -> list[dict]:
  """Runs every stage that is not finished; returns the summaries of all.

  All of them are built once before the first trains, so that a mistake in the last does not wait
  for its turn, and no finished one is passed over that was another run. `init_from` of a stage may
  be the name of an earlier one or any run's workdir. A key for Weights & Biases switches it on.
  """
  plan, cache = stages(config, workdir), os.path.join(workdir, "cache")
  summaries = {name: folder.finished(stage_dir) for name, _, stage_dir in plan}
  for _, stage, stage_dir in plan:
    if wandb_key and stage.wandb.mode == "disabled":
      stage.wandb.mode = "online"
    trainer(stage).prepare(stage, stage_dir, cache)
  folders = {name: stage_dir for name, _, stage_dir in plan}
  for name, stage, stage_dir in plan:
    if summaries[name]:
      print(f"[{name}] is finished (step {summaries[name]['step']}), see {stage_dir}", flush=True)
      continue
    init_from = folders.get(stage.init_from, stage.init_from)
    summaries[name] = trainer(stage).run(
      stage, stage_dir, name, cache=cache, init_from=init_from, wandb_key=wandb_key
    )
  return list(summaries.values())


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

"""Writes the report of a run, or compares runs, in one HTML file that needs only a browser.

bash run.sh tools.report RUN                          # RUN/report.html, as training keeps it
bash run.sh tools.report RUN1 RUN2 --out compare.html

RUN is the workdir of a run, or a folder with stages, which are then compared stage by stage.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

from tools.command_line import run as run_tool
from umd import report
from umd.report import page, read
from umd.runs import workdir


def stages(folder: str) -> dict[str, str]:
  """Returns {stage: its folder} of the stages that have begun; {"": folder} for a single run.

  Raises:
    FileNotFoundError: There is no run.
  """
  folders = {name: workdir.join(folder, name) for name in read.stages(folder)}
  folders = {name: path for name, path in folders.items() if read.exists(path)}
  if not folders and not read.exists(folder):
    raise FileNotFoundError(
      f"{folder!r} holds no run: neither config.json nor metrics.jsonl nor stages.json. Give the "
      "workdir of a run."
    )
  return folders or {"": folder}


def read_with_metrics(folder: str) -> report.Run:
  """Reads a run; raises ValueError if there is nothing to draw."""
  run = report.read_run(folder)
  if not run.metrics:
    raise ValueError(f"{folder!r} has no metrics yet: its metrics.jsonl is missing or empty.")
  return run


def write_one(folder: str, out: str) -> str:
  """Writes the report of a run or of all stages in a folder; returns its path."""
  folders = stages(folder)
  if out and "" not in folders:
    raise ValueError(
      f"--out={out!r}: {folder!r} holds the stages {list(folders)}, each with a report of its own. "
      "Drop --out, or name one of the stages."
    )
  runs = [read_with_metrics(path) for path in folders.values()]
  out = out or workdir.join(folder, report.FILE)
  if "" in folders:
    workdir.write_bytes(read.absolute(out), page.run_page(runs[0]).encode())
    return out
  for path in folders.values():
    report.write_run(path)
  report.write_overview(folder, *runs)
  return out


def groups(folders: Sequence[str]) -> dict[str, list[report.Run]]:
  """Returns {stage: the runs that have it} for stages that at least two runs share.

  Raises:
    FileNotFoundError: There is no such run.
    ValueError: A run has no metrics, or the runs share no stage.
  """
  found = [stages(folder) for folder in folders]
  names = dict.fromkeys(name for paths in found for name in paths)
  shared = {name: [paths[name] for paths in found if name in paths] for name in names}
  shared = {name: members for name, members in shared.items() if len(members) > 1}
  if not shared:
    raise ValueError(
      f"The runs share no stage: {list(folders)} have the stages {[list(p) for p in found]}. Give "
      "workdirs of single stages."
    )
  return {name: distinct(list(map(read_with_metrics, paths))) for name, paths in shared.items()}


def distinct(runs: Sequence[report.Run]) -> list[report.Run]:
  """Returns the runs, with as much of their paths in their labels as tells them apart."""
  if len({run.label for run in runs}) == len(runs):
    return list(runs)
  root = os.path.commonpath([run.folder for run in runs])
  label = lambda run: os.path.relpath(run.folder, root)
  return [dataclasses.replace(run, label=label(run)) for run in runs]


def write(folders: Sequence[str], out: str) -> str:
  """Writes the report of one folder or the comparison of several; returns its path."""
  if out and not workdir.scheme(out) and os.path.isdir(out):
    raise ValueError(f"--out={out!r} is a folder. Give the name of a file.")
  if len(folders) == 1:
    return write_one(folders[0], out)
  out = out or "comparison.html"
  workdir.write_bytes(read.absolute(out), page.comparison_page(groups(folders)).encode())
  return out


def main(argv: list[str]) -> None:
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("tools.report", None, __doc__, formatter_class=text)
  parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of a run or of stages")
  parser.add_argument("--out", default="", metavar="FILE", help="of a comparison: comparison.html")
  args = parser.parse_args(argv)
  run_tool(lambda: print(write(args.runs, args.out)))


if __name__ == "__main__":
  main(sys.argv[1:])

"""What all benchmarks share: arguments, timing in turns, a table, and a file of JSON lines.

What else a machine does slows one measurement and not the next. So candidates are timed in turns,
round by round in one process, and compared within a round: of the ratios the median and the range
are reported.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

from tools.command_line import positive, run

PACKAGES = ("jax", "numpy", "scipy", "tensorflow", "torch")


class Times(NamedTuple):
  """Seconds of one candidate in each round: by the wall clock, and of all cores of the process.

  Seconds of cores hardly change with what else the machine does; of an accelerator they say little.
  """

  wall: list[float]
  cores: list[float]

  @property
  def median(self) -> float:
    """Seconds by the wall clock."""
    return statistics.median(self.wall)

  @property
  def best(self) -> float:
    """Seconds by the wall clock."""
    return min(self.wall)

  def faster_than(self, other: "Times") -> tuple[float, float, float]:
    """(median, least, greatest) of the rounds' ratios: how many times as fast as the other."""
    ratios = [theirs / ours for ours, theirs in zip(self.wall, other.wall, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def in_turns(
  candidates: Mapping[str, Callable], repeats: int, inner: int = 1, warm_up: int = 1
) -> dict[str, Times]:
  """Times of each candidate, a function without arguments whose result is waited for.

  Each is called `warm_up` times before the first round, and `inner` times in each round.
  """
  times = {name: Times([], []) for name in candidates}
  for turn in range(warm_up + repeats):
    for name, work in candidates.items():
      wall, cores = time.perf_counter(), time.process_time()
      for _ in range(inner):
        jax.block_until_ready(work())
      if turn >= warm_up:
        times[name].wall.append((time.perf_counter() - wall) / inner)
        times[name].cores.append((time.process_time() - cores) / inner)
  return times


class Column(NamedTuple):
  """A column of the table: its heading, the key of its value in a row, and how it is written."""

  heading: str
  key: str
  form: str = "{}"


def _cell(column: Column, row: Mapping) -> str:
  value = row.get(column.key)
  text = "-" if value is None else column.form.format(value)
  return text.rjust(max(10, len(column.heading)))


def _append(path: str, benchmark: str, arguments: Mapping, row: Mapping) -> None:
  """Appends a row to a file of JSON lines, with the arguments, the machine and the versions."""
  about = {
    "benchmark": benchmark,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "machine": platform.platform(),
    "cores": os.cpu_count(),
    "load": os.getloadavg()[0],
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    **{name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules},
    **arguments,
  }
  with open(path, "a", encoding="utf-8") as file:
    file.write(json.dumps({**about, **row}) + "\n")


def parser(name: str, description: str) -> argparse.ArgumentParser:
  """The parser of `python -m benchmarks.NAME`, with the arguments that all benchmarks take."""
  made = argparse.ArgumentParser(
    f"benchmarks.{name}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  made.add_argument("--repeats", type=positive, default=5, help="rounds (5)")
  made.add_argument("--out", help="append JSON lines to this file")
  return made


def main(
  made: argparse.ArgumentParser,
  columns: Sequence[Column],
  measure: Callable[[argparse.Namespace], Iterable[dict]],
  argv: Sequence[str] | None = None,
) -> None:
  """Measures what the command line asks for; prints each row, and appends it to --out."""
  args = made.parse_args(argv)
  name = made.prog.removeprefix("benchmarks.")
  arguments = {key: value for key, value in vars(args).items() if key != "out"}

  def work() -> None:
    print(" ".join(column.heading.rjust(10) for column in columns))
    for row in measure(args):
      print(" ".join(_cell(column, row) for column in columns), flush=True)
      if args.out:
        _append(args.out, name, arguments, row)

  run(work)

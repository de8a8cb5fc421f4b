"""What the tools' command lines share: kinds of numbers, several processes, errors in one line."""

import argparse
import sys
from collections.abc import Callable

from umd.devices import distributed


def _at_least(low: int) -> Callable[[str], int]:
  def convert(text: str) -> int:
    if (value := int(text)) < low:
      raise argparse.ArgumentTypeError(f"{value} is less than {low}")
    return value

  convert.__name__ = "int"  # For argparse's message.
  return convert


natural, positive = _at_least(0), _at_least(1)  # For `type=`.


def add_processes(parser: argparse.ArgumentParser) -> None:
  """Flags of programs that several processes run together, see `umd.devices.distributed.start`."""
  parser.add_argument("--coordinator", help="HOST:PORT of process 0, of several processes")
  parser.add_argument("--num_processes", type=positive, help="how many they are")
  parser.add_argument("--process_id", type=int, help="which of them this is, from 0")


def run(work: Callable[[], None], args: argparse.Namespace | None = None) -> None:
  """Works; bad input becomes one line and exit status 1, Ctrl-C exit status 130.

  Args:
    work: what to do.
    args: with the flags of `add_processes`, of a program that has them: joins the others first.
  """
  try:
    if args:
      distributed.start(args.coordinator, args.num_processes, args.process_id)
    work()
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    distributed.leave(1)
  except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    distributed.leave(130)

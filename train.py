"""Trains what a config describes: python -m train --config CONFIG[:ARGUMENTS] --workdir DIR."""

import contextlib
import os
import runpy
import sys
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow only reads files here.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "What to train: a file of configs/, with arguments behind a colon.",
  lock_config=True,
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")
KEY = flags.DEFINE_string("key", None, "API key of Weights & Biases; switches it on.")
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, where several processes meet (docs/launching.md)."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes run this command.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
START_SECONDS = flags.DEFINE_integer("start_seconds", 300, "How long to wait for all processes.")
HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds", 60, "A process silent for so long is dead; the others then end, too."
)

HELP_CONFIG = flags.DEFINE_bool(
  "help_config", False, "Print the config's arguments with their values and meaning, and end."
)
DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Build everything, print what would be trained, write nothing, and end."
)

EXAMPLE = "python -m train --config configs/quickstart.py:method=umd --workdir runs/quickstart"


USER_ERRORS = (ValueError, OSError, FloatingPointError)


def _is_user_error(error: BaseException) -> bool:
  """Whether our own code raised it to say what is wrong with the input."""
  if not isinstance(error, USER_ERRORS):
    return False
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  here = os.path.dirname(os.path.abspath(__file__))
  return os.path.abspath(raised_in).startswith(here) and "site-packages" not in raised_in


def _report(error: BaseException) -> int:
  """Prints the message alone if it is meant for the user, else a traceback; the exit status."""
  if _is_user_error(error):
    print(f"error: {error}", file=sys.stderr)
    return 2
  traceback.print_exception(error)
  return 130 if isinstance(error, KeyboardInterrupt) else 1


def _help_config(argv) -> str | None:
  """What --help_config is to print; None if nobody asks.

  A look ahead: who asks for a config's arguments need not have given those that it needs.
  """
  asked = flags.FlagValues()
  flags.DEFINE_bool(HELP_CONFIG.name, False, "", flag_values=asked)
  flags.DEFINE_string(CONFIG.name, None, "", flag_values=asked)
  asked.set_gnu_getopt()
  asked(argv, known_only=True)
  if not asked.help_config:
    return None
  if not asked.config:
    raise ValueError("--help_config tells of a config: give --config, too.")
  from configs import common
  from trainers.config import help

  path, _, text = asked.config.partition(":")
  return help.describe(path, text, common.parse_arg, common.METHODS)


def _parse_flags(argv):
  """Parses the flags; what is wrong with them is said in one line."""
  try:
    if (text := _help_config(argv)) is not None:
      print(text)
      sys.exit()
    rest = flags.FLAGS(argv)
    if CONFIG.value is not None:
      list(CONFIG.value)  # A file that cannot be read is reported at the first access only.
    return rest
  except (flags.Error, AttributeError, KeyError, OSError, ValueError) as error:
    # What the config itself says lies below what absl and ml_collections wrap around it.
    chain = [error]
    while chain[-1].__context__ and not chain[-1].__suppress_context__:
      chain.append(chain[-1].__context__)
    told = next((e for e in chain if _is_user_error(e)), error)
    sys.exit(f"error: {told}\nSee --help, or the top of the config file. Example:\n  {EXAMPLE}")


def _default():
  """The config as its file has it, without arguments and flags; None where it needs arguments."""
  path = config_flags.get_config_filename(flags.FLAGS[CONFIG.name]).partition(":")[0]
  with contextlib.suppress(Exception):  # It has been read with arguments: nothing else is wrong.
    return runpy.run_path(path)["get_config"]()


def main(argv):
  if len(argv) > 1 or CONFIG.value is None or not (WORKDIR.value or DRY_RUN.value):
    sys.exit(f"error: --config and --workdir are needed, nothing else. Example:\n  {EXAMPLE}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save otherwise.
  from umd.runs import preemption

  preemption.install()
  from umd.devices import distributed  # Imports JAX: after the flags are known to be right.

  config = CONFIG.value
  try:
    distributed.start(
      COORDINATOR.value,
      NUM_PROCESSES.value,
      PROCESS_ID.value,
      timeout_seconds=START_SECONDS.value,
      heartbeat_seconds=HEARTBEAT_SECONDS.value,
      stop_together=True,
    )
    from trainers import stages
    from trainers.config import describe

    if DRY_RUN.value:
      text = describe.describe(config, WORKDIR.value)
    else:
      text = stages.table(stages.run(config, WORKDIR.value, KEY.value, _default()))
    if distributed.is_main():
      print(text, flush=True)
  except preemption.Preempted as stopped:
    preemption.leave(stopped)
  except (Exception, KeyboardInterrupt) as error:
    distributed.leave(_report(error))


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)

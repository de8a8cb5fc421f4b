"""Trains what a config describes: python -m train --config CONFIG[:ARGUMENTS] --workdir DIR.

Exit status: 0 after the last step, 2 if the command or its config is wrong, 1 if something failed,
75 if the run was stopped by a signal and goes on with the same command (`umd.runs.preemption`).
"""

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
USER_ERROR = 2  # The exit status.


def _is_user_error(error: BaseException) -> bool:
  """Returns whether our own code raised it to say what is wrong with the input."""
  if not isinstance(error, USER_ERRORS):
    return False
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  here = os.path.dirname(os.path.abspath(__file__))
  return os.path.abspath(raised_in).startswith(here) and "site-packages" not in raised_in


def _report(error: BaseException) -> int:
  """Prints the message alone if it is meant for the user, else a traceback; returns the status."""
  if _is_user_error(error):
    print(f"error: {error}", file=sys.stderr)
    return USER_ERROR
  traceback.print_exception(error)
  return 130 if isinstance(error, KeyboardInterrupt) else 1


def _refuse(text: str) -> None:
  print(f"error: {text} Example:\n  {EXAMPLE}", file=sys.stderr)
  sys.exit(USER_ERROR)


def _help_config(argv: list[str]) -> str | None:
  """Returns what --help_config prints; None unless it is given.

  It looks ahead of the other flags: a config's arguments can be printed without those it needs.
  """
  ahead = flags.FlagValues()
  flags.DEFINE_bool(HELP_CONFIG.name, False, "", flag_values=ahead)
  flags.DEFINE_string(CONFIG.name, None, "", flag_values=ahead)
  ahead.set_gnu_getopt()
  ahead(argv, known_only=True)
  if not ahead.help_config:
    return None
  if not ahead.config:
    raise ValueError("--help_config tells of a config: give --config, too.")
  from configs import common, methods
  from trainers.config import help

  path, _, text = ahead.config.partition(":")
  return help.describe(path, text, common.parse_arg, methods.METHODS)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; one line says what is wrong with them."""
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
    cause = next((e for e in chain if _is_user_error(e)), error)
    _refuse(f"{cause}\nSee --help, or the top of the config file.")


def _hide_key() -> None:
  """Takes --key out of the command, which wandb and the workdir keep for others to read."""
  argv = sys.argv
  hidden = [i for i, word in enumerate(argv) if word in ("--key", "-key")]
  hidden += [i + 1 for i in hidden]
  secret = ("--key=", "-key=")
  sys.argv = [w for i, w in enumerate(argv) if i not in hidden and not w.startswith(secret)]


def _default():
  """Returns the config as its file has it, without arguments; None where it needs arguments."""
  path = config_flags.get_config_filename(flags.FLAGS[CONFIG.name]).partition(":")[0]
  with contextlib.suppress(Exception):  # It has been read with arguments: nothing else is wrong.
    return runpy.run_path(path)["get_config"]()


def main(argv: list[str]) -> None:
  if len(argv) > 1 or CONFIG.value is None or not (WORKDIR.value or DRY_RUN.value):
    _refuse("--config and --workdir are needed, nothing else.")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save otherwise.
  _hide_key()
  from umd.runs import preemption

  preemption.install()
  from umd.devices import distributed  # Imports JAX: after the flags are known to be right.

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
      text = describe.describe(CONFIG.value, WORKDIR.value)
    else:
      text = stages.table(stages.run(CONFIG.value, WORKDIR.value, KEY.value, _default()))
    if distributed.is_main():
      print(text, flush=True)
  except preemption.Preempted as stopped:
    preemption.leave(stopped)
  except (Exception, KeyboardInterrupt) as error:
    distributed.leave(_report(error))


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)

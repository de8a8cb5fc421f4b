"""Trains what a config describes: python -m train --config CONFIG[:ARGUMENTS] --workdir DIR."""

import os
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


def _parse_flags(argv):
  """Parses the flags; what is wrong with them is said in one line."""
  try:
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


def main(argv):
  if len(argv) > 1 or CONFIG.value is None or WORKDIR.value is None:
    sys.exit(f"error: --config and --workdir are needed, nothing else. Example:\n  {EXAMPLE}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save otherwise.
  from umd import preemption

  preemption.install()
  from umd import distributed  # Imports JAX: after the flags are known to be right.

  config = CONFIG.value
  try:
    distributed.start(
      COORDINATOR.value,
      NUM_PROCESSES.value,
      PROCESS_ID.value,
      timeout_seconds=START_SECONDS.value,
      heartbeat_seconds=HEARTBEAT_SECONDS.value,
    )
    preemption.join()
    from trainers import stages

    summaries = stages.run(config, WORKDIR.value, KEY.value)
    if distributed.is_main():
      print(stages.table(summaries), flush=True)
  except (Exception, KeyboardInterrupt) as error:
    distributed.leave(_report(error))


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)

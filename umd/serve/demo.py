"""Serves a page on which a trained model is tried out: it samples, fills in, finds similar images.

bash run.sh demo --workdir runs/quickstart

DIR is a run's workdir (with stages: its last one is taken) or a folder that tools.export wrote. The
page is served to this machine only unless --host says otherwise, and loads nothing from the
network. It needs Gradio, which `bash run.sh demo` installs.
"""

import argparse
import os
import sys

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Before JAX sets it: errors are told anyway.
# Before Gradio is imported: it reports to its makers and looks for new versions of itself if not.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from tools.command_line import positive, run
from umd.runs.progress import say
from umd.serve import session
from umd.serve.session import Session
from umd.trained.model import Pretrained, load
from umd.trained.saved import NEWEST

HOST, PORT = "127.0.0.1", 7860
EXAMPLES, TRAINING = 16, 2000  # Images to try things on, and to look for neighbours among.
NO_GRADIO = "Gradio is not installed: start this as `bash run.sh demo`, or install {file}."


def open_session(model: Pretrained, args: argparse.Namespace) -> Session:
  """The model with its images: those of --data, else those that its run names.

  Raises:
    FileNotFoundError, ValueError: --data names no images, or none of the model's size.
  """
  size, config, page = model.image_size, session.config_of(model.folder), Session(model)
  named = session.named(args.data, size, args.data_dir) if args.data else None
  nowhere = "an exported model does not say what it was trained on; --data names images"

  def find(look) -> tuple:
    """(source, "") or (None, why not)."""
    if not config:
      return named, "" if named else nowhere
    try:
      return look(config, size), ""
    except ValueError as error:
      return named, "" if named else str(error)

  held_out, page.no_examples = find(session.held_out)
  training, page.no_training = (named, "") if named else find(session.trained_on)
  if held_out or training:  # Better ones that were trained on than none.
    page.examples, page.no_examples = session.draw(held_out or training, EXAMPLES), ""
  if training:
    page.open_training = lambda tell: session.draw(training, args.training_images, tell)
  return page


def work(args: argparse.Namespace) -> None:
  """Opens the model, then the page."""
  try:
    from umd.serve import page
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "gradio":
      raise
    raise ValueError(NO_GRADIO.format(file="requirements-demo.txt")) from None
  model = load(args.workdir, weights=args.weights, step=args.step)
  say(f"{model}")
  blocks = page.build(open_session(model, args))
  page.serve(blocks, args.host, args.port, args.share)


def parse(argv: list[str]) -> argparse.Namespace:
  """The command line; argparse ends the process if it is wrong."""
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("umd.serve.demo", None, __doc__, formatter_class=text)
  add = parser.add_argument
  add("--workdir", required=True, metavar="DIR", help="of the trained model, see above")
  add("--weights", choices=("ema", "raw"), default="", help="(ema)")
  add("--step", default=NEWEST, help="a number, newest or best (newest)")
  add("--data", default="", help="images for neighbours: tfds:NAME:SPLIT, or a path (the run's)")
  add("--data_dir", default="", help="of TFDS; else $TFDS_DATA_DIR")
  many = dict(type=positive, default=TRAINING, metavar="N", help=f"at most, for those ({TRAINING})")
  add("--training_images", **many)
  add("--host", default=HOST, help=f"0.0.0.0 serves whoever reaches this machine ({HOST})")
  add("--port", type=positive, default=PORT, help=f"({PORT})")
  add("--share", action="store_true", help="open a public tunnel, through servers of Gradio's")
  args = parser.parse_args(argv)
  args.step = int(args.step) if args.step.isdigit() else args.step
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  run(lambda: work(args))


if __name__ == "__main__":
  main(sys.argv[1:])

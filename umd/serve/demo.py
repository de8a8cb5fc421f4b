"""Serves a page on which a trained model is tried out: it samples, fills in, finds similar images.

bash run.sh demo --workdir runs/quickstart

DIR is the workdir of a run (of one with stages, the last stage is taken) or a folder that
tools.export wrote. The page is served to this machine only, unless --host says otherwise, and loads
nothing from the network. It needs Gradio, which `bash run.sh demo` installs.
"""

import argparse
import os
import sys

# Before Gradio is imported: without these it reports to its makers and looks for new versions.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from umd.runs.progress import say
from umd.serve import session
from umd.serve.session import Session
from umd.trained.model import Pretrained, load
from umd.trained.saved import NEWEST

EXAMPLES = 16


def open_session(model: Pretrained, args: argparse.Namespace) -> Session:
  """Returns the model with its images: those of --data, else those that its run names.

  Raises:
    FileNotFoundError, ValueError: --data names no images, or none of the model's size.
  """
  size, config = model.image_size, session.config_of(model.folder)
  training, no_training = session.first_source(session.trained_on(config), size)
  if args.data:
    training, no_training = session.named_images(args.data, size, args.data_dir), ""
  examples, no_examples = session.first_source(session.held_out(config), size)
  if examples is None and training:  # Images that the model was trained on are better than none.
    examples, no_examples = training, ""
  images = session.draw(examples, EXAMPLES) if examples else None
  return Session(model, images, training, args.training_images, no_examples, no_training)


def work(args: argparse.Namespace) -> None:
  """Opens the model, then the page."""
  try:
    from umd.serve import page
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "gradio":
      raise
    raise ValueError(
      "Gradio is not installed: start this as `bash run.sh demo`, or install requirements-demo.txt."
    ) from None
  model = load(args.workdir, weights=args.weights, step=args.step)
  say(f"{model}")
  page.serve(page.build(open_session(model, args)), args.host, args.port, args.share)


def parse(argv: list[str]) -> argparse.Namespace:
  """Reads the command line; argparse ends the process if it is wrong."""
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser("umd.serve.demo", None, __doc__, formatter_class=text)
  add = parser.add_argument
  add("--workdir", required=True, metavar="DIR", help="of the trained model, see above")
  add("--weights", choices=("ema", "raw"), default="", help="(ema)")
  add("--step", default=NEWEST, help="a number, newest or best (newest)")
  add("--data", default="", help="images for neighbours: tfds:NAME:SPLIT, or a path (the run's)")
  add("--data_dir", default="", help="of TFDS; else $TFDS_DATA_DIR")
  most = "neighbours are looked for among so many images (2000)"
  add("--training_images", type=int, default=2000, metavar="N", help=most)
  add("--host", default="127.0.0.1", help="0.0.0.0 serves whoever reaches this machine (127.0.0.1)")
  add("--port", type=int, default=7860, help="(7860)")
  add("--share", action="store_true", help="open a public tunnel through Gradio's servers")
  args = parser.parse_args(argv)
  args.step = int(args.step) if args.step.isdigit() else args.step
  return args


def main(argv: list[str]) -> None:
  try:
    work(parse(argv))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == "__main__":
  main(sys.argv[1:])

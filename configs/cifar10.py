"""CIFAR-10: the methods of the paper at 32 px, small enough for a CPU.

  bash run.sh train --config configs/cifar10.py:method=umd --workdir runs/cifar10_umd

Reads TFDS's `cifar10` from $TFDS_DATA_DIR, and downloads it if it is not there. ARGUMENTS of
images.py (TWO_STAGES); docs/results.md has what came of them.
"""

from configs import common, images

ARGUMENTS = common.with_defaults(
  images.TWO_STAGES, dataset="cifar10", size=32, variant="micro/4", cache=True, adaln="false"
)


def get_config(arg=None):
  """Both stages, "pretrain" and "finetune"."""
  return images.two_stages(images.parse_arg(arg, ARGUMENTS))

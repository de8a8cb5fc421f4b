"""Tiny ImageNet at 64 px, prepared as a TFDS data set with splits train and validation.

  TFDS_DATA_DIR=DIR bash run.sh train --config configs/tiny_imagenet.py --workdir runs/tiny

TFDS has no builder for it: docs/data.md says how to prepare one from a folder of images. ARGUMENTS
of images.py (TWO_STAGES).
"""

from configs import common, images

ARGUMENTS = common.with_defaults(
  images.TWO_STAGES, dataset="tiny_imagenet", size=64, variant="micro/8", cache=True, adaln="false"
)


def get_config(arg=None):
  """Both stages, "pretrain" and "finetune"."""
  return images.two_stages(images.parse_arg(arg, ARGUMENTS))

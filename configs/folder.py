"""Any folder of images: <root>/<class>/*, or all in <root> without labels (use_labels=false).

  bash run.sh train --config configs/folder.py:root=PATH,size=64,variant=S/4 --workdir runs/mine

A tenth of the images is held out, unless train_split= and test_split= name folders in <root>
(train, val) or other parts. The rest of the ARGUMENTS is in images.py (TWO_STAGES).
"""

from configs import common, images
from configs.common import Argument

ARGUMENTS = dict(
  common.with_defaults(
    images.TWO_STAGES,
    train_split="all[10%:]",
    test_split="all[:10%]",
    variant="micro/8",
    shots="10",
    adaln="false",
  ),
  root=Argument("", "the folder of images; needed"),
)
del ARGUMENTS["dataset"], ARGUMENTS["data_dir"]


def get_config(arg=None):
  """The stages "pretrain" and, with labels, "finetune"."""
  a = images.parse_arg(arg, ARGUMENTS)
  if not a.root:
    raise ValueError("root='' must be a folder of images: configs/folder.py:root=PATH.")
  with a.unlocked():
    a.dataset, a.data_dir = f"folder:{a.root}", ""
  return images.two_stages(a)

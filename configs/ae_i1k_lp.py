"""Full linear probe of a trained encoder: frozen features, BN without affine, one dense layer.

  bash run_tpu.sh train --config configs/ae_i1k_lp.py:variant=B/4,size=64 --workdir gs://BUCKET/UMD_B_4

Reads the encoder from <workdir>/pretrain and trains in <workdir>/linear_probe. All learning rates,
and both kinds of features, train at once on one pass of the encoder. The best learning rate is
chosen on images of the training set that are held out, and reported on the test split.
"""

from ml_collections import ConfigDict

from configs import common, images
from configs.common import Argument

ARGUMENTS = dict(
  common.with_defaults(images.ARGUMENTS, area_min=8),
  # What the checkpoint is expected to be; checked where given, `size` always.
  variant=Argument("B/4", "expected of the checkpoint: size and patch side"),
  adaln=common.ARGUMENTS["adaln"]._replace(
    meaning="expected of the checkpoint: conditioned by AdaLN"
  ),
  width=Argument(768, "expected of the checkpoint: features of a token"),
  run=Argument("", "probe the run in this folder instead"),
  weights=Argument("ema", "which of the checkpoint's weights", ("ema", "raw")),
  use_noised_pred=Argument(True, "also probe features of images noised to t"),
  t=Argument(50, "timestep of the noised images"),
  epochs=Argument(100.0, "length of the run in passes over the training set"),
  steps=Argument(0, "length of the run in steps; 0: epochs count"),
  batch_size=Argument(4096, "images a step, over all devices"),
  lrs=Argument("0.01+0.03+0.1+0.3+1+3", 'peaks for 256 images, joined by "+"; all train at once'),
  wd=Argument(5e-5, "weight decay"),
  warmup=Argument(0.05, "of the learning rate, as a share of the steps"),
  select_split=Argument(
    "", "where the learning rate is chosen; needed for data sets not in SPLITS"
  ),
  seed=Argument(0, "of initialisation, order, crops and noise"),
  wandb_mode=common.WANDB_MODE,
)
EXPECTED = ("variant", "size", "adaln", "latent_diffusion", "width")
SELECT = {
  "imagenet2012": "train[99%:]",
  "imagenet_resized/64x64": "train[99%:]",
  "cifar10": "train[90%:]",
  "tiny_imagenet": "train[90%:]",
}
TRAIN = {"cifar10": "train[:90%]", "tiny_imagenet": "train[:90%]"}


def get_config(arg=None):
  """One stage, "linear_probe"."""
  a = images.parse_arg(arg, ARGUMENTS)
  return ConfigDict(dict(stages=("linear_probe",), linear_probe=_stage(a)))


def _stage(a) -> dict:
  select = a.select_split or SELECT.get(a.dataset, "")
  if not select:
    raise ValueError(
      f"dataset={a.dataset!r}: give select_split=, a part of the training set that train_split= "
      "leaves out; the learning rate is chosen on it."
    )
  with a.unlocked():
    a.train_split = a.train_split or TRAIN.get(a.dataset, "")
  train, test = images.train_data(a), images.seen_data(a, "test")
  return dict(
    trainer="linear_probe",
    seed=a.seed,
    batch_size=a.batch_size,
    eval_batch_size=1024,
    data=train,
    select=dict(test, split=select),
    test=test,
    timesteps=(0, a.t) if a.use_noised_pred else (0,),
    lrs=tuple(common.scaled(lr, a.batch_size) for lr in common.numbers("lrs", a.lrs, float)),
    warmup=a.warmup,
    wd=a.wd,
    steps=a.steps,
    epochs=0.0 if a.steps else a.epochs,
    init_from=a.run or "stage:pretrain",
    init_weights=a.weights,
    expected={k: a[k] for k in EXPECTED if k in a.given or k == "size"},
    eval_every=5000,
    summary=tuple(f"probe/{n}/t{t}" for t in (0, a.t) for n in ("top1", "top5", "lr")),
    **common.output(a, log_every=100, checkpoint_every=1000),
  )

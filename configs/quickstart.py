"""Quick start: pre-train on real handwritten digits without labels, then fine-tune to draw them.

Runs on a laptop's CPU in minutes, without a download:

  bash run.sh train --config configs/quickstart.py --workdir runs/quickstart

Arguments go behind a colon, e.g. `configs/quickstart.py:method=mae,seed=1`; ARGUMENTS lists them.
Single values are overridden by flags, e.g. `--config.pretrain.optim.lr=1e-3`.
"""

from ml_collections import ConfigDict

from configs import common, images, methods
from configs.common import Argument

ARGUMENTS = dict(
  # AdaLN's gates start at zero: in a run as short as this one the class tokens are then left behind
  # (README, "Methods").
  common.with_defaults(common.ARGUMENTS, adaln="false", variant="micro/2", dtype="float32"),
  steps=Argument(2000, "steps of pre-training"),
  finetune_steps=Argument(500, "steps of fine-tuning"),
  batch_size=Argument(128, "images a step, over all devices"),
  lr=Argument(2e-3, "peak learning rate of pre-training"),
  finetune_lr=Argument(1e-3, "peak learning rate of fine-tuning"),
  wd=Argument(0.05, "weight decay of pre-training"),
  ema_decay=Argument(0.998, "of the average of the weights, which is what is evaluated"),
  label_drop_prob=Argument(0.1, "share of the labels dropped in fine-tuning, for guidance"),
  cfg_scale=Argument(2.0, "classifier-free guidance of the samples; 1 is none"),
  sampling_steps=Argument(25, "of the sampler"),
  num_samples=Argument(500, "samples in an evaluation"),
)

TRAIN, TEST = common.data("digits", "train", ""), common.data("digits", "test", "")


def get_config(arg=None):
  """Both stages, each a complete config of `trainers/diffusion.py`."""
  a = common.parse_arg(arg, ARGUMENTS)
  return ConfigDict(
    dict(stages=("pretrain", "finetune"), pretrain=_pretrain(a), finetune=_finetune(a))
  )


def _pretrain(a) -> dict:
  evals = dict(
    fewshot=dict(type="fewshot", train=TRAIN, test=TEST, features=("class", "patches"), every=1000),
    losses=dict(type="losses", data=TEST, every=1000),
  )
  if a.no_noise_prob > 0:  # Without clean images nothing learns to fill them in.
    evals["reconstruction"] = dict(
      type="reconstruction", data=TEST, mask_ratio=a.mask_ratio_no_noise, every=1000
    )
  return common.diffusion(
    a,
    data=TRAIN,
    optim=common.optim(a.lr, a.wd, 0.95),
    steps=a.steps,
    use_labels=False,
    label_drop_prob=0.0,
    ema_decay=a.ema_decay,
    evals=evals,
    summary=(
      *(
        f"fewshot/{f}_strict_{k}shot_mean"
        for k in (1, 5, 10)
        for f in ("class", "patches", "pixels")
      ),
      "reconstruction/masked_mse",
      "reconstruction/mean_image_mse",
    ),
    log_every=50,
    checkpoint_every=250,
  )


def _finetune(a) -> dict:
  clean = 0.05 if a.no_noise_prob > 0 else 0.0
  generation = dict(
    type="generation",
    train=TRAIN,
    test=TEST,
    num=a.num_samples,
    sampling=common.sampling(steps=a.sampling_steps, cfg_scale=a.cfg_scale, path=a.path),
    every=250,
  )
  return common.diffusion(
    a,
    data=TRAIN,
    streams=methods.streams(clean, 0.0, a.mask_ratio_no_noise),
    optim=common.optim(a.finetune_lr, 0.0, 0.999),
    steps=a.finetune_steps,
    use_labels=True,
    label_drop_prob=a.label_drop_prob,
    ema_decay=a.ema_decay,
    evals=dict(generation=generation),
    summary=(*images.GENERATION, "generation/frechet_classifier_*", "generation/score_*"),
    init_from="stage:pretrain",
    init_fresh=("label_embed",),
    log_every=50,
    checkpoint_every=250,
  )

"""ImageNet at 64 px with labels, for small budgets: class-conditional UMD or DiT from scratch.

  bash run.sh train --config configs/i1k_64.py:method=dit --workdir runs/i1k_64

Trains in one stage, as DiT does, on TFDS's `imagenet_resized/64x64` (12 GB, downloaded without an
account); dataset=imagenet2012 takes the full-size images instead. ARGUMENTS lists the rest.
"""

from ml_collections import ConfigDict

from configs import common, images
from configs.common import Argument

ARGUMENTS = dict(
  common.with_defaults(common.ARGUMENTS, variant="S/4")
  | common.with_defaults(images.ARGUMENTS, dataset="imagenet_resized/64x64", sample_fid=True),
  batch_size=Argument(256, "images a step, over all devices"),
  epochs=Argument(100.0, "length of the run in passes over the training set"),
  steps=Argument(0, "length of the run in steps; 0: epochs count"),
  lr=Argument(1.5e-4, "for 256 images: the peak is lr * batch_size / 256"),
  wd=Argument(0.0, "weight decay"),
  beta2=Argument(0.999, "of AdamW: decay of the second moment"),
  ema_decay=Argument(0.9999, "of the average of the weights, which is what is evaluated"),
  label_drop_prob=Argument(0.1, "share of the labels dropped, for classifier-free guidance"),
  cfg_scale=Argument(1.5, "classifier-free guidance of the samples; 1 is none"),
  sampling_steps=Argument(125, "of the sampler"),
  num_samples=Argument(10_000, "samples that are measured every 25,000 steps"),
)


def get_config(arg=None):
  """One stage, "pretrain"."""
  a = images.parse_arg(arg, ARGUMENTS)
  probe = dict(protocol=("umd",), shots=(10, 100), pixels=False)
  evals = dict(
    losses=images.losses(a, every=25_000),
    fewshot=images.fewshot(a, every=25_000, **probe),
    generation=images.generation(a, num=a.num_samples, sampling=images.sampling(a), every=25_000),
  )
  if a.no_noise_prob > 0:
    evals["reconstruction"] = images.reconstruction(a, every=25_000)
  stage = common.diffusion(
    a,
    data=images.train_data(a),
    optim=common.optim(common.scaled(a.lr, a.batch_size), a.wd, a.beta2),
    steps=a.steps,
    epochs=0.0 if a.steps else a.epochs,
    use_labels=True,
    label_drop_prob=a.label_drop_prob,
    ema_decay=a.ema_decay,
    evals=evals,
    summary=images.SUMMARY,
    latents=images.latents(a),
  )
  return ConfigDict(dict(stages=("pretrain",), pretrain=stage))

"""A small KL auto-encoder, trained in minutes on a CPU: the first stage of latent diffusion.

  bash run.sh train --config configs/vae_tiny.py --workdir runs/vae
  bash run.sh train --config configs/vae_tiny.py:dataset=tiny_imagenet,size=64 --workdir runs/vae64

Its weights, in <workdir>/vae, are what `vae=` of the configs with latent_diffusion=True takes.
Without a download: dataset=digits,size=16. ARGUMENTS lists the rest.
"""

from ml_collections import ConfigDict

from configs import common, images
from configs.common import Argument

ARGUMENTS = dict(
  dataset=Argument("cifar10", "a TFDS data set, or folder:PATH, or npz:FILE, or digits"),
  data_dir=Argument("", "where TFDS data is; else $TFDS_DATA_DIR, else TFDS's own place"),
  train_split=Argument(
    "", "needed for data sets that are not in SPLITS of images.py, as is test_split"
  ),
  test_split=Argument("", "where the images held out are from"),
  cache=Argument(True, "keep the encoded images in this host's memory"),
  size=Argument(32, "side of the images in pixels"),
  widths=Argument(
    "16+32+64", 'of the levels, joined by "+"; each but the last halves the side: here f4'
  ),
  layers=Argument(1, "ResNets of a level"),
  groups=Argument(8, "of the group normalisations"),
  attention=Argument(True, "at the lowest resolution, among all pixels there"),
  latent_channels=Argument(4, "of a latent"),
  dtype=Argument("float32", "of the computation", ("float32", "bfloat16")),
  error=Argument("l1", "of the reconstruction", ("l1", "l2")),
  kl_weight=Argument(1e-6, "of the divergence from the normal distribution, beside the error"),
  steps=Argument(700, "of training"),
  batch_size=Argument(64, "images a step, over all devices"),
  lr=Argument(1e-3, "peak learning rate"),
  ema_decay=Argument(0.995, "of the average of the weights, which is what is kept"),
  evaluations=Argument(4, "times that it is evaluated, the last step included"),
  eval_num=Argument(2048, "held-out images to look at; 0: all"),
  scaling_num=Argument(10_000, "training images that the scaling factor is measured on"),
  fsdp=Argument(1, "devices that share one copy of parameters, average and optimiser; 0: all"),
  accumulate=Argument(1, "parts of a batch, worked on one after the other: less memory, slower"),
  seed=Argument(0, "of the weights, the order of the data and all noise"),
  wandb_mode=Argument("disabled", "online, offline or disabled"),
)

SUMMARY = (
  *("reconstruction/psnr", "reconstruction/mse", "reconstruction/mean_image_mse"),
  *("reconstruction/kl", "vae/scaling_factor"),
)


def get_config(arg=None):
  """A complete config of `trainers/kl_vae.py`."""
  a = common.parse_arg(arg, ARGUMENTS)
  for name in ("steps", "evaluations"):
    if a[name] < 1:
      raise ValueError(f"{name}={a[name]} must be at least 1.")
  train, test = _data(a)
  architecture = dict(
    block_out_channels=common.numbers("widths", a.widths, int),
    layers_per_block=a.layers,
    latent_channels=a.latent_channels,
    norm_num_groups=a.groups,
    mid_block_add_attention=a.attention,
  )
  return ConfigDict(
    dict(
      trainer="kl_vae",
      seed=a.seed,
      batch_size=a.batch_size,
      eval_batch_size=256,
      data=train,
      test=test,
      model=dict(architecture=architecture, dtype=a.dtype),
      objective=dict(error=a.error, kl_weight=a.kl_weight),
      optim=common.optim(a.lr, 0.0, 0.99),
      steps=a.steps,
      epochs=0.0,
      ema_decay=a.ema_decay,
      fsdp=a.fsdp,
      accumulate=a.accumulate,
      guard=dict(common.GUARD),
      init_from="",
      eval_every=-(-a.steps // a.evaluations),
      eval_num=a.eval_num,
      scaling_num=a.scaling_num,
      summary=SUMMARY,
      **common.output(a, log_every=50, checkpoint_every=250),
    )
  )


def _data(a) -> tuple[dict, dict]:
  """Specs of the images for training and of those held out."""
  if a.dataset == "digits":
    splits = a.train_split or "train", a.test_split or "test"
    return tuple(common.data(a.dataset, split, f"resize({a.size})") for split in splits)
  test = images.test_data(a, "held_out")
  # Unlike a crop that is resized, this one keeps the sharpness that images have.
  ops = ("decode", f"resize_small({a.size})", f"random_crop({a.size})", "flip_lr")
  pp = "|".join([*ops, "value_range(-1, 1)", "keep('image', 'label')"])
  train = common.data(images.name(a.dataset), images.splits(a)["train"], pp, a.data_dir, a.cache)
  return train, test

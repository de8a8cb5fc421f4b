"""Quick start: pre-train on real handwritten digits without labels, then fine-tune to draw them.

Runs on a laptop's CPU in minutes, without a download:

  bash run.sh train --config configs/quickstart.py --workdir runs/quickstart

Arguments go behind a colon, e.g. `configs/quickstart.py:method=mae,seed=1`; ARGUMENTS lists them.
Single values are overridden by flags, e.g. `--config.pretrain.optim.lr=1e-3`.
"""

from ml_collections import ConfigDict

from configs import common

ARGUMENTS = dict(
  method="umd",  # umd, mae, dit or maskdit: sets the next three, see common.METHODS
  no_noise_prob=0.5,  # share of the batch that stays clean
  mask_ratio=0.375,  # of the noised part
  mask_ratio_no_noise=0.75,  # of the clean part
  # Condition by AdaLN, or else by one more token. AdaLN's gates start at zero: in a run as short as
  # this one the class tokens are then left behind (README, "Methods").
  adaln=False,
  variant="micro/2",  # size and patch side, see SIZES in umd/models/autoencoder.py
  steps=2000,  # of pre-training
  finetune_steps=500,
  batch_size=128,
  lr=2e-3,  # peak learning rate of pre-training
  finetune_lr=1e-3,
  wd=0.05,  # weight decay of pre-training
  ema_decay=0.998,
  label_drop_prob=0.1,  # of fine-tuning, for classifier-free guidance
  cfg_scale=2.0,  # classifier-free guidance of the samples; 1 is none
  sampling_steps=25,
  num_samples=500,
  path="cosine",  # cosine, linear or flow
  timesteps=1000,
  dtype="float32",  # of the computation: float32 or bfloat16
  scan=False,  # loop over layers: compiles faster, runs slower
  remat=False,  # recompute activations: less memory, slower
  seed=0,
  wandb_mode="disabled",  # online, offline or disabled
)


def get_config(arg=None):
  """Both stages, each a complete config of `trainers/autoencoder.py`."""
  a = common.parse_arg(arg, **ARGUMENTS)
  return ConfigDict(
    dict(stages=("pretrain", "finetune"), pretrain=_pretrain(a), finetune=_finetune(a))
  )


def _stage(a) -> dict:
  """What both stages share."""
  return dict(
    trainer="autoencoder",
    seed=a.seed,
    batch_size=a.batch_size,
    eval_batch_size=256,
    data=dict(name="digits", split="train"),
    model=dict(
      variant=a.variant,
      heads=("x0", "eps"),
      adaln=a.adaln,
      dtype=a.dtype,
      scan=a.scan,
      remat=a.remat,
    ),
    path=dict(name=a.path, timesteps=a.timesteps),
    ema_decay=a.ema_decay,
    log_every=50,
    checkpoint=dict(every=250, keep=2),
    wandb=dict(mode=a.wandb_mode, project="umd"),
  )


def _optim(lr, wd, beta2, steps) -> dict:
  return dict(
    lr=lr,
    warmup_steps=steps // 20,
    wd=wd,
    beta1=0.9,
    beta2=beta2,
    clip_norm=1.0,
    mu_dtype="float32",
  )


def _pretrain(a) -> dict:
  digits = dict(data="digits", every=1000)
  evals = dict(
    fewshot=dict(
      type="fewshot",
      train_split="train",
      test_split="test",
      features=("class", "patches"),
      **digits,
    ),
    losses=dict(type="losses", split="test", **digits),
  )
  if a.no_noise_prob > 0:  # Without clean images nothing learns to fill them in.
    evals["reconstruction"] = dict(
      type="reconstruction", split="test", mask_ratio=a.mask_ratio_no_noise, **digits
    )
  return dict(
    **_stage(a),
    steps=a.steps,
    use_labels=False,
    label_drop_prob=0.0,
    streams=common.streams(a.no_noise_prob, a.mask_ratio, a.mask_ratio_no_noise),
    optim=_optim(a.lr, a.wd, 0.95, a.steps),
    init_from="",
    init_weights="ema",
    init_fresh=(),
    evals=evals,
    summary=(
      *(f"fewshot/{f}_{k}shot_mean" for k in (1, 5, 10) for f in ("class", "patches", "pixels")),
      "reconstruction/masked_mse",
      "reconstruction/mean_image_mse",
    ),
  )


def _finetune(a) -> dict:
  digits = dict(data="digits", train_split="train", test_split="test", every=250)
  # At the end of the flow path x_t is all noise: eps is no news there, x0 is.
  head = "x0" if a.path == "flow" else "eps"
  sampling = dict(sampler="ddim", steps=a.sampling_steps, cfg_scale=a.cfg_scale, head=head)
  clean = 0.05 if a.no_noise_prob > 0 else 0.0
  return dict(
    **_stage(a),
    steps=a.finetune_steps,
    use_labels=True,
    label_drop_prob=a.label_drop_prob,
    streams=common.streams(clean, 0.0, a.mask_ratio_no_noise),
    optim=_optim(a.finetune_lr, 0.0, 0.999, a.finetune_steps),
    init_from="pretrain",
    init_weights="ema",
    init_fresh=("label_embed",),
    evals=dict(generation=dict(type="generation", num=a.num_samples, sampling=sampling, **digits)),
    summary=(
      "generation/agreement",
      "generation/classifier_accuracy",
      "generation/frechet_classifier",
      "generation/frechet_classifier_floor",
      "generation/frechet_classifier_ceiling",
      "generation/frechet_classifier_position",
      "generation/score_classifier",
      "generation/score_classifier_test",
    ),
  )

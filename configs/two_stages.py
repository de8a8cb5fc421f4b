"""Pre-training without labels, then fine-tuning with them, on a small image data set."""

from ml_collections import ConfigDict

from configs import common, images

ARGUMENTS = {
  **common.ARGUMENTS,
  **images.ARGUMENTS,
  "dtype": "float32",
  "steps": 3000,  # steps of pre-training
  "finetune_steps": 1500,  # steps of fine-tuning; 0: none
  "batch_size": 128,  # images a step, over all devices
  "lr": 2e-3,  # peak learning rate of pre-training
  "finetune_lr": 1e-3,  # peak learning rate of fine-tuning
  "wd": 0.05,  # weight decay of pre-training
  "ema_decay": 0.998,  # of the average of the weights, which is what is evaluated
  "use_labels": True,  # False: nothing is probed or fine-tuned, and no labels are needed
  "label_drop_prob": 0.1,  # share of the labels dropped in fine-tuning, for guidance
  "finetune_area_min": 95,  # smallest crop in fine-tuning, percent of the image
  "cfg_scale": 2.0,  # classifier-free guidance of the samples; 1 is none
  "sampling_steps": 50,  # of the sampler
  "num_samples": 1000,  # samples in an evaluation
  "shots": "10+100",  # labelled images of a class that the few-shot probe has, joined by "+"
  "evaluations": 2,  # times that each stage is evaluated, the last step included
}


def get_config(a) -> ConfigDict:
  """The stages "pretrain" and, where there are labels, "finetune"; `a` holds the ARGUMENTS."""
  stages = {"pretrain": _pretrain(a)}
  if a.use_labels and a.finetune_steps:
    stages["finetune"] = _finetune(a)
  return ConfigDict({"stages": tuple(stages), **stages})


def _every(a, steps: int) -> int:
  if a.evaluations < 1:
    raise ValueError(f"evaluations={a.evaluations} must be at least 1.")
  return -(-steps // a.evaluations)


def _pretrain(a) -> dict:
  every = _every(a, a.steps)
  evals = dict(losses=images.losses(a, every=every))
  summary = []
  if a.use_labels:
    shots = common.numbers("shots", a.shots, int)
    evals["fewshot"] = images.fewshot(
      a, every=every, shots=shots, features=("class", "mean"), knn=(20,), pixels=True
    )
    kinds = "class", "mean", "pixels"
    summary += [f"fewshot/{f}_strict_{k}shot_mean" for k in shots for f in kinds]
    summary += [f"fewshot/{f}_knn20" for f in kinds]
  if a.no_noise_prob > 0:
    evals["reconstruction"] = images.reconstruction(a, every=every)
    summary += ["reconstruction/masked_mse", "reconstruction/mean_image_mse"]
  return common.autoencoder(
    a,
    data=images.train_data(a),
    streams=common.streams(a.no_noise_prob, a.mask_ratio, a.mask_ratio_no_noise),
    optim=common.optim(a.lr, a.wd, 0.95),
    batch_size=a.batch_size,
    steps=a.steps,
    use_labels=False,
    label_drop_prob=0.0,
    ema_decay=a.ema_decay,
    evals=evals,
    summary=tuple(summary),
    checkpoint_every=500,
    latents=images.latents(a),
  )


def _finetune(a) -> dict:
  clean = 0.05 if a.no_noise_prob > 0 else 0.0
  generation = images.generation(
    a,
    num=a.num_samples,
    sampling=common.sampling(
      steps=a.sampling_steps, cfg_scale=a.cfg_scale, path=a.path, cfg_channels=a.cfg_channels
    ),
    every=_every(a, a.finetune_steps),
  )
  a.area_min = a.finetune_area_min
  return common.autoencoder(
    a,
    data=images.train_data(a),
    streams=common.streams(clean, 0.0, a.mask_ratio_no_noise),
    optim=common.optim(a.finetune_lr, 0.0, 0.999),
    batch_size=a.batch_size,
    steps=a.finetune_steps,
    use_labels=True,
    label_drop_prob=a.label_drop_prob,
    ema_decay=a.ema_decay,
    evals=dict(generation=generation),
    summary=images.GENERATION,
    init_from="stage:pretrain",
    init_fresh=("label_embed",),
    checkpoint_every=500,
    latents=images.latents(a),
  )

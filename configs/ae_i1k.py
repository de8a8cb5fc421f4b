"""ImageNet with TFDS: pre-training, fine-tuning and training from scratch, as in the UMD paper.

  bash run_tpu.sh train --config configs/ae_i1k.py:variant=B/4,size=64 --workdir gs://BUCKET/UMD_B_4

Arguments go behind a colon; ARGUMENTS lists them, docs/commands.md has every command of the paper.
A run trains in <workdir>/pretrain; with finetune=True it starts from there and trains in
<workdir>/finetune.
"""

from ml_collections import ConfigDict

from configs import common, images
from configs.common import Argument

ARGUMENTS = (
  common.ARGUMENTS
  | images.ARGUMENTS
  | dict(
    batch_size=Argument(1024, "images a step, over all devices"),
    epochs=Argument(800.0, "length of the run in passes over the training set"),
    steps=Argument(0, "length of the run in steps; 0: epochs count"),
    lr=Argument(1.5e-4, "for 256 images: the peak is lr * batch_size / 256"),
    wd=Argument(0.05, "weight decay"),
    beta2=Argument(0.95, "of AdamW: decay of the second moment"),
    ema_decay=Argument(0.9999, "at 256 images a step; 1 - ema_decay grows with the batch"),
    use_labels=Argument(False, "condition on labels"),
    label_drop_prob=Argument(0.1, "share of the labels dropped, for classifier-free guidance"),
    finetune=Argument(False, "start from the pre-training in the same workdir"),
    init_from=Argument("", "start from another run's workdir instead"),
    init_weights=Argument("ema", "which of its weights", ("ema", "raw")),
    cfg_scale=Argument(1.5, "classifier-free guidance of the samples; 1 is none"),
    sampling_steps=Argument(125, "of the sampler"),
    sample_fid=Argument(True, "FID and its kin; False: a small classifier judges, no download"),
    num_samples=Argument(10_000, "samples that are measured every 25,000 steps"),
    final_samples=Argument(
      50_000, "samples after the last step, measured with all metrics; 0: none"
    ),
    save_ckpt=Argument(True, "False: no checkpoint, so nothing to resume, fine-tune or evaluate"),
  )
)


def get_config(arg=None):
  """One stage, "pretrain" or "finetune"."""
  a = images.parse_arg(arg, ARGUMENTS)
  if a.finetune and not a.use_labels:
    raise ValueError("finetune=True is for class-conditional generation: add use_labels=True.")
  stage = "finetune" if a.finetune else "pretrain"
  return ConfigDict({"stages": (stage,), stage: _stage(a)})


def _evals(a) -> dict:
  sampling = images.sampling(a)
  evals = dict(losses=images.losses(a, every=25_000))
  if a.no_noise_prob > 0:
    evals["reconstruction"] = images.reconstruction(a, every=25_000)
  if a.use_labels:
    evals["generation"] = images.generation(a, num=a.num_samples, sampling=sampling, every=25_000)
    if a.sample_fid and a.final_samples:
      evals["final_generation"] = images.generation(
        a, num=a.final_samples, sampling=sampling, every=0, metrics=images.FINAL_METRICS
      )
  if not a.finetune:
    probe = dict(protocol=("umd",), shots=(10, 100), pixels=False)
    evals["fewshot"] = images.fewshot(a, every=10_000, **probe)
  return evals


def _stage(a) -> dict:
  lr = common.scaled(a.lr, a.batch_size)
  return common.diffusion(
    a,
    data=images.train_data(a),
    optim=common.optim(lr, a.wd, a.beta2, mu_dtype="bfloat16"),
    steps=a.steps,
    epochs=0.0 if a.steps else a.epochs,
    use_labels=a.use_labels,
    label_drop_prob=a.label_drop_prob if a.use_labels else 0.0,
    ema_decay=1 - common.scaled(1 - a.ema_decay, a.batch_size),
    evals=_evals(a),
    summary=images.SUMMARY,
    init_from=a.init_from or ("stage:pretrain" if a.finetune else ""),
    init_weights=a.init_weights,
    init_fresh=("label_embed",) if a.use_labels else (),
    eval_batch_size=1024,
    checkpoint_every=5000 if a.save_ckpt else 0,
    latents=images.latents(a),
  )

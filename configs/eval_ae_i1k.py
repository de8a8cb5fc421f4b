"""Evaluates a trained checkpoint: samples in number, and probes on ten data sets.

  bash run_tpu.sh train --config configs/eval_ae_i1k.py:variant=B/4,size=64,finetune=True \
    --workdir gs://BUCKET/UMD_B_4

Nothing is trained. The model is read from the checkpoint in <workdir>/pretrain (or, with
finetune=True, /finetune); arguments that describe it must be right, but all except size may be left
out.
Results are added to <workdir>/eval/evaluations.jsonl.
"""

from ml_collections import ConfigDict

from configs import common, images
from configs.common import Argument

ARGUMENTS = dict(
  # What the checkpoint is expected to be; checked where given, `size` always.
  variant=Argument("B/4", "expected of the checkpoint: size and patch side"),
  size=Argument(64, "expected of the checkpoint: side of the images in pixels"),
  adaln=common.ARGUMENTS["adaln"]._replace(
    meaning="expected of the checkpoint: conditioned by AdaLN"
  ),
  latent_diffusion=Argument(False, "expected of the checkpoint: trained on latents"),
  finetune=Argument(False, "evaluate the fine-tuned run"),
  run=Argument("", "evaluate the run in this folder instead"),
  weights=Argument("ema", "which of the checkpoint's weights", ("ema", "raw")),
  sample=Argument(True, "draw and measure samples"),
  samples=Argument(True, "the same as sample: both must be true"),
  num_samples=Argument(50_000, "how many"),
  sampling_timesteps=Argument(125, "steps of the sampler"),
  cfg_scale=Argument(
    1.5, "classifier-free guidance; unless given, none where the run has no labels"
  ),
  sample_fid=Argument(True, "FID and its kin; False: a small classifier judges, no download"),
  sampler=Argument("ddim", "what draws samples", ("ddim", "ddpm", "heun", "dpmpp_2m", "ab2")),
  head=Argument("eps", "what the sampler reads", ("eps", "x0")),
  **{
    name: images.ARGUMENTS[name]
    for name in (
      "fid_reference",
      "inception_weights",
      "quantize",
      "cfg_channels",
      "data_dir",
      "cache",
    )
  },
  probe=Argument(True, "few-shot probes on the transfer sets"),
  datasets=Argument("all", 'which of PROBES, joined by "+"'),
  noised_pred=Argument(False, "also probe the representation of images noised to t"),
  t=Argument(50, "timestep of noised_pred"),
  dataset=Argument("imagenet2012", "of the reference that samples are compared with"),
  train_split=Argument("", "of dataset; needed where it is not in SPLITS"),
  test_split=Argument("", "of dataset; needed where it is not in SPLITS"),
  scan=Argument(True, "loop over layers: compiles faster than layers that are unrolled"),
  batch_size=Argument(1024, "images at a time, over all devices"),
  seed=Argument(0, "of samples, few-shot draws and noise"),
  wandb_mode=common.WANDB_MODE,
)
EXPECTED = ("variant", "size", "adaln", "latent_diffusion")

# name: training set, its split, test set, its split. 10 and 100 shots as the UMD code counts them:
# at most so many of each class, for many sets have fewer.
PROBES = {
  "imagenet": ("imagenet2012", "train[:100000]", "imagenet2012", "validation"),
  "imagenet_v2": ("imagenet2012", "train[:100000]", "imagenet_v2", "test"),
  "cifar100": ("cifar100", "train", "cifar100", "test"),
  "stl10": ("stl10", "train", "stl10", "test"),
  "dtd": ("dtd", "train", "dtd", "test"),
  "pets": ("oxford_iiit_pet", "train", "oxford_iiit_pet", "test"),
  "flowers": ("oxford_flowers102", "train", "oxford_flowers102", "test"),
  "food101": ("food101", "train", "food101", "validation"),
  "dogs": ("stanford_dogs", "train", "stanford_dogs", "test"),
  "uc_merced": ("uc_merced", "train[:1000]", "uc_merced", "train[1000:]"),
}
# Exactly so many of every class: where each class has as many, and some to choose l2 on.
STRICT = {
  "imagenet": ("train[:20%]", (10, 100)),
  "cifar100": ("train", (10, 100)),
  "stl10": ("train", (10, 100)),
  "dtd": ("train", (10,)),
  "pets": ("train", (10,)),
  "food101": ("train", (10, 100)),
  "dogs": ("train", (10,)),
  "uc_merced": ("train[:1000]", (10,)),
}


def get_config(arg=None):
  """One stage, "eval"."""
  a = common.parse_arg(arg, ARGUMENTS)
  return ConfigDict(dict(stages=("eval",), eval=_stage(a)))


def _chosen(a) -> list[str]:
  names = list(PROBES) if a.datasets == "all" else a.datasets.split("+")
  if unknown := set(names) - set(PROBES):
    raise ValueError(f"datasets={sorted(unknown)} are not among {list(PROBES)}.")
  return names


def _probes(a) -> dict:
  spec = lambda name, split: common.data(
    images.name(name), split, images.test_pp(a.size), a.data_dir, a.cache
  )
  evals = {}
  for suffix, t in [("", 0)] + [(f"_t{a.t}", a.t)] * a.noised_pred:
    for name in _chosen(a):
      train, train_split, test, test_split = PROBES[name]
      settings = dict(type="fewshot", test=spec(test, test_split), t=t, pixels=False, every=1)
      evals[name + suffix] = dict(
        settings, train=spec(train, train_split), protocol=("umd",), shots=(10, 100)
      )
      if name in STRICT:
        split, shots = STRICT[name]
        evals[f"{name}_strict{suffix}"] = dict(
          settings, train=spec(train, split), protocol=("strict",), shots=shots, knn=(20,)
        )
  return evals


def _stage(a) -> dict:
  evals = _probes(a) if a.probe else {}
  if a.sample and a.samples:
    sampling = common.sampling(
      steps=a.sampling_timesteps,
      cfg_scale=a.cfg_scale,
      cfg_channels=a.cfg_channels,
      sampler=a.sampler,
      head=a.head,
    )
    evals["generation"] = images.generation(
      a, num=a.num_samples, sampling=sampling, every=1, metrics=images.FINAL_METRICS
    )
  if not evals:
    raise ValueError("sample=False and probe=False leave nothing to evaluate. Set one to True.")
  return dict(
    trainer="evaluate",
    seed=a.seed,
    eval_batch_size=a.batch_size,
    init_from=a.run or ("stage:finetune" if a.finetune else "stage:pretrain"),
    init_weights=a.weights,
    model=dict(scan=a.scan),
    expected={k: a[k] for k in EXPECTED if k in a.given or k == "size"},
    evals=evals,
    guide_if_labelled="cfg_scale" not in a.given,
    summary=(),
    wandb=dict(mode=a.wandb_mode, project="umd"),
  )

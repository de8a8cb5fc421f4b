"""What configs of image data sets share: splits, preprocessing and evaluators."""

from ml_collections import ConfigDict

from configs import common, methods
from configs.common import Argument

# train: for the auto-encoder; held_out: for its losses; labelled, test: for probes and the
# classifier that judges samples; reference: what Inception compares samples with.
SPLITS = {
  "imagenet2012": dict(
    train="train[:99%]",
    held_out="train[99%:]",
    labelled="train[:100000]",
    test="validation",
    reference="train",
  ),
  "imagenet_resized/64x64": dict(
    train="train[:99%]",
    held_out="train[99%:]",
    labelled="train[:100000]",
    test="validation",
    reference="train",
  ),
  "tiny_imagenet": dict(
    train="train", held_out="validation", labelled="train", test="validation", reference="train"
  ),
  "cifar10": dict(train="train", held_out="test", labelled="train", test="test", reference="train"),
}

# Arguments that every config of an image data set takes.
ARGUMENTS = dict(
  dataset=Argument("imagenet2012", "a TFDS data set, or folder:PATH, or npz:FILE"),
  data_dir=Argument("", "where TFDS data is; else $TFDS_DATA_DIR, else TFDS's own place"),
  train_split=Argument("", "what to train on; needed for data sets that are not in SPLITS"),
  test_split=Argument("", "what to evaluate on; needed for data sets that are not in SPLITS"),
  cache=Argument(False, "keep the encoded images in this host's memory"),
  size=Argument(64, "side of the images in pixels"),
  area_min=Argument(80, "smallest crop in training, percent of the image"),
  sample_fid=Argument(
    False, "measure samples with Inception (FID ...), not with a small classifier"
  ),
  fid_reference=Argument(
    "", "npz of statistics to measure against; else those of the training set"
  ),
  inception_weights=Argument(
    "", "file of Inception's weights; else in the cache, or downloaded there"
  ),
  quantize=Argument("round", "how samples become 8-bit images", ("round", "adm", "dit", "none")),
  latent_diffusion=Argument(False, "train on latents of images, not on their pixels"),
  vae=Argument("sd-vae-ft-mse", "what makes latents: a published name, a folder, or hf:ORG/REPO"),
  use_preprocessed_latents=Argument(False, "read latents that tools.encode_latents made"),
  latents_dir=Argument("", "from this folder"),
  cfg_channels=Argument(
    0, "guide the first so many channels of latents only (DiT, MDT: 3); 0: all"
  ),
)

# Of samples under Inception, at the end.
FINAL_METRICS = ("fid", "sfid", "is", "is_shuffled", "precision_recall", "kid")
# Headlines: whichever of them a run has.
GENERATION = (
  "generation/fid_*",
  "generation/is_*",
  "generation/agreement",
  "generation/classifier_accuracy",
  "generation/frechet_classifier",
  "generation/frechet_classifier_floor",
  "generation/frechet_classifier_ceiling",
)


def name(dataset: str) -> str:
  """The `name` of a data spec: TFDS unless it says another kind."""
  return dataset if dataset.startswith(("folder:", "npz:", "tfds:")) else f"tfds:{dataset}"


SUMMARY = (
  "fewshot/class_umd_10shot_mean",
  "fewshot/class_umd_100shot_mean",
  "reconstruction/masked_mse",
  "reconstruction/mean_image_mse",
  *GENERATION,
  *("final_generation/" + name for name in ("fid_*", "sfid_*", "is_*", "precision_*", "recall_*")),
)


def parse_arg(arg: str | None, arguments):
  """`common.parse_arg`; where latents are trained on, the path is "linear" unless it is given.

  Raises:
    ValueError: arguments that contradict one another; see also there.
  """
  a = common.parse_arg(arg, arguments)
  for name in ("use_preprocessed_latents", "latents_dir", "vae", "cfg_channels"):
    if name in a.given and a[name] and not a.latent_diffusion:
      raise ValueError(f"{name}={a[name]} needs latent_diffusion=True.")
  if a.use_preprocessed_latents != bool(a.latents_dir):
    raise ValueError(
      f"use_preprocessed_latents={a.use_preprocessed_latents} and latents_dir={a.latents_dir!r} go "
      "together: name the folder that tools.encode_latents wrote."
    )
  if a.latent_diffusion and "path" in a and "path" not in a.given:
    a.path = "linear"  # That of latent diffusion (Rombach et al. 2022), and of the UMD paper.
  return a


def latents(a) -> dict | None:
  """Returns the arguments of `umd.codecs.codec.make`, or None where pixels are trained on."""
  return dict(vae=a.vae, dtype=a.dtype, chunk=8, tile=0) if a.latent_diffusion else None


def train_pp(size: int, area_min: int) -> str:
  """A crop of `area_min` to 100 % of the image, resized, perhaps mirrored, in [-1, 1]."""
  crop = f"decode_jpeg_and_inception_crop({size}, area_min={area_min})"
  return f"{crop}|flip_lr|value_range(-1, 1)|keep('image', 'label')"


def test_pp(size: int) -> str:
  """The largest square in the middle, resized, in [-1, 1]."""
  return (
    f"decode|resize_small({size})|central_crop({size})|value_range(-1, 1)|keep('image', 'label')"
  )


def splits(a) -> dict:
  """The splits of `a.dataset`; `train_split` and `test_split` take the place of those in SPLITS.

  Raises:
    ValueError: the data set is not in SPLITS and the arguments do not name its splits.
  """
  known = SPLITS.get(a.dataset.removeprefix("tfds:"), {})
  if not known and not (a.train_split and a.test_split):
    raise ValueError(
      f"dataset={a.dataset!r} is none of {list(SPLITS)}, whose splits are known: give train_split= "
      "and test_split= too."
    )
  own = a.train_split
  train = dict(train=own, labelled=own, reference=own) if own else {}
  test = dict(held_out=a.test_split, test=a.test_split) if a.test_split else {}
  return {**known, **train, **test}


def train_data(a) -> dict:
  """Spec of what is trained on: images, or stored latents in a random view."""
  if a.use_preprocessed_latents:
    return _latent_data(a, "train", "random_view")
  pp = train_pp(a.size, a.area_min)
  return common.data(name(a.dataset), splits(a)["train"], pp, a.data_dir, a.cache)


def seen_data(a, part: str) -> dict:
  """Spec of what the model sees of a part (a key of SPLITS' rows), without augmentation."""
  return _latent_data(a, part, "view(0)") if a.use_preprocessed_latents else test_data(a, part)


def test_data(a, part: str) -> dict:
  """Spec of the images of a part, without augmentation."""
  spec = name(a.dataset), splits(a)[part], test_pp(a.size), a.data_dir, a.cache
  return common.data(*spec)


def _latent_data(a, part: str, view: str) -> dict:
  # Of folders and arrays, which have the one split "all"; TFDS keeps that word for itself.
  split = splits(a)[part].replace("all", "train")
  pp = f"{view}|keep('image', 'label')"
  return common.data(f"latents:{a.latents_dir}", split, pp)


def fewshot(a, *, every: int, **settings) -> dict:
  """Few-shot probe of the representation; stored latents have no pixels to compare it with."""
  train, test = seen_data(a, "labelled"), seen_data(a, "test")
  settings["pixels"] = settings.get("pixels", True) and not a.use_preprocessed_latents
  return dict(type="fewshot", train=train, test=test, every=every, **settings)


def losses(a, *, every: int, num: int = 2048) -> dict:
  """The objective on `num` images that were not trained on."""
  return dict(type="losses", data=seen_data(a, "held_out"), num=num, every=every)


def reconstruction(a, *, every: int, num: int = 2048) -> dict:
  """Filling in of masked patches."""
  data = test_data(a, "held_out")
  scale = max(1, 96 // a.size)
  return dict(
    type="reconstruction",
    data=data,
    mask_ratio=a.mask_ratio_no_noise,
    num=num,
    scale=scale,
    every=every,
  )


def sampling(a) -> dict:
  """Makes the settings with which an evaluation draws samples."""
  return common.sampling(
    steps=a.sampling_steps, cfg_scale=a.cfg_scale, path=a.path, cfg_channels=a.cfg_channels
  )


def generation(
  a, *, num: int, sampling: dict, every: int, metrics: tuple[str, ...] = ("fid", "sfid", "is")
) -> dict:
  """Samples, measured by Inception or by a small classifier of the training images."""
  settings = dict(
    type="generation",
    num=num,
    sampling=sampling,
    scale=max(1, 96 // a.size),
    every=every,
  )
  if a.sample_fid:
    return settings | dict(
      features="inception",
      reference=a.fid_reference or test_data(a, "reference"),
      weights=a.inception_weights,
      quantize=a.quantize,
      metrics=metrics,
    )
  train = test_data(a, "labelled")
  if train["split"] == "train[:100000]":  # The judge holds its images in memory: 2.5 GB of them.
    train["split"] = f"train[:{min(50_000, 50_000 * 64**2 // a.size**2)}]"
  return settings | dict(features="classifier", train=train, test=test_data(a, "test"))


TWO_STAGES = dict(
  common.with_defaults(common.ARGUMENTS, dtype="float32") | ARGUMENTS,
  steps=Argument(3000, "steps of pre-training"),
  finetune_steps=Argument(1500, "steps of fine-tuning; 0: none"),
  batch_size=Argument(128, "images a step, over all devices"),
  lr=Argument(2e-3, "peak learning rate of pre-training"),
  finetune_lr=Argument(1e-3, "peak learning rate of fine-tuning"),
  wd=Argument(0.05, "weight decay of pre-training"),
  ema_decay=Argument(0.998, "of the average of the weights, which is what is evaluated"),
  use_labels=Argument(True, "False: nothing is probed or fine-tuned, and no labels are needed"),
  label_drop_prob=Argument(0.1, "share of the labels dropped in fine-tuning, for guidance"),
  finetune_area_min=Argument(95, "smallest crop in fine-tuning, percent of the image"),
  cfg_scale=Argument(2.0, "classifier-free guidance of the samples; 1 is none"),
  sampling_steps=Argument(50, "of the sampler"),
  num_samples=Argument(1000, "samples in an evaluation"),
  shots=Argument("10+100", 'labelled images of a class that the few-shot probe has, joined by "+"'),
  evaluations=Argument(2, "times that each stage is evaluated, the last step included"),
)


def two_stages(a) -> ConfigDict:
  """Makes the stages "pretrain" and, where there are labels, "finetune" of TWO_STAGES."""
  stages = {"pretrain": _pretrain_stage(a)}
  if a.use_labels and a.finetune_steps:
    stages["finetune"] = _finetune_stage(a)
  return ConfigDict({"stages": tuple(stages), **stages})


def _interval(a, steps: int) -> int:
  if a.evaluations < 1:
    raise ValueError(f"evaluations={a.evaluations} must be at least 1.")
  return -(-steps // a.evaluations)


def _pretrain_stage(a) -> dict:
  every = _interval(a, a.steps)
  evals = dict(losses=losses(a, every=every))
  summary = []
  if a.use_labels:
    shots = common.numbers("shots", a.shots, int)
    evals["fewshot"] = fewshot(
      a, every=every, shots=shots, features=("class", "mean"), knn=(20,), pixels=True
    )
    kinds = "class", "mean", "pixels"
    summary += [f"fewshot/{f}_strict_{k}shot_mean" for k in shots for f in kinds]
    summary += [f"fewshot/{f}_knn20" for f in kinds]
  if a.no_noise_prob > 0:
    evals["reconstruction"] = reconstruction(a, every=every)
    summary += ["reconstruction/masked_mse", "reconstruction/mean_image_mse"]
  return common.diffusion(
    a,
    data=train_data(a),
    optim=common.optim(a.lr, a.wd, 0.95),
    steps=a.steps,
    use_labels=False,
    label_drop_prob=0.0,
    ema_decay=a.ema_decay,
    evals=evals,
    summary=tuple(summary),
    checkpoint_every=500,
    latents=latents(a),
  )


def _finetune_stage(a) -> dict:
  clean = 0.05 if a.no_noise_prob > 0 else 0.0
  sampled = generation(
    a,
    num=a.num_samples,
    sampling=sampling(a),
    every=_interval(a, a.finetune_steps),
  )
  a.area_min = a.finetune_area_min
  return common.diffusion(
    a,
    data=train_data(a),
    streams=methods.streams(clean, 0.0, a.mask_ratio_no_noise),
    optim=common.optim(a.finetune_lr, 0.0, 0.999),
    steps=a.finetune_steps,
    use_labels=True,
    label_drop_prob=a.label_drop_prob,
    ema_decay=a.ema_decay,
    evals=dict(generation=sampled),
    summary=GENERATION,
    init_from="stage:pretrain",
    init_fresh=("label_embed",),
    checkpoint_every=500,
    latents=latents(a),
  )

"""What configs of image data sets share: splits, preprocessing and evaluators."""

from configs import common

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
  dataset="imagenet2012",  # a TFDS data set, or folder:PATH, or npz:FILE
  data_dir="",  # where TFDS data is; else $TFDS_DATA_DIR, else TFDS's own place
  train_split="",  # what to train on; needed for data sets that are not in SPLITS
  test_split="",  # what to evaluate on; needed for data sets that are not in SPLITS
  cache=False,  # keep the encoded images in this host's memory
  size=64,  # side of the images in pixels
  area_min=80,  # smallest crop in training, percent of the image
  sample_fid=False,  # measure samples with Inception (FID ...), not with a small classifier
  fid_reference="",  # npz of statistics to measure against; else those of the training set
  inception_weights="",  # file of Inception's weights; else in the cache, or downloaded there
  quantize="round",  # how samples become 8-bit images: round, adm, dit or none
  latent_diffusion=False,  # train on latents of images, not on their pixels
  vae="sd-vae-ft-mse",  # what makes latents: a published name, a folder, or hf:ORG/REPO
  use_preprocessed_latents=False,  # read latents that tools.encode_latents made
  latents_dir="",  # from this folder
  cfg_channels=0,  # guide the first so many channels of latents only (DiT, MDT: 3); 0: all
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
SUMMARY = (
  "fewshot/class_umd_10shot_mean",
  "fewshot/class_umd_100shot_mean",
  "reconstruction/masked_mse",
  "reconstruction/mean_image_mse",
  *GENERATION,
  *("final_generation/" + name for name in ("fid_*", "sfid_*", "is_*", "precision_*", "recall_*")),
)


def parse_arg(arg: str | None, **defaults):
  """`common.parse_arg`; where latents are trained on, the path is "linear" unless it is given.

  Raises:
    ValueError: arguments that contradict one another; see also there.
  """
  a = common.parse_arg(arg, **defaults)
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
  """What is between pixels and the model: the arguments of `umd.codec.make`, None for nothing."""
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


def name(dataset: str) -> str:
  """The `name` of a data spec: TFDS unless it says another kind."""
  return dataset if dataset.startswith(("folder:", "npz:", "tfds:")) else f"tfds:{dataset}"


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

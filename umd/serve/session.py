"""What the demo does with a trained model, without its page: arrays in, arrays and words out."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from umd.data import Source, load, train_batches
from umd.data.sources import open_images
from umd.models.network import grid, num_tokens
from umd.runs import workdir
from umd.runs.progress import format_seconds
from umd.samplers import Sampling
from umd.trained import pictures
from umd.trained.inputs import ALL
from umd.trained.model import Pretrained

COVERED = 0.25  # A pixel is filled in if so much of it is painted over.
HIDDEN = 128  # the gray level in place of what the model is not shown
NONE = "none"  # the label of samples without a class
FRAMES = 24  # At most so many steps of the denoising are shown.
RESAMPLING = 4
NOISED = 0.05  # the share of T at which images are represented by a model that saw no clean ones
BATCH, SHUFFLE_BUFFER, SEED = 64, 4096, 0  # for drawing images of a source

Size = tuple[int, int, int]
Tell = Callable[[int, int], None]
Picture = tuple[np.ndarray, str]  # pixels, uint8 [H, W, 1 or 3], and a caption


# Pictures that come from a browser


def fit(image, size: Size) -> np.ndarray:
  """Returns a Pillow image as uint8 [H, W, C] of the model's size.

  An image of another size is cropped to the middle and resized, by averages over pixels; so an
  image that was enlarged by a whole factor comes back exactly. Transparent parts become white.
  """
  from PIL import Image, ImageOps

  image = ImageOps.exif_transpose(image).convert("RGBA")
  image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  image = image.convert("L" if size[2] == 1 else "RGB")
  image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BOX)
  return np.asarray(image, np.uint8).reshape(size)


def to_mask(painted: Sequence, size: Size) -> np.ndarray:
  """Returns bool [H, W] of the model's size, true where Pillow images of one channel are not 0.

  The images are cropped as `fit` crops. A pixel counts from a share of COVERED on.
  """
  from PIL import Image, ImageOps

  mask = np.zeros(size[:2], bool)
  for image in painted:
    levels = image.point(lambda level: 255 * (level > 127))
    levels = ImageOps.fit(levels, (size[1], size[0]), Image.Resampling.BOX)
    mask |= np.asarray(levels) >= 255 * COVERED
  return mask


# Images of the run's data


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images of a data set.

  Attributes:
    name: The name of the data.
    images: uint8 [n, H, W, C], in no order.
    captions: What each image shows; "" for data without labels.
  """

  name: str
  images: np.ndarray
  captions: list[str]


def draw(source: Source, num: int, tell: Tell = lambda done, total: None) -> ImageSet:
  """Returns `num` images spread at random over a source, or all if there are no more.

  Args:
    source: Where they come from.
    num: How many.
    tell: Is called with the numbers of images that are there and that there will be.
  """
  num = min(num, len(source))
  names = source.class_names or [f"class {i}" for i in range(source.num_classes)] or [""]
  images, captions = [], []
  for batch in train_batches(source, min(BATCH, num), seed=SEED):
    images += list(np.round((np.clip(batch["image"], -1, 1) + 1) * 127.5).astype(np.uint8))
    captions += [names[label] for label in batch["label"]]  # Without labels all of them are 0.
    tell(min(len(images), num), num)
    if len(images) >= num:
      break
  return ImageSet(source.name, np.stack(images[:num]), captions[:num])


def config_of(folder: str) -> Mapping:
  """Returns the config of the run in a folder; {} for an exported model, which has none."""
  config = workdir.read_json(workdir.join(folder, "config.json")) or {}
  return config if "evals" in config else {}


def _evaluated(config: Mapping, names: Sequence[str]) -> list[Mapping]:
  """Returns the data that evaluators name in these settings, those of the run's data set first."""
  settings = config["evals"].values() if config else ()
  data = [s[name] for s in settings for name in names if isinstance(s.get(name), Mapping)]
  return sorted(data, key=lambda spec: spec["name"] != config["data"]["name"])


def held_out(config: Mapping) -> list[Mapping]:
  """Returns data that the run was evaluated on and not trained on."""
  name_and_split = lambda spec: (spec["name"], spec["split"])
  specs = _evaluated(config, ("test", "data"))
  return [spec for spec in specs if name_and_split(spec) != name_and_split(config["data"])]


def trained_on(config: Mapping) -> list[Mapping]:
  """Returns data that the run was trained on, first as evaluators see it: without augmentation."""
  if not config:
    return []
  name = config["data"]["name"]
  specs = _evaluated(config, ("train", "reference"))
  # Files of latents hold no images; evaluators name the images that they were made of.
  specs = [spec for spec in specs if spec["name"] == name or name.startswith("latents:")]
  return [*specs, config["data"]]


def first_source(specs: Iterable[Mapping], size: Size) -> tuple[Source | None, str]:
  """Returns (the first source of images of that size, ""), or (None, the reason)."""
  reasons = []
  for spec in specs:
    try:
      source = load(**{**spec, "cache": False, "shuffle_buffer": SHUFFLE_BUFFER})
      check_size(source, size)
      return source, ""
    except (ValueError, OSError) as error:
      reasons.append(str(error))
  return None, reasons[0] if reasons else "the model does not name such data; --data does"


def check_size(source: Source, size: Size) -> None:
  """Raises ValueError unless the images are of the model's size."""
  if tuple(source.image_size) != tuple(size):
    wanted, actual = (" x ".join(map(str, s)) for s in (size, source.image_size))
    raise ValueError(f"{source.name} has images of {actual}, the model takes {wanted}")


def named_images(data: str, size: Size, data_dir: str = "") -> Source:
  """Returns the images that a command line names.

  Raises:
    FileNotFoundError, ValueError: There are none, or they are not of the model's size.
  """
  source = open_images(data, size[0], data_dir)
  check_size(source, size)
  return source


# The model


def short_name(data: str) -> str:
  """Returns the name of data without the folders that lead to it: the page may be public."""
  kind, colon, path = data.rpartition(":")
  return f"{kind}{colon}{os.path.basename(path.rstrip('/'))}" if os.path.isabs(path) else data


def describe(model: Pretrained) -> str:
  """Returns the line above the page, in Markdown: run, step, size and data."""
  about, config = model.description, config_of(model.folder)
  facts = [
    f"**{'/'.join(model.folder.rstrip('/').split('/')[-2:])}**",
    f"step {model.step}",
    f"{model.weights} weights",
    " ".join(about.model[key] for key in ("name", "variant") if key in about.model),
    f"{' x '.join(map(str, model.image_size))} px",
    f"{model.num_classes} classes" if model.num_classes else "no labels",
  ]
  if config:
    facts.append(f"trained on {short_name(config['data']['name'])}")
  return " · ".join(facts)


@dataclasses.dataclass
class Session:
  """A model and the images that go with it. It serves one request at a time.

  Attributes:
    model: The trained model.
    examples: Images to try things on, None if there are none.
    training: Where neighbours are looked for, None if there is no such data.
    num_training: How many images of it are looked at.
    no_examples, no_training: Why there are none.
  """

  model: Pretrained
  examples: ImageSet | None = None
  training: Source | None = None
  num_training: int = 2000
  no_examples: str = ""
  no_training: str = ""

  def __post_init__(self):
    streams = self.model.description.streams.values()
    self._clean = [s for s in streams if s.get("timesteps", "uniform") == "clean"]
    self._network = self.model.description.inference().model
    self._path = self.model.description.inference().path
    self._represented = None  # the training images and their representations, once they are there

  @property
  def timesteps(self) -> int:
    """T, which is also the most steps that a sampler can take; 0 for real times."""
    return self._path.timesteps

  @property
  def channels(self) -> int:
    """The channels of what the network sees, which guidance can choose from."""
    return self._network.image_size[2]

  @property
  def heads(self) -> list[str]:
    """The heads that samples can be drawn with."""
    return [head for head in self._network.heads if self._path.invertible(head)]

  @property
  def represented_at(self) -> float:
    """The time at which images are represented: 0 if the model ever saw clean ones."""
    t = NOISED * self._path.end
    return 0 if self._clean else max(1, round(t)) if self.timesteps else t

  def lacks(self, task: str) -> str:
    """Returns why "sample", "reconstruct" or "neighbours" makes no sense, "" if it does."""
    if task == "neighbours":
      return "" if self.training else f"there are no images to compare with: {self.no_training}"
    reason = self.model.description.lacks(task)
    masked = any(s.get("mask_ratio", 0) > 0 for s in self._clean)
    if task == "reconstruct" and not reason and not masked:
      return "it never saw clean images with masks, so it cannot fill them in in one pass"
    return reason

  def labels(self, label) -> np.ndarray | None:
    """Returns the ids of a number, a name, several with commas between, "all", or "none"."""
    if label in (None, "", NONE):
      return None
    if isinstance(label, str) and label != ALL and label not in self.model.class_names:
      label = [part.strip() for part in label.split(",")]
    return self.model.label_ids(label)

  def _settings(self, labels: np.ndarray | None, given: Mapping) -> Sampling:
    """Checks settings of sampling before anything is compiled; without labels nothing is guided."""
    guidance = ("cfg_scale", "cfg_channels", "guidance_interval")
    given = {k: v for k, v in given.items() if labels is not None or k not in guidance}
    return self.model.check_sampling(None if labels is None else labels[:1], **given)

  def sample(
    self, label=NONE, num: int = 16, seed: int = 0, watch: bool = True, **settings
  ) -> Iterator[Picture]:
    """Yields samples in a grid; with `watch` first what the model makes of the noise on the way.

    Args:
      label: See `labels`.
      num: The number of samples; several labels come in turn.
      seed: The seed of the noise.
      watch: Whether steps are shown, at most FRAMES, each as soon as it is taken.
      **settings: Fields of `umd.samplers.Sampling`; None for the model's own.

    Raises:
      ValueError: A setting makes no sense; see `Pretrained.sample`.
    """
    labels = self.labels(label)
    sampling = self._settings(labels, settings)
    in_turn = labels is not None and 1 < len(labels) <= min(10, num)
    columns = len(labels) if in_turn else math.ceil(math.sqrt(num))
    arguments = {"seed": seed, **dataclasses.asdict(sampling)}
    start = time.monotonic()
    if watch:
      every = math.ceil(sampling.steps / FRAMES)
      for step, t, images in self.model.steps(labels, num, every=every, **arguments):
        if step < sampling.steps:
          text = f"Step {step} of {sampling.steps}: what the model makes out, t = {t:g}"
          yield pictures.grid(images, columns), text
    else:
      images = self.model.sample(labels, num, **arguments)
    guidance = f", guidance {sampling.cfg_scale:g}" if sampling.cfg_scale != 1 else ""
    text = f"{num} samples: {sampling.sampler}, {sampling.steps} steps{guidance}"
    yield pictures.grid(images, columns), f"{text}, {format_seconds(time.monotonic() - start)}"

  def random_mask(self, ratio: float, seed: int) -> np.ndarray:
    """Returns bool [H, W] that hides a share of the patches, at least one and not all of them."""
    (rows, columns), (height, width, _) = grid(self._network), self.model.image_size
    tokens = num_tokens(self._network)
    hidden = np.zeros(tokens, bool)
    count = min(max(1, round(ratio * tokens)), tokens - 1)
    hidden[np.random.default_rng(seed).permutation(tokens)[:count]] = True
    patch = np.ones((height // rows, width // columns), bool)
    return np.kron(hidden.reshape(rows, columns), patch)

  def fill(
    self,
    image: np.ndarray,
    mask: np.ndarray,
    label=NONE,
    num: int = 2,
    seed: int = 0,
    steps: int | None = None,
    resampling: int = RESAMPLING,
  ) -> tuple[list[Picture], str]:
    """Returns ([the image, the masked image, it filled in], what was done and what was not).

    Args:
      image: uint8 [H, W, C].
      mask: bool [H, W], true where the image is to be filled in.
      label: What the diffusion is told that the image shows, see `labels`.
      num: How many times the diffusion fills it in.
      seed, steps, resampling: Settings of the diffusion, see `Pretrained.inpaint`.

    Raises:
      ValueError: Nothing is masked, or see `Pretrained.inpaint`.
    """
    if not mask.any():
      raise ValueError("Nothing is masked: paint over what is to be filled in, or mask at random.")
    masked = np.where(mask[..., None], np.uint8(HIDDEN), image)
    shown, notes, start = [(image, "image"), (masked, "masked")], [], time.monotonic()
    reason = self.lacks("reconstruct")
    if not reason:
      try:
        images, _ = self.model.reconstruct(image, mask=mask)
        shown.append((images[0], "reconstruction"))
      except ValueError as error:  # The mask touches every patch.
        reason = str(error).rstrip(".")
    if reason:
      notes.append(f"No reconstruction: {reason}")
    if num and self.lacks("sample"):
      notes.append(f"No diffusion: {self.lacks('sample')}")
    elif num:
      labels = self.labels(label)
      settings = dataclasses.asdict(self._settings(labels, {"steps": steps}))
      arguments = dict(seed=seed, resampling=resampling, **settings)
      images = self.model.inpaint(image, mask, labels, num, **arguments)
      shown += [(x, f"diffusion {i + 1}") for i, x in enumerate(images)]
    share = f"{mask.mean():.0%} masked, {format_seconds(time.monotonic() - start)}"
    return shown, ". ".join([share, *notes])

  def neighbours(
    self, image: np.ndarray, k: int = 12, tell: Tell = lambda done, total: None
  ) -> list[Picture]:
    """Returns the k training images most like an image [H, W, C]: by the cosine of representations.

    The first call represents all training images; `tell` is called with how many are done.
    """
    if self._represented is None:
      known = draw(self.training, self.num_training, tell)
      self._represented = known, self._represent(known.images)
    known, features = self._represented
    cosines = features @ self._represent(image[None])[0]
    nearest = np.argsort(-cosines, kind="stable")[:k]
    return [(known.images[i], f"{known.captions[i]} {cosines[i]:.3f}".strip()) for i in nearest]

  def _represent(self, images: np.ndarray) -> np.ndarray:
    """Returns representations [n, D] of length 1."""
    features = self.model.represent(images, t=self.represented_at)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

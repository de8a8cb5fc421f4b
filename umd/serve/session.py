"""What the page can do with a trained model, without the page: arrays in, arrays and words out."""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from umd.data import Source, load, train_batches
from umd.data.sources import open_images
from umd.models.network import grid
from umd.runs import workdir
from umd.runs.progress import format_seconds
from umd.samplers import Sampling
from umd.trained import pictures
from umd.trained.inputs import ALL
from umd.trained.model import Pretrained
from umd.trained.saved import CONFIG, FORMAT

SIDE = 256  # Small images are shown enlarged, about so many pixels wide.
COVERED = 0.25  # A pixel is to be filled in if so much of it is painted over.
PAINT = (230, 30, 120)
HIDDEN = 128  # The grey in place of what the model is not shown.

Size = tuple[int, int, int]


def enlarge(image: np.ndarray, side: int = SIDE) -> np.ndarray:
  """uint8 [H, W, C] as [s H, s W, 3], each pixel an s x s block, about `side` pixels high."""
  scale = max(1, side // image.shape[0])
  return np.broadcast_to(_blocks(image, scale), (*np.multiply(image.shape[:2], scale), 3))


def _blocks(array: np.ndarray, scale: int) -> np.ndarray:
  return array.repeat(scale, axis=0).repeat(scale, axis=1)


def cover(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """The image [H, W, C], grey where the mask [H, W] is true."""
  return np.where(mask[..., None], np.uint8(HIDDEN), image)


def _over_white(image):
  """A Pillow image, upright, as RGB; transparent parts are white."""
  from PIL import Image, ImageOps

  image = ImageOps.exif_transpose(image)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert("RGB")


def _middle(width: int, height: int, size: Size) -> tuple[float, float, float, float]:
  """The largest box (left, top, right, bottom) in the middle of the proportions of `size`."""
  rows, columns, _ = size
  scale = min(width / columns, height / rows)
  left, top = (width - columns * scale) / 2, (height - rows * scale) / 2
  return left, top, left + columns * scale, top + rows * scale


def fit(image, size: Size) -> tuple[np.ndarray, str]:
  """A Pillow image as uint8 (H, W, C) of the model's size, and what was done to it ("" if nothing).

  One of another size is cropped to the middle and resized. What `enlarge` made comes back exactly.
  """
  from PIL import Image

  image = _over_white(image)
  (width, height), (rows, columns, channels) = image.size, size
  whole = width % columns == 0 and width * rows == height * columns
  how = Image.Resampling.BOX if whole else Image.Resampling.BILINEAR
  small = image.resize((columns, rows), how, box=_middle(width, height, size))
  exact = whole and np.array_equal(_blocks(np.asarray(small), width // columns), image)
  done = f"{height} x {width} px, cropped to the middle and resized to {rows} x {columns}"
  small = small.convert("L") if channels == 1 else small
  return np.asarray(small, np.uint8).reshape(size), "" if exact else done


def paint(mask: np.ndarray, scale: int) -> np.ndarray:
  """A mask [H, W] as a layer of the editor: RGBA, [s H, s W, 4], transparent where it is false."""
  layer = np.zeros((*mask.shape, 4), np.uint8)
  layer[mask] = (*PAINT, 255)
  return _blocks(layer, scale)


def painted(layers, size: Size) -> np.ndarray:
  """bool [H, W] of the model's size: what is painted over in Pillow layers of one size.

  The same part in the middle is taken as `fit` takes of an image of that size.
  """
  from PIL import Image

  share = np.zeros(size[:2], np.float32)
  for layer in layers:
    alpha = layer.convert("RGBA").getchannel("A").point(lambda level: 255 * (level > 0))
    box = _middle(*alpha.size, size)
    alpha = alpha.resize((size[1], size[0]), Image.Resampling.BOX, box=box)
    share = np.maximum(share, np.asarray(alpha, np.float32) / 255)
  # A line too thin for that counts where it is thickest.
  return share >= max(min(COVERED, float(share.max())), 1e-6)


def white(image, size: Size, image_size: tuple[int, int]) -> np.ndarray:
  """bool [H, W] of the model's size: where a black and white Pillow image is white.

  Args:
    image: the mask; of the size of the picture that it is for, or of the model's.
    size: (H, W, C).
    image_size: (width, height) of that picture.

  Raises:
    ValueError: it has another size.
  """
  from PIL import Image

  levels = image.convert("L").point(lambda level: 255 * (level > 127))
  if levels.size not in ((size[1], size[0]), image_size):
    raise ValueError(
      f"the mask is {levels.size[1]} x {levels.size[0]} px: make it of the image's size, "
      f"{image_size[1]} x {image_size[0]}, or of the model's, {size[0]} x {size[1]}."
    )
  alpha = Image.new("RGBA", levels.size)
  alpha.putalpha(levels)
  return painted([alpha], size)


HELD_OUT, TRAINED_ON = ("test", "data"), ("train", "reference")  # Settings of evaluators.
BATCH, SHUFFLED, SEED = 64, 4096, 0


Tell = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images [n, H, W, C], uint8, and their labels.

  Attributes:
    name: of the data.
    images: in no order.
    labels: int32 [n], or None for data without.
    class_names: of the labels; () if the data has none.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray | None
  class_names: tuple[str, ...]

  def label(self, i: int) -> str:
    """What image i shows, in words; "" where nobody knows."""
    if self.labels is None:
      return ""
    label = int(self.labels[i])
    return self.class_names[label] if self.class_names else f"class {label}"


def draw(source: Source, num: int, tell: Tell = lambda done, total: None) -> ImageSet:
  """`num` images of a source, or all if there are no more, spread at random over it."""
  num = min(num, len(source))
  size, images, labels = min(BATCH, num), [], []
  for batch in train_batches(source, size, seed=SEED):
    images.append(np.round((np.clip(batch["image"], -1, 1) + 1) * 127.5).astype(np.uint8))
    labels.append(np.array(batch["label"]))  # The batch may be a view of memory that is reused.
    tell(min(len(images) * size, num), num)
    if len(images) * size >= num:
      break
  labels = np.concatenate(labels)[:num] if source.num_classes else None
  return ImageSet(source.name, np.concatenate(images)[:num], labels, source.class_names)


def config_of(folder: str) -> Mapping | None:
  """The config of the run in a folder; None for an exported model, which has none."""
  config = workdir.read_json(workdir.join(folder, CONFIG)) or {}
  return None if FORMAT in config else config


def _specs(config: Mapping, names: Sequence[str]) -> Iterator[Mapping]:
  """Data of the run's evaluators under settings of these names; its own data set comes first."""
  settings = config["evals"].values()
  found = [s[n] for s in settings for n in names if isinstance(s.get(n), Mapping)]
  own = config["data"]["name"]
  yield from sorted(found, key=lambda spec: spec["name"] != own)


def _first(specs: Iterator[Mapping], size: Size) -> Source:
  """The first source of images of that size.

  Raises:
    ValueError: there is none; says why.
  """
  reasons = []
  for spec in specs:
    try:
      source = load(**{**spec, "cache": False, "shuffle_buffer": SHUFFLED})
    except (ValueError, OSError) as error:
      reasons.append(str(error))
      continue
    if tuple(source.image_size) == tuple(size):
      return source
    wanted, is_ = (" x ".join(map(str, s)) for s in (size, source.image_size))
    reasons.append(f"{source.name} has images of {is_}, the model takes {wanted}")
  raise ValueError(reasons[0] if reasons else "the run names no such data")


def held_out(config: Mapping, size: Size) -> Source:
  """Images that the run was evaluated on and not trained on; ValueError if there are none here."""
  own = config["data"]["name"], config["data"]["split"]
  differs = lambda spec: (spec["name"], spec["split"]) != own
  return _first(filter(differs, _specs(config, HELD_OUT)), size)


def trained_on(config: Mapping, size: Size) -> Source:
  """Images that the run was trained on, if it can be without augmentation; ValueError if none."""

  def specs():
    own = config["data"]["name"]
    for spec in _specs(config, TRAINED_ON):
      if spec["name"] == own or own.startswith("latents:"):
        yield spec
    yield config["data"]

  return _first(specs(), size)


def named(data: str, size: Size, data_dir: str = "") -> Source:
  """The images that a command line names, see `umd.data.sources`.

  Raises:
    FileNotFoundError, ValueError: there are none, or not of the model's size.
  """
  source = open_images(data, size[0], data_dir)
  if tuple(source.image_size) != tuple(size):
    wanted, found = (" x ".join(map(str, s)) for s in (size, source.image_size))
    raise ValueError(f"--data={data!r} gives images of {found}, but the model takes {wanted}.")
  return source


NONE = "none"
FRAMES, WIDTH = 24, 480  # Of what is shown of the denoising; of a grid in pixels, about.
SAMPLES, FILLED, NEIGHBOURS = 64, 8, 50  # At most.
RESAMPLING, RESAMPLED = 4, 20  # Unless it is said, and at most: of `inpaint`.
NOISED = 0.05  # Share of T at which a model looks at images that never saw clean ones.

Picture = tuple[np.ndarray, str]  # And what it shows.


def _whole(name: str, value, low: int, high: int) -> int:
  """A whole number of a form; ValueError if it is none or out of range."""
  if isinstance(value, bool) or not isinstance(value, (int, float, np.integer)) or value % 1:
    raise ValueError(f"{name}={value!r} must be a whole number.")
  if not low <= value <= high:
    raise ValueError(f"{name}={int(value)} must be in {low}..{high}.")
  return int(value)


def _columns(n: int, labels: np.ndarray | None) -> int:
  """Of a grid: one for each class if they come in turn, else about as many as rows."""
  in_turn = labels is not None and 1 < len(labels) <= 10 and n >= len(labels)
  return len(labels) if in_turn else math.ceil(math.sqrt(n))


def _grid(images: np.ndarray, columns: int) -> np.ndarray:
  return enlarge(tiled := pictures.grid(images, columns), WIDTH * len(tiled) // tiled.shape[1])


@dataclasses.dataclass
class Session:
  """One model and the images that go with it; whoever asks first is served first.

  Attributes:
    model: what was loaded.
    examples: images to try things on, or None.
    open_training: returns the images among which neighbours are looked for; called once, at the
      first use, with a `tell(done, total)`. None if there are none.
    no_examples, no_training: why there are none.
  """

  model: Pretrained
  examples: ImageSet | None = None
  open_training: Callable[[Tell], ImageSet] | None = None
  no_examples: str = ""
  no_training: str = ""

  def __post_init__(self):
    self._lock, self._known = threading.Lock(), None
    streams = self.model.description.streams.values()
    self._clean = [s for s in streams if s.get("timesteps", "uniform") == "clean"]
    self._inference = self.model.description.inference()

  @property
  def timesteps(self) -> int:
    """T, and so the most steps that a sampler can take."""
    return self._inference.path.timesteps

  @property
  def channels(self) -> int:
    """Of what the model sees."""
    return self._inference.model.image_size[2]

  @property
  def heads(self) -> list[str]:
    """Those that samples can start from."""
    model, path = self._inference.model, self._inference.path
    return [head for head in model.heads if path.invertible(head)]

  def lacks(self, task: str) -> str:
    """Why "sample", "labels", "reconstruct", "inpaint" or "neighbours" makes no sense; "" if so."""
    if task == "labels":
      return "" if self.model.num_classes else "it was trained without labels"
    if task == "neighbours":
      return (
        "" if self.open_training else f"there are no images to compare with: {self.no_training}"
      )
    if task == "inpaint":
      return self.model.description.lacks("sample")
    reason = self.model.description.lacks(task)
    masked = any(s.get("mask_ratio", 0) > 0 for s in self._clean)
    if task == "reconstruct" and not reason and not masked:
      return "it never saw clean images with masks, so it cannot fill them in in one pass"
    return reason

  @property
  def looks_at(self) -> int:
    """The timestep at which images are represented: 0 if the model ever saw clean ones."""
    return 0 if self._clean else max(1, round(NOISED * self.timesteps))

  def labels(self, label) -> np.ndarray | None:
    """Ids of a number, a name, several with commas between, "all", or "none"."""
    if label is None or label == NONE or label == "":
      return None
    if isinstance(label, str) and label != ALL and label not in self.model.class_names:
      label = [part.strip() for part in label.split(",")]
    return self.model.label_ids(label)

  def _settings(
    self, labels, cfg_scale, low, high, sampler, steps, spacing="", eta=None, head="", channels=None
  ) -> Sampling:
    """Settings of sampling, checked before anything is compiled."""
    given = dict(sampler=sampler or None, steps=steps and _whole("steps", steps, 1, self.timesteps))
    given |= dict(spacing=spacing or None, head=head or None, eta=eta)
    if labels is not None:  # Else there is nothing to guide by.
      if channels is not None:
        given["cfg_channels"] = _whole("cfg_channels", channels, 0, self.channels)
      if cfg_scale is not None and not 0 <= cfg_scale <= 100:
        raise ValueError(f"cfg_scale={cfg_scale} must be in [0, 100]; 1 is no guidance.")
      interval = None if None in (low, high) else (float(low), float(high))
      given |= dict(cfg_scale=cfg_scale, guidance_interval=interval)
    some = None if labels is None else labels[:1]
    return self.model.check_sampling(some, **given)

  def sample(
    self,
    label=NONE,
    num: int = 16,
    seed: int = 0,
    cfg_scale: float | None = None,
    low: float | None = 0.0,
    high: float | None = 1.0,
    sampler: str = "",
    steps: int | None = None,
    watch: bool = True,
    spacing: str = "",
    eta: float | None = None,
    head: str = "",
    cfg_channels: int | None = None,
  ) -> Iterator[Picture]:
    """Samples in a grid; with `watch` what the model takes the noise for, while it computes.

    Args:
      label: see `labels`.
      num: how many; several labels come in turn.
      seed: of the noise.
      cfg_scale, low, high: guidance, and the shares of T between which it is used.
      sampler, steps, spacing, eta, head, cfg_channels: "" and None for the run's own.
      watch: of the steps at most FRAMES are shown, each as soon as it is there.

    Raises:
      ValueError: see `Pretrained.sample`; before anything is computed.
    """
    self._refuse("sample")
    ids, num = self.labels(label), _whole("the number of samples", num, 1, SAMPLES)
    seed = _whole("seed", seed, 0, 2**32 - 1)
    rest = (spacing, eta, head, cfg_channels)
    settings = self._settings(ids, cfg_scale, low, high, sampler, steps, *rest)
    columns, start, total = _columns(num, ids), time.monotonic(), settings.steps
    with self._lock:
      if watch:
        given = dict(seed=seed, every=math.ceil(total / FRAMES), **dataclasses.asdict(settings))
        for step, t, made in self.model.steps(ids, num, **given):
          text = f"Step {step} of {total}: what the model makes out, t = {t}"
          if t:
            yield _grid(made, columns), text
      else:
        made = self.model.sample(ids, num, seed=seed, **dataclasses.asdict(settings))
    seconds = time.monotonic() - start
    yield _grid(made, columns), f"{_told(num, 'sample', settings)}, {format_seconds(seconds)}"

  def random_mask(self, ratio: float, seed: int) -> np.ndarray:
    """bool [H, W]: that share of the model's patches, at least one and not all."""
    model, (height, width, _) = self._inference.model, self.model.image_size
    rows, columns = grid(model)
    tokens = rows * columns
    hidden = np.zeros(tokens, bool)
    count = min(max(1, round(ratio * tokens)), tokens - 1)
    hidden[np.random.default_rng(seed).permutation(tokens)[:count]] = True
    ones = np.ones((height // rows, width // columns), bool)
    return np.kron(hidden.reshape(rows, columns), ones)

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
    """([the image, what is known of it, how it was filled in], what was done and what was not).

    Args:
      image: uint8 [H, W, C].
      mask: bool [H, W], true where it is to be filled in.
      label: what the diffusion is told that it shows, see `labels`.
      num: how often the diffusion fills it in; 0: not at all.
      seed, steps, resampling: of the diffusion, see `Pretrained.inpaint`.

    Raises:
      ValueError: nothing is masked; or see `Pretrained.inpaint`.
    """
    if not mask.any():
      raise ValueError("Nothing is masked: paint over what is to be filled in, or mask at random.")
    ids, num = self.labels(label), _whole("the number of fillings", num, 0, FILLED)
    seed = _whole("seed", seed, 0, 2**32 - 1)
    resampling = _whole("resampling", resampling, 1, RESAMPLED)
    shown = [(image, "image"), (cover(image, mask), "masked")]
    notes, start = [], time.monotonic()
    reason = self.lacks("reconstruct")
    if not reason and self._hides_all(mask):
      reason = "the mask touches every patch, so the encoder would see nothing"
    if reason:
      notes.append(f"No reconstruction: {reason}.")
    diffuse = num and not self.lacks("inpaint")
    if num and not diffuse:
      notes.append(f"No diffusion: {self.lacks('inpaint')}.")
    if diffuse:  # Before anything is compiled.
      settings = self._settings(ids, None, None, None, "", steps)
    with self._lock:
      if not reason:
        filled, _ = self.model.reconstruct(image, mask=mask)
        shown.append((filled[0], "reconstruction"))
      if diffuse:
        given = dict(seed=seed, resampling=resampling, **dataclasses.asdict(settings))
        made = self.model.inpaint(image, mask, ids, num, **given)
        shown += [(x, f"diffusion {i + 1}") for i, x in enumerate(made)]
    share = f"{mask.mean():.0%} masked, {format_seconds(time.monotonic() - start)}"
    pictures_ = [(enlarge(x), text) for x, text in shown]
    return pictures_, ". ".join([share, *(note.rstrip(".") for note in notes)])

  def _hides_all(self, mask: np.ndarray) -> bool:
    (rows, columns), (height, width) = grid(self._inference.model), mask.shape
    tiles = mask.reshape(rows, height // rows, columns, width // columns)
    return bool(tiles.any(axis=(1, 3)).all())

  def neighbours(
    self, image: np.ndarray, k: int = 12, tell: Tell = lambda done, total: None
  ) -> list[Picture]:
    """The k training images most like an image [H, W, C], by the cosine of representations.

    The first call represents all training images; `tell` hears how far that is.
    """
    self._refuse("neighbours")
    k = _whole("k", k, 1, NEIGHBOURS)
    with self._lock:
      known, features = self._known = self._known or self._represent(tell)
      query = self._unit(self.model.represent(image, t=self.looks_at))[0]
    likeness = features @ query
    found = np.argsort(-likeness, kind="stable")[:k]
    captions = (f"{known.label(i)} {likeness[i]:.3f}".strip() for i in found)
    return [(enlarge(known.images[i]), text) for i, text in zip(found, captions, strict=True)]

  def _represent(self, tell: Tell) -> tuple[ImageSet, np.ndarray]:
    """The training images and their representations, each of length 1."""
    known, parts, size = self.open_training(tell), [], 256
    for start in range(0, len(known.images), size):
      tell(start, len(known.images))
      parts.append(self.model.represent(known.images[start : start + size], t=self.looks_at))
    return known, self._unit(np.concatenate(parts))

  @staticmethod
  def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

  def _refuse(self, task: str) -> None:
    if reason := self.lacks(task):
      raise ValueError(f"This model cannot do that: {reason}.")


def _told(num: int, what: str, settings: Sampling) -> str:
  """What was drawn, in words."""
  shown = f"{num} {what}{'s' if num > 1 else ''}: {settings.sampler}, {settings.steps} steps"
  if settings.cfg_scale != 1:
    shown += f", guidance {settings.cfg_scale:g}"
    if settings.guidance_interval != (0, 1):
      low, high = settings.guidance_interval
      shown += f" from {low:g} to {high:g} of T"
  return shown

"""What input costs: images/s of ways to decode, crop and resize JPEGs, and their errors.

python -m benchmarks.input --data imagenet_sample --size 64 256 --out input.jsonl

Every way runs in the trainer's own pipeline (JPEGs in memory, shuffled, a random crop, mirrored, in
[-1, 1], in batches). Windows are the same for all. `per core` counts the seconds of CPU time of the
whole process, and `images/s` those of the clock.

  plain     decodes the whole image, crops, resizes with antialiasing
  public    decodes the window only, by TensorFlow's default DCT, resizes without antialiasing
  fused     decodes the window only, resizes with antialiasing
  scaled K  the same, the window decoded 2, 4 or 8 times smaller where K times the size is left
  cached    images that were decoded and resized before (no crop)
"""

import argparse
import gc
import time
from collections.abc import Iterator

import numpy as np

from benchmarks import harness
from benchmarks.harness import Column, Times
from tools.command_line import positive
from umd import data
from umd.data import Source, ops
from umd.data.decoding import inception_window
from umd.data.host import tensorflow
from umd.data.records import Records, row

COLUMNS = (
  Column("px", "size"),
  Column("", "kind", "{:>12}"),
  Column("images/s per core", "per_core", "{:.0f}"),
  Column("images/s", "images_per_second", "{:.0f}"),
  Column("x plain", "times_plain", "{:.2f}"),
  Column("(range)", "times_plain_range", "{0[0]:.2f}-{0[1]:.2f}"),
  Column("x public", "times_public", "{:.2f}"),
  Column("(range)", "times_public_range", "{0[0]:.2f}-{0[1]:.2f}"),
  Column("error", "error_of_255", "{:.2f}"),
)
MADE = 128  # JPEGs that are made where there is no data.
SIDES = (375, 500)  # Height and width of most of ImageNet's.
QUALITY = 85  # For 104 kB, as ImageNet has.
SCALED = (1.0, 1.25, 1.5, 2.0)
SEED = 0
BASE = "plain"  # What the ratios are to.
WARM_UP = 4  # Batches: tf.data finds out how many threads to use.
CACHED = 1024  # Images of the final size.
FASTER = 8  # About so much faster are these: more batches are timed.


class Made(Records):
  """Noise whose amplitude falls with frequency as that of photographs, as JPEGs."""

  def __init__(self):
    super().__init__("made JPEGs", "string", (None, None, 3), 0)
    rng, tf = np.random.default_rng(SEED), tensorflow()
    self._images = np.empty(MADE, object)
    for i in range(MADE):
      pixels = _noise(rng, *SIDES)
      self._images[i] = tf.io.encode_jpeg(pixels, quality=QUALITY).numpy()

  def __len__(self):
    return MADE

  def fetch(self, ids):
    return {"image": self._images[ids], "label": np.zeros(len(ids), np.int32)}


def _noise(rng, height: int, width: int) -> np.ndarray:
  """uint8 [height, width, 3]; the amplitude of a frequency f is as 1 / f."""
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
  frequency[0, 0] = np.inf
  planes = []
  for strength in (1.0, 0.3, 0.3):  # Brightness, and differences of colour.
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
    plane = np.fft.irfft2(spectrum, (height, width))
    planes.append(strength * 55 * plane / plane.std())
  luma, red, blue = planes
  image = 127 + np.stack([luma + red, luma - red - blue, luma + blue], axis=-1)
  return image.clip(0, 255).astype(np.uint8)


def open_jpegs(name: str, data_dir: str) -> Records:
  """The undecoded images of a data set, in memory; made ones if `name` is empty."""
  if not name:
    return Made()
  kind = name if ":" in name else f"tfds:{name}"
  pp = "decode_jpeg_and_inception_crop(8)|value_range(-1, 1)"
  return data.load(kind, "train", pp, data_dir=data_dir, cache=True).records


class Prepared:
  """Crops, mirrors at random and scales to [-1, 1]; stands where a source has its `Preprocess`."""

  def __init__(self, crop: ops.Op, size: int):
    self._ops = (crop, ops.flip_lr(), ops.value_range(-1, 1))
    self.image_size = (size, size, 3)
    self.spec = {"image": (self.image_size, "float32"), "label": ((), "int32")}

  def __call__(self, example, seed: int, position):
    tf = tensorflow()
    drawn = tf.stack([tf.constant(seed, tf.int64), tf.cast(position, tf.int64)])
    for op in self._ops:
      example = op(example, ops.OpContext(drawn, (None, None, 3)))
    return {"image": tf.ensure_shape(example["image"], self.spec["image"][0]), "label": 0}


def public_crop(size: int, area: float) -> ops.Op:
  """As published training code does it: TensorFlow's default DCT, no antialiasing."""

  def op(example, context):
    tf = tensorflow()
    shape = tf.io.extract_jpeg_shape(example["image"])
    window = inception_window(shape, context.seed, (area, 100))
    image = tf.io.decode_and_crop_jpeg(example["image"], window, channels=3)
    return {**example, "image": tf.image.resize(image, (size, size), method="bilinear")}

  return op


def plain_crop(size: int, area: float) -> ops.Op:
  """decode|inception_crop, with one draw."""
  decode, crop = ops.decode(3), ops.inception_crop(size, area)
  return lambda example, context: crop(decode(example, context), context)


def crops(size: int, area: float) -> dict[str, ops.Op]:
  """{name: op} of all ways but "cached"."""
  fused = lambda scaled: ops.decode_jpeg_and_inception_crop(size, area, scaled=scaled)
  scaled = {f"scaled {k:g}": fused(k) for k in SCALED}
  public, plain = public_crop(size, area), plain_crop(size, area)
  return {BASE: plain, "public": public, "fused": fused(0), **scaled}


def sources(records: Records, size: int, area: float) -> dict[str, Source]:
  """{name: the JPEGs, prepared in one of the ways}; of `cached`, pixels of the final size."""
  kinds = crops(size, area).items()
  found = {name: Source(records, Prepared(crop, size)) for name, crop in kinds}
  count = min(len(records), CACHED)
  pixels = np.random.default_rng(SEED).integers(0, 256, (count, size, size, 3), np.uint8)
  found["cached"] = data.from_arrays("cached", pixels, None, 0, "flip_lr|value_range(-1, 1)")
  return found


def errors(records: Records, size: int, area: float, images: int) -> dict[str, float]:
  """{name: mean absolute difference from full decode with antialiasing, of 255}, over some images.

  Also "energy <name>": the mean squared difference of neighbours in a row, by that of BASE.
  """
  tf = tensorflow()
  found, energies = {}, {}
  for index in np.linspace(0, len(records) - 1, min(images, len(records)), dtype=np.int64):
    example = records.parse(row(records, int(index)))
    context = ops.OpContext(tf.constant([SEED, index], tf.int64), (None, None, 3))
    results = {k: op(example, context)["image"].numpy() for k, op in crops(size, area).items()}
    for name, image in results.items():
      found.setdefault(name, []).append(np.abs(image - results[BASE]).mean())
      energies.setdefault(name, []).append((np.diff(image, axis=1) ** 2).mean())
  energy = {f"energy {k}": float(sum(v) / sum(energies[BASE])) for k, v in energies.items()}
  return {**{k: float(np.mean(v)) for k, v in found.items()}, **energy}


def time_one(source: Source, batch_size: int, batches: int) -> tuple[float, float]:
  """Seconds an image, (by the clock, of all cores), of a pipeline that has begun to flow."""
  stream = data.train_batches(source, batch_size, seed=SEED)
  for _ in range(WARM_UP):
    next(stream)
  cpu, wall = time.process_time(), time.perf_counter()
  for _ in range(batches):
    next(stream)
  cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
  del stream  # Its threads would read ahead while the next one is timed.
  gc.collect()
  return wall / (batches * batch_size), cpu / (batches * batch_size)


def measure(records: Records, size: int, args: argparse.Namespace) -> list[dict]:
  """A row per way."""
  ways = sources(records, size, args.area_min)
  off = errors(records, size, args.area_min, args.images)
  times = {name: Times([], []) for name in ways}
  for _ in range(args.repeats):  # In turns: what slows the machine down slows all.
    for name, source in ways.items():
      faster = FASTER if name == "cached" else 1
      wall, cores = time_one(source, args.batch_size, args.batches * faster)
      times[name].wall.append(wall)
      times[name].cores.append(cores)
  # Ways are compared by the seconds of all cores: how many cores were free does not count.
  by_cores = {name: Times(own.cores, own.cores) for name, own in times.items()}
  made = []
  for name, own in by_cores.items():
    line = {"kind": name, "size": size}
    line |= {"per_core": 1 / own.median, "images_per_second": 1 / times[name].median}
    for other in (BASE, "public"):
      ratio, least, most = own.faster_than(by_cores[other])
      line |= {f"times_{other}": ratio, f"times_{other}_range": [least, most]}
    made.append(line | {"error_of_255": off.get(name), "energy": off.get(f"energy {name}")})
  return made


def rows(args: argparse.Namespace) -> Iterator[dict]:
  """A row for each size and way."""
  records = open_jpegs(args.data, args.data_dir)
  print(f"{len(records)} JPEGs of {records.name}; the error is the mean of {args.images} images")
  for size in args.size:
    yield from measure(records, size, args)


def main(argv: list[str] | None = None) -> None:
  parser = harness.parser("input", __doc__)
  add = parser.add_argument
  add("--data", default="", help="TFDS name of the JPEGs, or folder:PATH; by default they are made")
  add("--data_dir", default="", help="where TFDS keeps its data")
  add("--size", type=positive, nargs="+", default=[64, 256], help="pixels")
  add("--area_min", type=float, default=80, help="of a crop, percent of the area")
  add("--batch_size", type=positive, default=64)
  add("--batches", type=positive, default=16, help="that are timed at a time")
  add("--images", type=positive, default=100, help="over which errors are taken")
  harness.main(parser, COLUMNS, rows, argv)


if __name__ == "__main__":
  main()

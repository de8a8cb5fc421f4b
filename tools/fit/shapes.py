"""What a config would train, in shapes alone: for devices that are not here, without its data.

The step is the trainer's own. Only what is known by opening files is stood in for: the images' size
follows from the preprocessing, a published VAE's from its name.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from trainers import diffusion, kl_vae
from trainers.config import describe
from trainers.config.records import Diffusion, to_dict
from trainers.optim import make_step
from umd import data
from umd.codecs import vae_files
from umd.codecs.codec import Codec, Latents, Pixels
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.data.preprocess import Preprocess
from umd.devices import memory
from umd.devices import mesh as sharding
from umd.state import Step, TrainState

ALWAYS_HERE, STORED = ("digits",), "latents:"  # Kinds of data.
IMAGES = 1_281_167  # Of data that are not opened: ImageNet's. Only schedules depend on it.
SIXTEEN = Architecture(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
# Of the VAEs in `umd.codecs.vae_files.PUBLISHED`; their scaling does not matter here.
PUBLISHED = {"sd3": SIXTEEN, "flux": SIXTEEN}


@dataclasses.dataclass(frozen=True)
class Unread:
  """What stands in for a source of data.

  Attributes:
    name: of the data.
    image_size: (H, W, C) of what a batch holds: images, or moments of latents.
    num_classes: number of labels.
    length: number of images.
  """

  name: str
  image_size: tuple[int, int, int]
  num_classes: int
  length: int = IMAGES

  def __len__(self) -> int:
    return self.length


class Planned(NamedTuple):
  """A stage in shapes.

  Attributes:
    parts: as the trainer's `prepare` makes them, without evaluators.
    state: shapes with shardings, and
    batch: likewise.
    step: jitted, to be lowered for these two.
    idle: bytes that lie on each device and that the step does not read: a VAE, of stored latents.
  """

  parts: diffusion.Parts
  state: TrainState
  batch: dict
  step: Step
  idle: int


def _sized(config: Diffusion, side: int) -> tuple[int, int, int]:
  """(H, W, C) of the images that are read, before any VAE."""
  if side:
    return side, side, 3
  if config.data.name.startswith(STORED):
    raise ValueError(
      f"data.name={config.data.name!r} does not say how large the images were. Give --image_size "
      "(their side in pixels)."
    )
  return Preprocess(config.data.pp, "string", (None, None, 3), config.data.name).image_size


def _source(config: Diffusion, side: int, num_classes: int) -> Unread:
  """What is known of the data; they are opened only if their labels must be counted."""
  settings = to_dict(config.data)
  if settings["name"].partition(":")[0] in ALWAYS_HERE:
    found = data.load(**settings)
    return Unread(found.name, found.image_size, found.num_classes, len(found))
  if config.use_labels and not num_classes:
    try:
      num_classes = data.load(**settings).num_classes
    except (ValueError, OSError) as error:
      raise ValueError(f"{error}\nOr give --num_classes, and the data need not be here.") from None
  return Unread(settings["name"], _sized(config, side), num_classes)


def _codec(config: Diffusion, mesh: Mesh) -> Codec:
  """The config's codec; of a VAE the shapes of its parameters."""
  settings = to_dict(config.latents)
  if not settings:
    return Pixels()
  name = settings.pop("vae")
  if name in vae_files.PUBLISHED:
    architecture = PUBLISHED.get(name, Architecture())
  else:
    architecture = vae_files.load(name).architecture
  codec = Latents(vae_files.VaeWeights(name, architecture, {}, ""), mesh, **settings)
  network = KLAutoEncoder(architecture, settings["dtype"])
  params = jax.eval_shape(kl_vae.init_params(network), jax.random.key(0))
  codec.params = sharding.placed(params, sharding.replicated(mesh))
  return codec


def plan(config: Diffusion, devices, side: int = 0, num_classes: int = 0) -> Planned:
  """Builds a stage of the trainer "diffusion" for devices that need not be here.

  Args:
    config: of the stage.
    devices: of the mesh.
    side: of the images in pixels; 0: as the preprocessing says.
    num_classes: number of labels; 0: as the data say, which are opened if it matters.

  Raises:
    ValueError: as the trainer's `prepare`; or size or number cannot be known.
    FileNotFoundError: the VAE is none that is published, and is not there.
  """
  mesh = sharding.make_mesh(devices, config.fsdp)
  sharding.check_divides("batch_size", config.batch_size, mesh)
  source = _source(config, side, num_classes)
  codec = _codec(config, mesh)
  seen = codec.model_size(source.image_size)
  idle = 0
  if config.data.name.startswith(STORED):  # A batch holds moments of what the model sees.
    source = dataclasses.replace(source, image_size=(*seen[:2], 2 * seen[2]))
    idle = memory.nbytes(codec.params)
  parts = diffusion.assemble(config, mesh, source, codec, seen)
  parts = parts._replace(work=diffusion.count_work(parts.objective, mesh))
  shapes = describe.state_sizes(parts)
  state = sharding.placed(shapes, sharding.state_shardings(shapes, mesh))
  rows = config.batch_size
  batch = {
    "image": jax.ShapeDtypeStruct((rows, *source.image_size), jnp.float32),
    "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
  }
  batch = sharding.placed(batch, sharding.batch_sharding(mesh))
  return Planned(parts, state, batch, make_step(config, parts, state), idle)

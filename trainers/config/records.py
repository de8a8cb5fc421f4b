"""All that a config may hold, as records: one class for each section and one for each trainer.

A field says the type, range, default and meaning of a value once. Where a section holds settings of
a class that exists elsewhere, such as `Stream` or `Guard`, that class is the record. How records
are read from a config is told in `trainers.config.read`.
"""

import dataclasses
import functools
import operator
import typing
from collections.abc import Mapping
from typing import Any

import evaluators
from trainers.config.read import OneOf, setting
from umd.codecs.vae import Architecture
from umd.models import MODELS
from umd.models.layers.attention import IMPLEMENTATIONS
from umd.models.layers.blocks import CONDITIONS, REMAT
from umd.objectives import Stream, Term
from umd.paths import PATHS
from umd.runs.checkpoint import WEIGHTS, Retention
from umd.samplers import Sampling
from umd.state import Guard

COUNT, NATURAL, POSITIVE, SHARE = "[1, inf)", "[0, inf)", "(0, inf)", "[0, 1)"
DTYPES = ("float32", "bfloat16")

record = dataclasses.dataclass(frozen=True, kw_only=True)


def to_dict(value) -> Any:
  """Turns a record, and all records in it, into dicts."""
  if isinstance(value, Mapping):
    return {key: to_dict(inner) for key, inner in value.items()}
  return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def given(value) -> dict[str, Any]:
  """Returns the fields of a record that are not None."""
  return {name: field for name, field in to_dict(value).items() if field is not None}


@record
class Data:
  """A part of a data set and its preprocessing: the arguments of `umd.data.load`."""

  name: str = setting("'digits', 'tfds:NAME', 'folder:PATH' or 'npz:FILE'.", filled=True)
  split: str
  pp: str = setting("Operations, joined by '|'.", default="")
  data_dir: str = setting("Where TFDS keeps its data.", default="")
  cache: bool = setting("Keep the encoded images in memory.", default=False)
  shuffle_buffer: int = setting("Records to shuffle among.", COUNT, default=50_000)
  max_bad: float = setting(
    "A number of images that may be unreadable, a share below 1, or -1 for the default.",
    "[-1, inf)",
    default=-1.0,
  )


@record
class LatentSpace:
  """What makes latents of images: the arguments of `umd.codecs.codec.make`."""

  vae: str = setting("A published name, a folder, or hf:ORG/REPO.", filled=True)
  dtype: str = setting("The type of the computation.", DTYPES, default="bfloat16")
  chunk: int = setting("Images that a device encodes at a time.", COUNT, default=8)
  tile: int = setting("Side in pixels; 0 for no tiles.", NATURAL, default=0)


@record
class Optim:
  """AdamW, with a warm-up to the peak of the learning rate and a cosine from there to 0."""

  lr: float = setting("The peak of the learning rate.", POSITIVE)
  warmup: float = setting("It is a share of the steps.", SHARE)
  wd: float = setting("Weight decay.", NATURAL)
  beta1: float = setting("Decay of the first moment.", SHARE)
  beta2: float = setting("Decay of the second moment.", SHARE)
  clip_norm: float = setting("float('inf') clips nothing.", "(0, inf]")
  mu_dtype: str | None = setting(
    "The type of the first moment.", (None, *DTYPES), default="float32"
  )


@record
class Saving(Retention):
  """When checkpoints are written, and which of them are kept."""

  every: int = setting("Steps between checkpoints. 0 stands for no checkpoint.", NATURAL)


@record
class ProbeSaving(Retention):
  """As `Saving`, of a trainer whose checkpoints are all that it leaves."""

  every: int = setting("Steps between checkpoints.", COUNT)


@record
class Tracking:
  """Weights & Biases."""

  mode: str = setting(within=("online", "offline", "disabled"))
  project: str = setting(filled=True)
  entity: str | None = None
  name: str | None = None


@record
class Expected:
  """What a trained run is said to be; it is compared with what the run says, where it is given."""

  variant: str | None = None
  size: int | None = setting(within=COUNT, default=None)
  adaln: str | None = setting(within=("true", "shared", "false"), default=None)
  latent_diffusion: bool | None = None
  width: int | None = setting(within=COUNT, default=None)


def arguments(title: str, make: type, without: tuple[str, ...] = (), **more) -> type:
  """Makes a record of the attributes of a class that a config decides.

  Args:
    title: the name of the record.
    make: a dataclass, as every Flax module is one.
    without: attributes that follow from the data, or that no user changes.
    **more: (annotation, field) of attributes of which more is to be said, or that come on top.
  """
  fields = {
    field.name: (field.type, dataclasses.field(default=field.default, metadata=field.metadata))
    for field in dataclasses.fields(make)
    if field.name not in (*without, "parent", "name")
  }
  fields = [(key, *what) for key, what in (fields | more).items()]
  return dataclasses.make_dataclass(title, fields, frozen=True, kw_only=True)


# What attributes mean that several networks have.
OF_NETWORKS = {
  "heads": (tuple[str, ...], setting(filled=True, distinct=True, default=("x0", "eps"))),
  "class_tokens": (int, setting(within=COUNT, default=4)),
  "condition": (str, setting(within=tuple(CONDITIONS), default="adaln")),
  "dtype": (str, setting(within=DTYPES, default="float32")),
  "scan": (
    str,
    setting("Whether layers run in a loop.", ("auto", "true", "false"), default="auto"),
  ),
  "remat": (str, setting("What is computed again.", ("auto", *REMAT), default="auto")),
  "attention": (str, setting(within=IMPLEMENTATIONS, default="auto")),
}


@functools.cache
def network(name: str, make: type) -> type:
  """Makes the record of a network: its name, and what does not follow from the data."""
  attributes = {field.name for field in dataclasses.fields(make)}
  more = {key: what for key, what in OF_NETWORKS.items() if key in attributes}
  fixed = ("image_size", "num_classes")
  return arguments(name, make, fixed, name=(str, setting()), **more)


PATH = OneOf(
  "name", {name: arguments(name, path, name=(str, setting())) for name, path in PATHS.items()}
)


class Networks(Mapping):
  """The records of all networks, made when they are asked for: a test may add one."""

  def __getitem__(self, name):
    return network(name, MODELS[name])

  def __iter__(self):
    return iter(MODELS)

  def __len__(self):
    return len(MODELS)


NETWORK = OneOf("name", Networks())
TERM = arguments("TermSettings", Term, weight=(float, setting(within=NATURAL, default=1.0)))
STREAM = arguments(
  "StreamSettings",
  Stream,
  rows=(tuple[float, float], setting("From and to, as shares of the batch.", "[0, 1]")),
  mask_ratio=(float, setting(within=SHARE, default=0.0)),
  terms=(Mapping[str, TERM], setting()),
)


def _of_evaluator(kind: str) -> type:
  """Makes the record of an evaluator: its type, when it runs, and its settings."""
  settings = evaluators.settings_of(kind)
  more = {
    "type": (str, setting()),
    "every": (int, setting("Steps between evaluations; 0 for only after the last.", NATURAL)),
  }
  for field in dataclasses.fields(settings):
    kinds = typing.get_args(field.type) or (field.type,)
    if field.name == "sampling":
      more[field.name] = (Sampling, setting())
    elif Mapping in kinds:  # A part of a data set.
      kinds = [Data if kind is Mapping else kind for kind in kinds]
      default = setting(field.metadata["help"], default=field.default)
      more[field.name] = (functools.reduce(operator.or_, kinds), default)
  return arguments(kind, settings, **more)


EVALUATION = OneOf("type", {kind: _of_evaluator(kind) for kind in evaluators.known()})


@record
class Stage:
  """What every trainer is told."""

  trainer: str
  # JAX takes the last 32 bits: larger seeds would be smaller ones again.
  seed: int = setting(within=f"[0, {2**32})")
  eval_batch_size: int = setting(within=COUNT)
  init_from: str = setting('"stage:NAME", the folder of a run, or "".')
  summary: tuple[str, ...] = setting("Names of metrics, with * for any letters.")
  wandb: Tracking


@record
class Trained:
  """What a trainer is told that looks at a run which is there."""

  init_from: str = setting('It must name a run: "stage:NAME" or its folder.', filled=True)
  init_weights: str = setting(within=tuple(WEIGHTS))
  expected: Expected


@record
class Steps:
  """The length of a run, and the data of its steps."""

  batch_size: int = setting("Images a step, over all devices.", COUNT)
  steps: int = setting("0 leaves the length of the run to epochs.", NATURAL)
  epochs: float = setting("0 leaves the length of the run to steps.", NATURAL)
  log_every: int = setting("Steps between two lines of the log.", COUNT)
  data: Data


@record
class Descent(Steps):
  """How the parameters of a network are trained."""

  fsdp: int = setting("Devices that share one copy of the parameters; 0: all do.", NATURAL)
  accumulate: int = setting("Parts of a batch, one after the other.", COUNT)
  optim: Optim
  guard: Guard
  ema_decay: float = setting("E.g. 0.9999; 0 is no average.", SHARE)
  checkpoint: Saving


@record
class Diffusion(Descent, Stage):
  """A stage of `trainers.diffusion`."""

  latents: LatentSpace | None = None
  model: NETWORK
  path: PATH
  streams: Mapping[str, STREAM]
  use_labels: bool
  label_drop_prob: float = setting("The share of labels that is dropped.", "[0, 1]")
  init_weights: str = setting(within=tuple(WEIGHTS))
  init_fresh: tuple[str, ...] = setting("Parts of the model that start afresh.")
  evals: Mapping[str, EVALUATION]


@record
class Layers:
  """How layers run in a forward pass."""

  scan: bool = setting("Run the layers in a loop.")


@record
class Evaluate(Trained, Stage):
  """A stage of `trainers.evaluate`."""

  model: Layers
  evals: Mapping[str, EVALUATION]
  guide_if_labelled: bool


@record
class VaeSizes:
  """The sizes of a KL auto-encoder that do not follow from the data, see `umd.codecs.vae`."""

  block_out_channels: tuple[int, ...] = setting("The widths of the levels.", COUNT, filled=True)
  layers_per_block: int = setting(within=COUNT)
  latent_channels: int = setting(within=COUNT)
  norm_num_groups: int = setting("It must divide all widths.", COUNT)
  mid_block_add_attention: bool

  def __post_init__(self):
    Architecture(**dataclasses.asdict(self))  # Raises ValueError for what cannot be built.


@record
class VaeModel:
  """A KL auto-encoder."""

  architecture: VaeSizes
  dtype: str = setting(within=DTYPES, default="float32")


@record
class VaeLoss:
  """See `trainers.kl_vae.KLObjective`."""

  error: str = setting("The absolute error, or the squared one.", ("l1", "l2"))
  kl_weight: float = setting(within=NATURAL)


@record
class KlVae(Descent, Stage):
  """A stage of `trainers.kl_vae`."""

  init_from: str = setting("This trainer starts from nothing.", ("",))
  test: Data
  model: VaeModel
  objective: VaeLoss
  eval_every: int = setting(within=COUNT)
  eval_num: int = setting("Held-out images to look at; 0 stands for all.", NATURAL)
  scaling_num: int = setting("Images that the scaling factor is measured on.", COUNT)


@record
class LinearProbe(Trained, Steps, Stage):
  """A stage of `trainers.linear_probe`."""

  select: Data
  test: Data
  timesteps: tuple[int, ...] = setting(within=NATURAL, filled=True, distinct=True)
  lrs: tuple[float, ...] = setting(within=POSITIVE, filled=True, distinct=True)
  warmup: float = setting("It is a share of the steps.", SHARE)
  wd: float = setting("Weight decay.", NATURAL)
  eval_every: int = setting(within=COUNT)
  checkpoint: ProbeSaving


STAGE = OneOf(
  "trainer",
  {
    "diffusion": Diffusion,
    "evaluate": Evaluate,
    "kl_vae": KlVae,
    "linear_probe": LinearProbe,
  },
)

"""The keys of a stage's config: for each its type, its range and what it is for.

Where a section is the arguments of something in umd, their names, types and which may be left out
are read from its signature, so that the two cannot part. `trainers.validate` does the checking.
"""

import dataclasses
import importlib
from collections.abc import Mapping

import evaluators
from trainers.schema import Field, Named, Section, arguments, inside
from umd import data, optim
from umd.checkpoint import WEIGHTS
from umd.codec import Latents
from umd.guard import Guard
from umd.inference import Inference
from umd.kl_objective import ERRORS, KLObjective
from umd.models.attention import IMPLEMENTATIONS
from umd.models.autoencoder import AutoEncoder, parse_variant
from umd.models.blocks import CONDITIONS, REMAT
from umd.models.vae import Architecture, KLAutoEncoder
from umd.objectives import Stream, Term
from umd.paths import make_path
from umd.retention import Retention

# Of a model: what may start afresh.
PARTS = (
  *("embed", "pos_embed", "class_tokens", "mask_token", "time_embed", "label_embed"),
  *("encoder", "decoder", "decoder_pos_embed", "head", "head_adaln"),
)
COUNT, POSITIVE, SHARE = "[1, inf)", "(0, inf)", "[0, 1)"


def _checkpoint(every: str) -> Section:
  zero = " 0 stands for no checkpoint." if inside(0, every) else ""
  fields = {
    "every": Field(int, every, f"Steps between checkpoints.{zero}"),
    **arguments(Retention, keep=Field(int)),
  }
  return Section(fields, build=lambda every, **retention: Retention(**retention))


def _evaluator(settings: Mapping) -> Section:
  """What the evaluator of that type takes."""
  every = Field(int, "[0, inf)", "Steps between evaluations; 0 for only after the last.")
  fields = {"type": Field(str, EVALUATORS), "every": every}
  if settings.get("type") not in list(EVALUATORS):
    return Section(fields, others=True)
  make = importlib.import_module(f"evaluators.{settings['type']}").Evaluator
  own = arguments(make, "context")
  for name, field in own.items():
    if name == "sampling":
      own[name] = SAMPLING
    elif isinstance(settings.get(name), Mapping):  # All other mappings are data.
      own[name] = dataclasses.replace(DATA, required=field.required)
    elif name in MEASURED:
      own[name] = dataclasses.replace(field, within=MEASURED[name])
  return Section(fields | own)


EVALUATORS = tuple(evaluators.known())
MEASURED = {"scale": COUNT, "rows": COUNT, "columns": COUNT, "mask_ratio": SHARE}  # Of evaluators.
DATA = Section(
  arguments(
    data.load,
    name=Field(str, None, "'digits', 'tfds:NAME', 'folder:PATH' or 'npz:FILE'.", filled=True),
    shuffle_buffer=COUNT,
    max_bad="[-1, inf)",
  )
)
SAMPLING = Section(
  arguments(
    Inference.sample, "self", "params", "keys", "labels", steps=COUNT, cfg_scale="[0, inf)"
  ),
  others=True,
)
MODEL = Section(
  arguments(
    *(AutoEncoder, "image_size", "num_classes", "parent", "name"),
    heads=Field(tuple[str, ...], ("x0", "eps", "v", "x_t"), filled=True, distinct=True),
    class_tokens=COUNT,
    condition=tuple(CONDITIONS),
    dtype=("float32", "bfloat16"),
    scan=Field(str, ("auto", "true", "false"), required=False),
    remat=("auto", *REMAT),
    attention=IMPLEMENTATIONS,
  ),
  build=lambda variant, **_: parse_variant(variant),
)


def _architecture(**sizes) -> None:
  """Raises ValueError, with names as in the config, unless there can be such an auto-encoder."""
  try:
    Architecture(**{k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()})
  except ValueError as error:
    raise ValueError(f"architecture.{error}") from None


ARCHITECTURE = Section(
  arguments(
    # What is left out follows from the data, is measured, or is there for the latents' centring.
    *(Architecture, "in_channels", "out_channels", "scaling_factor", "shift_factor"),
    *("use_quant_conv", "use_post_quant_conv"),
    block_out_channels=Field(tuple[int, ...], COUNT, "The widths of the levels.", filled=True),
    layers_per_block=Field(int, COUNT),
    latent_channels=Field(int, COUNT),
    norm_num_groups=Field(int, COUNT),
    mid_block_add_attention=Field(bool),
  ),
  build=_architecture,
)
STREAM = Section(
  arguments(
    *(Stream, "name"),
    mask_ratio=SHARE,
    rows=Field(tuple[float, float], "[0, 1]", "From and to, as shares of the batch."),
    terms=Named(lambda _: Section(arguments(Term, weight="[0, inf)"))),
  )
)
OPTIM = Section(
  {
    "lr": Field(float, POSITIVE, "The peak of the learning rate."),
    "warmup": Field(float, SHARE, "It is a share of the steps."),
    **arguments(
      *(optim.make_optimizer, "schedule"),
      wd="[0, inf)",
      beta1=SHARE,
      beta2=SHARE,
      clip_norm=Field(float, "(0, inf]", "float('inf') clips nothing."),
      mu_dtype=(None, "float32", "bfloat16"),
    ),
  }
)
LATENTS = Section(
  {
    "vae": Field(str, None, "A published name, a folder, or hf:ORG/REPO.", filled=True),
    **arguments(
      *(Latents, "weights", "mesh"),
      dtype=("float32", "bfloat16"),
      chunk=COUNT,
      tile=Field(int, "[0, inf)", "Side in pixels; 0 for no tiles.", required=False),
    ),
  },
  empty=True,
)
WANDB = Section(
  {
    "mode": Field(str, ("online", "offline", "disabled")),
    "project": Field(str, filled=True),
    "entity": Field(str, required=False),
    "name": Field(str, required=False),
  }
)
EXPECTED = Section(
  {
    "variant": Field(str, required=False),
    "size": Field(int, COUNT, required=False),
    "adaln": Field(str, ("true", "shared", "false"), required=False),
    "latent_diffusion": Field(bool, required=False),
    "width": Field(int, COUNT, required=False),
  }
)

# Keys of all trainers.
ANY = {
  # JAX takes the last 32 bits: larger seeds would be smaller ones again.
  "seed": Field(int, f"[0, {2**32})"),
  "eval_batch_size": Field(int, COUNT),
  "init_weights": Field(str, tuple(WEIGHTS)),
  "summary": Field(tuple[str, ...], None, "Names of metrics, with * for any letters."),
  "wandb": WANDB,
}
TRAINING = {
  "batch_size": Field(int, COUNT, "Images a step, over all devices."),
  "steps": Field(int, "[0, inf)", "0 leaves the length of the run to epochs."),
  "epochs": Field(float, "[0, inf)", "0 leaves the length of the run to steps."),
  "log_every": Field(int, COUNT),
  "data": DATA,
}
DEVICES = {
  "fsdp": Field(int, "[0, inf)", "Devices that share one copy of the parameters; 0: all do."),
  "accumulate": Field(int, COUNT, "Parts of a batch, one after the other."),
}
EMA_DECAY = Field(float, SHARE, "E.g. 0.9999; 0 is no average.")
TRAINED = Field(str, None, 'It must name a run: "stage:NAME" or its folder.', filled=True)

# trainer: its keys.
STAGES = {
  "autoencoder": {
    **ANY,
    **TRAINING,
    "latents": LATENTS,
    "model": MODEL,
    "path": Section(arguments(make_path)),
    **DEVICES,
    "streams": Named(lambda _: STREAM),
    "optim": OPTIM,
    "guard": Section(arguments(Guard), build=Guard),
    "use_labels": Field(bool),
    "label_drop_prob": Field(float, "[0, 1]"),
    "ema_decay": EMA_DECAY,
    "init_from": Field(str, None, '"stage:NAME", the folder of a run, or "".'),
    "init_fresh": Field(tuple[str, ...], PARTS),
    "evals": Named(_evaluator),
    "checkpoint": _checkpoint("[0, inf)"),
  },
  "evaluate": {
    **ANY,
    "init_from": TRAINED,
    "model": Section({"scan": Field(bool)}),
    "expected": EXPECTED,
    "evals": Named(_evaluator),
    "guide_if_labelled": Field(bool),
  },
  "kl_autoencoder": {
    **{name: field for name, field in ANY.items() if name != "init_weights"},
    **TRAINING,
    "test": DATA,
    "model": Section(
      arguments(
        *(KLAutoEncoder, "parent", "name"),
        architecture=ARCHITECTURE,
        dtype=("float32", "bfloat16"),
      )
    ),
    "objective": Section(
      arguments(KLObjective, "model", error=tuple(ERRORS), kl_weight="[0, inf)"),
    ),
    **DEVICES,
    "optim": OPTIM,
    "guard": Section(arguments(Guard), build=Guard),
    "ema_decay": EMA_DECAY,
    "init_from": Field(str, ("",), "This trainer starts from nothing."),
    "eval_every": Field(int, COUNT),
    "eval_num": Field(int, "[0, inf)", "Held-out images to look at; 0 stands for all."),
    "scaling_num": Field(int, COUNT, "Images that the scaling factor is measured on."),
    "checkpoint": _checkpoint("[0, inf)"),
  },
  "linear_probe": {
    **ANY,
    **TRAINING,
    "select": DATA,
    "test": DATA,
    "timesteps": Field(tuple[int, ...], "[0, inf)", filled=True, distinct=True),
    "lrs": Field(tuple[float, ...], POSITIVE, filled=True, distinct=True),
    "warmup": Field(float, SHARE, "It is a share of the steps."),
    "wd": Field(float, "[0, inf)"),
    "init_from": TRAINED,
    "expected": EXPECTED,
    "eval_every": Field(int, COUNT),
    "checkpoint": _checkpoint(COUNT),
  },
}


def stage(trainer: str) -> Section:
  """What a stage of that trainer holds."""
  return Section({"trainer": Field(str, tuple(STAGES)), **STAGES[trainer]})

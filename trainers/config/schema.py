"""What a config may hold, in words that are data: fields with types and ranges, and sections."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import evaluators
from trainers import optim
from trainers.kl_vae import ERRORS, KLObjective
from umd import data
from umd.codecs.codec import Latents
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.models import MODELS
from umd.models.autoencoder import AutoEncoder, parse_variant
from umd.models.layers.attention import IMPLEMENTATIONS
from umd.models.layers.blocks import CONDITIONS, REMAT
from umd.objectives import Stream, Term
from umd.paths import PATHS, make_path
from umd.runs.checkpoint import WEIGHTS, Retention
from umd.samplers import Sampling
from umd.state import Guard


@dataclasses.dataclass(frozen=True)
class Section:
  """Values by their names.

  Attributes:
    fields: {name: `Field`, `Section` or `Named`}.
    required: whether it must be there.
    empty: whether it may hold nothing, which then stands for none.
    others: whether it may hold more than the fields; whom they are for checks them.
    build: called with the values once they have the right types; a ValueError is a problem.
  """

  fields: Mapping
  required: bool = True
  empty: bool = False
  others: bool = False
  build: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Field:
  """One value.

  Attributes:
    kind: its type, as in annotations: int, str | None, tuple[float, float].
    within: an interval as it is written, "[0, 1)", or the values allowed; of tuples, for each item.
    help: what it is, or what to do; added to the message.
    required: whether it must be there.
    filled: not "" or ().
    distinct: all items differ.
  """

  kind: Any
  within: str | tuple | None = None
  help: str = ""
  required: bool = True
  filled: bool = False
  distinct: bool = False


def arguments(make: Callable, *without: str, **own) -> dict:
  """{name: Field} of the arguments of `make`, but for some.

  Args:
    make: a function or class.
    *without: arguments that are not in the config.
    **own: what is to be known about some of them: a `Field` (or `Section`), or its `within` alone.
  """
  fields = {}
  parameters = inspect.signature(make).parameters
  if unknown := (own.keys() | set(without)) - parameters.keys():
    raise TypeError(f"{make.__name__} takes no {sorted(unknown)}.")
  for name, p in parameters.items():
    if name in without or p.kind is p.VAR_KEYWORD:
      continue
    known = own.get(name)
    plain = known is None or isinstance(known, (str, tuple))
    fields[name] = Field(p.annotation, known, required=p.default is p.empty) if plain else known
  return fields


@dataclasses.dataclass(frozen=True)
class Named:
  """Sections by names of the user's own; `each(section)` is the `Section` that it must fit."""

  each: Callable[[Mapping], Section]
  required: bool = True


WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
PLURALS = {int: "integers", float: "numbers", str: "strings"}


def join(*names: str) -> str:
  """Names as a flag has them: "a.b"; empty ones are left out."""
  return ".".join(filter(None, names))


def near(name, known: Iterable[str]) -> str:
  """Which of the known names may be meant, as a sentence; "" if none is near."""
  found = difflib.get_close_matches(str(name), [str(k) for k in known], 1)
  return f" Did you mean {found[0]!r}?" if found else ""


def fits(value, kind) -> bool:
  """Whether a value is of a type, as an annotation names it; ints are floats, bools are no ints."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    return any(fits(value, arg) for arg in args)
  if origin in (tuple, Sequence):
    if not isinstance(value, (tuple, list)):
      return False
    open_ended = origin is Sequence or args[1:] == (...,)
    expected = args[:1] * len(value) if open_ended else args
    return len(value) == len(expected) and all(map(fits, value, expected))
  if kind in (int, float):
    return isinstance(value, (int, kind)) and not isinstance(value, bool)
  return isinstance(value, origin or kind)


def inside(value, within: str | tuple) -> bool:
  """Whether a value is in an interval such as "[0, 1)", or among the values allowed."""
  if not isinstance(within, str):
    return value in within
  low, high = map(float, within[1:-1].split(","))
  above = value >= low if within[0] == "[" else value > low
  return above and (value <= high if within[-1] == "]" else value < high)


def _words(kind) -> str:
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    return " or ".join(map(_words, args))
  if origin is Sequence or args[1:] == (...,):
    return f"a tuple of {PLURALS.get(args[0], 'values')}"
  if origin is tuple:
    return f"a tuple of {len(args)} {PLURALS.get(args[0], 'values')}"
  return "None" if kind is types.NoneType else WORDS.get(kind, "a section of its own")


def _wanted(field: Field) -> str:
  """ "a number in [0, 1)"."""
  text = _words(field.kind)
  if field.within:
    is_interval = isinstance(field.within, str)
    text += f" in {field.within}" if is_interval else f" among {list(field.within)}"
  return text + ", not empty" * field.filled + ", all different" * field.distinct


def _check_value(value, field: Field, key: str) -> Iterator[str]:
  several = isinstance(value, (tuple, list))
  items = value if several else (value,)
  shown = [f"{x:g}" if isinstance(x, float) else x for x in items]  # As names of metrics have them.
  if (
    not fits(value, field.kind)
    or (field.within and not all(inside(x, field.within) for x in items))
    or (field.filled and not value)
    or (field.distinct and len(set(shown)) < len(items))
  ):
    choices = field.within if isinstance(field.within, tuple) else ()
    wrong = next((x for x in items if isinstance(x, str) and x not in choices), "")
    hint = f" {field.help}" if field.help else ""
    yield f"{key}={value!r} must be {_wanted(field)}.{hint}{near(wrong, choices)}"


def check(value, wanted: Field | Section | Named, key: str) -> Iterator[str]:
  """Yields what is wrong with the value of `key`."""
  if isinstance(wanted, Field):
    yield from _check_value(value, wanted, key)
  elif not isinstance(value, Mapping):
    yield f"{key}={value!r} must be a section: a dict of settings."
  elif isinstance(wanted, Named):
    for name, section in value.items():
      if not isinstance(name, str):
        yield f"{key}: the name {name!r} must be a string."
      known = wanted.each(section) if isinstance(section, Mapping) else Section({})
      yield from check(section, known, join(key, str(name)))
  elif value or not wanted.empty:
    yield from _check_section(value, wanted, key)


def _check_section(section: Mapping, wanted: Section, key: str) -> Iterator[str]:
  problems = []
  for name in section if not wanted.others else ():
    if name not in wanted.fields:
      problems.append(_unknown(join(key, str(name)), section[name], wanted))
  for name, field in wanted.fields.items():
    if name in section:
      problems += check(section[name], field, join(key, name))
    elif field.required:
      hint = f" It must be {_wanted(field)}." if isinstance(field, Field) else ""
      problems.append(f"{join(key, name)} is missing.{hint}")
  if not problems and wanted.build:
    try:
      wanted.build(**section)
    except ValueError as error:
      problems.append(join(key.rpartition(".")[0], str(error)))
  yield from problems


def _unknown(key: str, value, wanted: Section) -> str:
  """Says that there is no such key, and which one may be meant: the nearest, or one deeper down."""
  name = key.rpartition(".")[2]
  deeper = [
    f"{part}.{name}"
    for part, inner in wanted.fields.items()
    if isinstance(inner, Section) and name in inner.fields
  ]
  hint = near(name, wanted.fields) or "".join(f" Did you mean {d!r}?" for d in deeper[:1])
  shown = "" if isinstance(value, Mapping) else f"={value!r}"
  return f"{key}{shown}: there is no such key.{hint} Known: {', '.join(sorted(wanted.fields))}."


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
  own = arguments(evaluators.settings_of(settings["type"]))
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
  {
    field.name: Field(field.type, field.metadata["within"], field.metadata["help"])
    for field in dataclasses.fields(Sampling)
  },
  build=lambda **given: Sampling().updated(given),
)
# The settings of all paths; `make_path` says which path has which.
PATH = Section(
  {
    "name": Field(str, tuple(PATHS)),
    **{
      field.name: Field(
        field.type, field.metadata["within"], field.metadata["help"], required=False
      )
      for path in PATHS.values()
      for field in dataclasses.fields(path)
    },
  },
  build=make_path,
)
MODEL = Section(
  {"name": Field(str, tuple(MODELS), "The network.")}
  | arguments(
    *(AutoEncoder, "image_size", "num_classes", "parent", "name"),
    heads=Field(
      tuple[str, ...], ("x0", "eps", "v", "x_t", "score", "F"), filled=True, distinct=True
    ),
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
  "diffusion": {
    **ANY,
    **TRAINING,
    "latents": LATENTS,
    "model": MODEL,
    "path": PATH,
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
  "kl_vae": {
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

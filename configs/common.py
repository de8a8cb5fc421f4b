"""What configs share: arguments in the config string, and the sections of a trainer's config."""

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import methods


class Argument(NamedTuple):
  """An argument of a config.

  Attributes:
    default: its value unless it is given; values have the default's type.
    meaning: what `--help_config` prints.
    choices: what it may be; () for anything of that type.
  """

  default: bool | int | float | str
  meaning: str
  choices: tuple[str, ...] = ()


WANDB_MODE = Argument("disabled", "of Weights & Biases", ("online", "offline", "disabled"))

# Arguments that every config of the auto-encoder takes; a config lists its own in front.
ARGUMENTS = dict(
  method=Argument("umd", "a row of configs/methods.py: sets the next five", tuple(methods.METHODS)),
  network=Argument("autoencoder", "a network of umd/models"),
  path=Argument("cosine", "from image to noise", ("cosine", "linear", "flow")),
  no_noise_prob=Argument(0.5, "share of the batch that stays clean"),
  mask_ratio=Argument(0.375, "share of the patches masked in the noised part"),
  mask_ratio_no_noise=Argument(0.75, "share of the patches masked in the clean part"),
  adaln=Argument(
    "true",
    "condition by AdaLN, by one that all layers share, or by one more token",
    ("true", "shared", "false"),
  ),
  variant=Argument("B/4", "size and patch side, see SIZES in umd/models/autoencoder.py"),
  timesteps=Argument(1000, "T of the path; t = 0 is clean, t = T is noise"),
  dtype=Argument("bfloat16", "of the computation", ("bfloat16", "float32")),
  scan=Argument("auto", "loop over layers, compiles faster", ("auto", "true", "false")),
  remat=Argument("auto", "what is computed again to save memory", ("auto", "none", "dots", "full")),
  attention=Argument(
    "auto",
    "cudnn is for GPUs, pallas for TPUs, auto goes by platform and shape",
    ("auto", "xla", "cudnn", "pallas"),
  ),
  fsdp=Argument(1, "devices that share one copy of parameters, average and optimiser; 0: all"),
  accumulate=Argument(1, "parts of a batch, one after the other: less memory, slower"),
  seed=Argument(0, "of initialisation, order, crops, noise and masks"),
  wandb_mode=WANDB_MODE,
)
CONDITIONS = {"true": "adaln", "shared": "adaln_shared", "false": "token"}

# A step is skipped if its numbers are not finite, or if its loss is `spike_sigma` deviations above
# the mean of the last `spike_window` (0: never); after `max_skipped` in a row the run stops.
GUARD = dict(max_skipped=10, spike_sigma=0.0, spike_window=100)

TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def with_defaults(arguments: Mapping[str, Argument], **defaults) -> dict[str, Argument]:
  """Replaces the defaults of some arguments; what they mean stays."""
  return {
    name: argument._replace(default=defaults.get(name, argument.default))
    for name, argument in arguments.items()
  }


def convert(name: str, text: str, argument: Argument):
  """Reads the value of an argument.

  Raises:
    ValueError: it has another type than the default, or is none of the choices.
  """
  kind = type(argument.default)
  if kind is bool:
    if text.lower() not in TRUE + FALSE:
      raise ValueError(f"{name}={text!r} must be a bool: true or false.")
    return text.lower() in TRUE
  try:
    value = kind(text)
  except ValueError:
    raise ValueError(
      f"{name}={text!r} must be of type {kind.__name__}, like the default {argument.default!r}."
    ) from None
  if argument.choices and (value := text.lower()) not in argument.choices:
    raise ValueError(f"{name}={text!r} must be one of {', '.join(argument.choices)}.")
  return value


def numbers(name: str, text: str, kind: type) -> tuple:
  """Reads several numbers: "10+100" -> (10, 100)."""
  return tuple(convert(name, part, Argument(kind(), "")) for part in text.split("+"))


def parse_arg(arg: str | None, arguments: Mapping[str, Argument]) -> ConfigDict:
  """Reads "name=value,name=value" into a ConfigDict with a value for every argument.

  `method=...` first replaces the defaults by its row of METHODS; what else the string says comes
  on top. `variant=:B/4` means `variant=B/4`. The result's `given` lists the names in the string.

  Raises:
    ValueError: an unknown name, or a value that does not fit; the message lists the right ones.
  """
  given = {}
  for part in filter(None, (arg or "").split(",")):
    name, equals, value = part.partition("=")
    if name not in arguments or not equals:
      known = ", ".join(f"{k}={argument.default}" for k, argument in arguments.items())
      near = difflib.get_close_matches(name, arguments, 1)
      hint = f" Did you mean {near[0]!r}?" if near and name not in arguments else ""
      raise ValueError(
        f"Config argument {part!r} is not name=value with a known name.{hint} "
        f"Known, with their defaults: {known}."
      )
    value = value.removeprefix(":") if name == "variant" else value
    given[name] = convert(name, value, arguments[name])
  values = {name: argument.default for name, argument in arguments.items()}
  if "method" in arguments:
    row = methods.METHODS[given.get("method", values["method"])]._asdict()
    values |= {name: value for name, value in row.items() if name in arguments}
  return ConfigDict({**values, **given, "given": tuple(given)})


def data(name: str, split: str, pp: str, data_dir: str = "", cache: bool = False) -> dict:
  """Says which images are read, and what is done to them: the arguments of `umd.data.load`.

  `max_bad`, how many may be unreadable, is -1: .001 of a folder, none of other data.
  """
  return dict(name=name, split=split, pp=pp, data_dir=data_dir, cache=cache, max_bad=-1.0)


def optim(lr: float, wd: float, beta2: float, warmup: float = 0.05, mu_dtype="float32") -> dict:
  """Makes the settings of AdamW: a warm-up (a share of the steps) to `lr`, then a cosine to 0."""
  return dict(lr=lr, warmup=warmup, wd=wd, beta1=0.9, beta2=beta2, clip_norm=1.0, mu_dtype=mu_dtype)


def scaled(lr: float, batch_size: int) -> float:
  """Scales `lr`, of 256 images, to a batch by the linear rule (Goyal et al. 2017)."""
  return lr * batch_size / 256


def diffusion(
  a,
  *,
  data: dict,
  optim: dict,
  use_labels: bool,
  label_drop_prob: float,
  ema_decay: float,
  evals: dict,
  summary: tuple[str, ...],
  steps: int = 0,
  epochs: float = 0.0,
  streams: dict | None = None,
  latents: dict | None = None,
  init_from: str = "",
  init_weights: str = "ema",
  init_fresh: tuple[str, ...] = (),
  eval_batch_size: int = 256,
  log_every: int = 100,
  checkpoint_every: int = 5000,
) -> dict:
  """Makes a complete config of `trainers/diffusion.py`.

  Args:
    a: the ARGUMENTS, and `batch_size` over all devices.
    data, optim: see the functions of these names.
    use_labels, label_drop_prob, ema_decay: condition on labels, and drop this share of them; of
      the weights that are evaluated and sampled.
    evals: {name: {type, every, ...}}, see `evaluators/`.
    summary: metrics shown on the way and in the table at the end.
    steps: length of the run; 0 to say it in `epochs` instead.
    streams: None for those of the arguments, see `configs.methods`.
    latents: None for pixels.
    init_from: "stage:NAME" for a stage in the same workdir, or any run's folder; "" for none.
    init_weights, init_fresh: which weights, "ema" or "raw", and the parts to start afresh.
    checkpoint_every: steps between checkpoints, 0 for none.
  """
  model = {name: a[name] for name in ("variant", "dtype", "scan", "remat", "attention")}
  if streams is None:
    streams = methods.streams(a.no_noise_prob, a.mask_ratio, a.mask_ratio_no_noise)
  return dict(
    trainer="diffusion",
    seed=a.seed,
    batch_size=a.batch_size,
    eval_batch_size=eval_batch_size,
    data=data,
    latents=latents or {},
    model=dict(name=a.network, heads=("x0", "eps"), condition=CONDITIONS[a.adaln], **model),
    path=dict(name=a.path, timesteps=a.timesteps),
    fsdp=a.fsdp,
    accumulate=a.accumulate,
    streams=streams,
    optim=optim,
    steps=steps,
    epochs=epochs,
    use_labels=use_labels,
    label_drop_prob=label_drop_prob,
    ema_decay=ema_decay,
    guard=dict(GUARD),
    init_from=init_from,
    init_weights=init_weights,
    init_fresh=init_fresh,
    evals=evals,
    summary=summary,
    **output(a, log_every, checkpoint_every),
  )


def output(a, log_every: int, checkpoint_every: int) -> dict:
  """Says what a run writes, and when."""
  return dict(
    log_every=log_every,
    # The newest `keep`, every `keep_every`-th step (0: none), and the best by a metric, as in
    # "max:fewshot/class_strict_10shot_mean" ("": none).
    checkpoint=dict(every=checkpoint_every, keep=2, keep_every=0, best=""),
    wandb=dict(mode=a.wandb_mode, project="umd"),
  )


def sampling(*, steps: int, cfg_scale: float, path: str = "", **options) -> dict:
  """Makes the fields of `umd.samplers.Sampling`; `options` replace its defaults."""
  # At the end of the flow path x_t is all noise: eps is no news there, x0 is.
  head = "x0" if path == "flow" else "eps"
  defaults = dict(
    sampler="ddim",
    steps=steps,
    spacing="uniform",
    eta=0.0,
    head=head,
    cfg_scale=cfg_scale,
    cfg_channels=0,
    guidance_interval=(0.0, 1.0),
    clip_x0=True,
  )
  return defaults | options

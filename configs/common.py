"""What configs share: arguments in the config string, methods as rows of streams, and the trainer's
keys."""

import difflib

from ml_collections import ConfigDict

# The toggles of the paper.
#   no_noise_prob: share of the batch that stays clean (t = 0).
#   mask_ratio: of the noised part; mask_ratio_no_noise: of the clean part.
METHODS = {
  "mae": dict(no_noise_prob=1.0, mask_ratio=0.0, mask_ratio_no_noise=0.75),
  "umd": dict(no_noise_prob=0.5, mask_ratio=0.375, mask_ratio_no_noise=0.75),
  "dit": dict(no_noise_prob=0.0, mask_ratio=0.0, mask_ratio_no_noise=0.75),
  "maskdit": dict(no_noise_prob=0.0, mask_ratio=0.5, mask_ratio_no_noise=0.75),
}

# Arguments that every config of the auto-encoder takes; a config lists its own defaults on top.
ARGUMENTS = dict(
  method="umd",  # umd, mae, dit or maskdit: sets the next three, see METHODS
  no_noise_prob=0.5,  # share of the batch that stays clean
  mask_ratio=0.375,  # share of the patches masked in the noised part
  mask_ratio_no_noise=0.75,  # share of the patches masked in the clean part
  adaln="true",  # condition by AdaLN: true, shared (one for all layers) or false: one more token
  variant="B/4",  # size and patch side, see SIZES in umd/models/autoencoder.py
  path="cosine",  # from image to noise: cosine, linear or flow
  timesteps=1000,  # T of the path; t = 0 is clean, t = T is noise
  dtype="bfloat16",  # of the computation: bfloat16 or float32
  scan="auto",  # loop over layers, compiles faster: true, false or auto
  remat="auto",  # what is computed again to save memory: none, dots, full or auto
  attention="auto",  # xla, cudnn (GPU), pallas (TPU), or auto: by platform and shape
  fsdp=1,  # devices that share one copy of parameters, average and optimiser; 0: all
  accumulate=1,  # parts of a batch, worked on one after the other: less memory, slower
  seed=0,  # of initialisation, order, crops, noise and masks
  wandb_mode="disabled",  # of Weights & Biases: online, offline or disabled
)

# What these arguments may be.
CHOICES = dict(
  adaln=("true", "shared", "false"),
  scan=("auto", "true", "false"),
  remat=("auto", "none", "dots", "full"),
  attention=("auto", "xla", "cudnn", "pallas"),
)
CONDITIONS = {"true": "adaln", "shared": "adaln_shared", "false": "token"}

# A step is skipped if its numbers are not finite, or if its loss is `spike_sigma` deviations above
# the mean of the last `spike_window` (0: never); after `max_skipped` in a row the run stops.
GUARD = dict(max_skipped=10, spike_sigma=0.0, spike_window=100)

TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def _convert(name: str, text: str, default):
  """`text` as a value of the default's type."""
  kind = type(default)
  if kind is bool:
    if text.lower() not in TRUE + FALSE:
      raise ValueError(f"{name}={text!r} must be a bool: true or false.")
    return text.lower() in TRUE
  if kind is str and name in CHOICES and (text := text.lower()) not in CHOICES[name]:
    raise ValueError(f"{name}={text!r} must be one of {', '.join(CHOICES[name])}.")
  try:
    return kind(text)
  except ValueError:
    raise ValueError(
      f"{name}={text!r} must be of type {kind.__name__}, like the default {default!r}."
    ) from None


def numbers(name: str, text: str, kind: type) -> tuple:
  """ "10+100" -> (10, 100)."""
  return tuple(_convert(name, part, kind()) for part in text.split("+"))


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
  """Reads "name=value,name=value" into a ConfigDict with the names and types of `defaults`.

  `method=...` first replaces the defaults by its row of METHODS; what else the string says comes
  on top. `variant=:B/4` means `variant=B/4`. The result's `given` lists the names in the string.

  Raises:
    ValueError: an unknown name, a value of the wrong type or an unknown method; the message lists
      the right ones.
  """
  given = {}
  for part in filter(None, (arg or "").split(",")):
    name, equals, value = part.partition("=")
    if name not in defaults or not equals:
      known = ", ".join(f"{k}={v}" for k, v in defaults.items())
      near = difflib.get_close_matches(name, defaults, 1)
      hint = f" Did you mean {near[0]!r}?" if near and name not in defaults else ""
      raise ValueError(
        f"Config argument {part!r} is not name=value with a known name.{hint} "
        f"Known, with their defaults: {known}."
      )
    given[name] = value.removeprefix(":") if name == "variant" else value
  if "method" in defaults:
    method = given.get("method", defaults["method"])
    if method not in METHODS:
      raise ValueError(f"method={method!r} is not one of {list(METHODS)}.")
    defaults = {**defaults, **{k: v for k, v in METHODS[method].items() if k in defaults}}
  values = {k: _convert(k, given[k], v) if k in given else v for k, v in defaults.items()}
  return ConfigDict({**values, "given": tuple(given)})


def streams(no_noise_prob: float, mask_ratio: float, mask_ratio_no_noise: float) -> dict:
  """The paper's toggles as streams (see `umd/objectives.py` for the words).

  A clean part is scored on its masked patches; a noised part half on the noise of the patches it
  shows, half on the x0 of those it masks, or on both everywhere if it masks none.
  """
  if not 0 <= no_noise_prob <= 1:
    raise ValueError(f"no_noise_prob={no_noise_prob} must be in [0, 1].")
  out = {}
  if no_noise_prob > 0:
    out["clean"] = dict(
      rows=(0.0, no_noise_prob),
      timesteps="clean",
      mask_ratio=mask_ratio_no_noise,
      labels=False,
      terms=dict(x0=dict(head="x0", where="masked", weight=1.0)),
    )
  if no_noise_prob < 1:
    seen, unseen = ("visible", "masked") if mask_ratio > 0 else ("all", "all")
    out["noised"] = dict(
      rows=(no_noise_prob, 1.0),
      timesteps="uniform",
      mask_ratio=mask_ratio,
      labels=True,
      terms=dict(
        eps=dict(head="eps", where=seen, weight=0.5),
        x0=dict(head="x0", where=unseen, weight=0.5),
      ),
    )
  return out


def data(name: str, split: str, pp: str, data_dir: str = "", cache: bool = False) -> dict:
  """Which images, and what is done to them: the arguments of `umd.data.load`.

  `max_bad`, how many may be unreadable, is -1: .001 of a folder, none of other data.
  """
  return dict(name=name, split=split, pp=pp, data_dir=data_dir, cache=cache, max_bad=-1.0)


def optim(lr: float, wd: float, beta2: float, warmup: float = 0.05, mu_dtype="float32") -> dict:
  """AdamW; `lr` is the peak, `warmup` a share of the steps, before a cosine to 0."""
  return dict(lr=lr, warmup=warmup, wd=wd, beta1=0.9, beta2=beta2, clip_norm=1.0, mu_dtype=mu_dtype)


def scaled(lr: float, batch_size: int) -> float:
  """Learning rate for a batch, by the linear rule: `lr` is for 256 images (Goyal et al. 2017)."""
  return lr * batch_size / 256


def _network(a) -> dict:
  model = {k: a[k] for k in ("variant", "dtype", "scan", "remat", "attention")}
  model |= dict(name="autoencoder", heads=("x0", "eps"), condition=CONDITIONS[a.adaln])
  path = dict(name=a.path, timesteps=a.timesteps)
  return dict(model=model, path=path, fsdp=a.fsdp, accumulate=a.accumulate)


def autoencoder(
  a,
  *,
  data: dict,
  streams: dict,
  optim: dict,
  batch_size: int,
  steps: int = 0,
  epochs: float = 0.0,
  use_labels: bool,
  label_drop_prob: float,
  ema_decay: float,
  evals: dict,
  summary: tuple[str, ...],
  init_from: str = "",
  init_weights: str = "ema",
  init_fresh: tuple[str, ...] = (),
  eval_batch_size: int = 256,
  log_every: int = 100,
  checkpoint_every: int = 5000,
  latents: dict | None = None,
) -> dict:
  """A complete config of `trainers/diffusion.py`.

  Args:
    a: the ARGUMENTS.
    data, streams, optim: see the functions of these names.
    batch_size: over all devices.
    steps: length of the run; 0 to say it in `epochs` instead.
    use_labels, label_drop_prob, ema_decay: condition on labels, and drop this share of them; of
      the weights that are evaluated and sampled.
    evals: {name: {type, every, ...}}, see `evaluators/`.
    summary: metrics shown on the way and in the table at the end.
    init_from: "stage:NAME" for a stage in the same workdir, or any run's folder; "" for none.
    init_weights, init_fresh: which weights, "ema" or "raw", and the parts to start afresh.
    checkpoint_every: steps between checkpoints, 0 for none; latents: None for pixels.
  """
  return dict(
    trainer="diffusion",
    seed=a.seed,
    batch_size=batch_size,
    eval_batch_size=eval_batch_size,
    data=data,
    latents=latents or {},
    **_network(a),
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
    **records(a, log_every, checkpoint_every),
  )


def records(a, log_every: int, checkpoint_every: int) -> dict:
  """What a run writes, and when."""
  return dict(
    log_every=log_every,
    # The newest `keep`, every `keep_every`-th step (0: none), and the best by a metric, as in
    # "max:fewshot/class_strict_10shot_mean" ("": none).
    checkpoint=dict(every=checkpoint_every, keep=2, keep_every=0, best=""),
    wandb=dict(mode=a.wandb_mode, project="umd"),
  )


def sampling(*, steps: int, cfg_scale: float, path: str = "", **options) -> dict:
  """Fields of `umd.samplers.Sampling`; `options` replace its defaults."""
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

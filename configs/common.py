"""What configs share: arguments in the config string, and methods as rows of streams."""

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

TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def _convert(name: str, text: str, default):
  """`text` as a value of the default's type."""
  kind = type(default)
  if kind is bool:
    if text.lower() not in TRUE + FALSE:
      raise ValueError(f"{name}={text!r} must be a bool: true or false.")
    return text.lower() in TRUE
  try:
    return kind(text)
  except ValueError:
    raise ValueError(
      f"{name}={text!r} must be of type {kind.__name__}, like the default {default!r}."
    ) from None


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
  """Reads "name=value,name=value" into a ConfigDict with the names and types of `defaults`.

  `method=...` first replaces the defaults by its row of METHODS; what else the string says comes
  on top.

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
    given[name] = value
  if "method" in defaults:
    method = given.get("method", defaults["method"])
    if method not in METHODS:
      raise ValueError(f"method={method!r} is not one of {list(METHODS)}.")
    defaults = {**defaults, **{k: v for k, v in METHODS[method].items() if k in defaults}}
  values = {k: _convert(k, given[k], v) if k in given else v for k, v in defaults.items()}
  return ConfigDict(values)


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

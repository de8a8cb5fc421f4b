"""Slices of splits, written as TFDS writes them: "train", "all[:90%]", "all[100:200]+all[900:]"."""

import re
from collections.abc import Mapping

import numpy as np

PART = re.compile(r"^(?P<name>[^\[\]]+)(\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?$")


def names(split: str, what: str) -> list[str]:
  """The splits that "a[:1%]+b" names; ValueError if it is written wrongly."""
  return [_match(part, what)["name"] for part in split.split("+")]


def select(split: str, sizes: Mapping[str, int], what: str) -> list[tuple[str, np.ndarray]]:
  """[(name, ids)]: what `split` asks for, of splits of these sizes; `what` is for messages."""
  return [_ids(_match(part, what), sizes, what) for part in split.split("+")]


def _match(part: str, what: str) -> re.Match:
  match = PART.match(part.strip())
  if not match:
    raise ValueError(f"{what}: split {part!r} is not written as NAME, NAME[:90%] or NAME[10:20].")
  return match


def _ids(match, sizes, what):
  name = match["name"]
  if name not in sizes:
    known = ", ".join(f"{k} ({v} images)" for k, v in sizes.items())
    raise ValueError(f"{what} has no split {name!r}; it has {known}.")
  n = sizes[name]
  low, high = (_bound(match[key], n, default) for key, default in (("low", 0), ("high", n)))
  if not 0 <= low < high <= n:
    raise ValueError(f"{what}: {match[0]} holds no images: {name} has {n}.")
  return name, np.arange(low, high)


def _bound(text: str | None, n: int, default: int) -> int:
  if text is None:
    return default
  value = round(n * int(text[:-1]) / 100) if text.endswith("%") else int(text)
  return value + n if text.startswith("-") else value

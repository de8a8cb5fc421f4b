"""What a config may hold, in words that are data: fields with types and ranges, and sections."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
PLURALS = {int: "integers", float: "numbers", str: "strings"}


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
class Named:
  """Sections by names of the user's own; `each(section)` is the `Section` that it must fit."""

  each: Callable[[Mapping], Section]
  required: bool = True


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

"""Turns the nested dicts of a config into records, and lists all that does not fit at once.

A record is a frozen dataclass. The annotation of a field says its type; its metadata may say more:

  help: what the value means, added to an error message.
  within: an interval as it is written, "[0, 1)", or a tuple of choices; of a tuple, for each item.
  filled: the value must not be "" or ().
  distinct: all items of a tuple must differ.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
PLURALS = {int: "integers", float: "numbers", str: "strings"}


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
  """An annotation of sections whose record depends on the value of one of their keys.

  Attributes:
    tag: the key, such as "trainer".
    records: {value of the key: record}.
  """

  tag: str
  records: Mapping[str, type]


def setting(
  help: str = "", within: str | tuple | None = None, *, default=dataclasses.MISSING, **more
):
  """Makes the field of a record; see the top of this file for the metadata."""
  return dataclasses.field(default=default, metadata={"help": help, "within": within, **more})


def join(*names: str) -> str:
  """Joins names as flags have them, "a.b"; empty ones are left out."""
  return ".".join(filter(None, names))


def near(name, known: Iterable[str]) -> str:
  """Asks whether the nearest of the known names was meant; "" if none is near."""
  matches = difflib.get_close_matches(str(name), [str(k) for k in known], 1)
  return f" Did you mean {matches[0]!r}?" if matches else ""


def fits(value, kind) -> bool:
  """Returns whether a value has the type of an annotation; an int is a float, a bool is no int."""
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
  """Returns whether a value is in an interval such as "[0, 1)", or among the choices."""
  if not isinstance(within, str):
    return value in within
  low, high = map(float, within[1:-1].split(","))
  above = value >= low if within[0] == "[" else value > low
  return above and (value <= high if within[-1] == "]" else value < high)


def read(
  value, kind, key: str, problems: list[str], about: Mapping = types.MappingProxyType({})
) -> Any:
  """Reads a value as an annotation describes it, with sections as records.

  Args:
    value: of a config: a number, a string, a tuple, or a mapping.
    kind: the annotation: a type, a record, `OneOf`, `Mapping[str, record]`, or a union of these.
    key: the name of the value, as a flag has it.
    problems: receives a line for everything that does not fit.
    about: metadata of the field.

  Returns:
    The value or its record; None where there is a problem.
  """
  kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  if typing.get_origin(kind) is Mapping and isinstance(value, Mapping):
    _, record = typing.get_args(kind)
    problems += [
      f"{key}: the name {k!r} must be a string." for k in value if not isinstance(k, str)
    ]
    return {
      name: read(inner, record, join(key, str(name)), problems) for name, inner in value.items()
    }
  sections = [k for k in kinds if isinstance(k, OneOf) or dataclasses.is_dataclass(k)]
  if sections and isinstance(value, Mapping):
    if not value and types.NoneType in kinds:
      return None  # An empty section stands for none.
    return _read_section(value, sections[0], key, problems)
  values = [k for k in kinds if k not in sections and typing.get_origin(k) is not Mapping]
  if not any(fits(value, k) for k in values) or not _allowed(value, about):
    problems.append(_must_be(key, value, kind, about))
  return tuple(value) if isinstance(value, list) else value


def _allowed(value, about: Mapping) -> bool:
  """Returns whether a value of the right type is one that the metadata of its field allows."""
  items, within = value if isinstance(value, (tuple, list)) else (value,), about.get("within")
  if within and value is not None and not all(inside(item, within) for item in items):
    return False
  if about.get("distinct"):
    # Numbers differ if the names of metrics that are made of them do.
    names = {f"{x:g}" if isinstance(x, float) else x for x in items}
    return len(names) == len(items) and bool(items or not about.get("filled"))
  return bool(value or not about.get("filled"))


def _words(kind) -> str:
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    return " or ".join(map(_words, args))
  if origin is Sequence or args[1:] == (...,):
    return f"a tuple of {PLURALS.get(args[0], 'values')}"
  if origin is tuple:
    return f"a tuple of {len(args)} {PLURALS.get(args[0], 'values')}"
  return "None" if kind is types.NoneType else WORDS.get(kind, "a section: a dict of settings")


def wanted(kind, about: Mapping) -> str:
  """Says what a value may be: "a number in [0, 1)"."""
  text, within = _words(kind), about.get("within")
  if within:
    text += f" in {within}" if isinstance(within, str) else f" among {list(within)}"
  text += ", not empty" if about.get("filled") else ""
  return text + (", all different" if about.get("distinct") else "")


def _must_be(key: str, value, kind, about: Mapping) -> str:
  within, help = about.get("within"), about.get("help")
  choices = within if isinstance(within, tuple) else ()
  items = value if isinstance(value, (tuple, list)) else (value,)
  wrong = next((x for x in items if isinstance(x, str) and x not in choices), "")
  hint = f" {help}" if help else ""
  return f"{key}={value!r} must be {wanted(kind, about)}.{hint}{near(wrong, choices)}"


def _read_section(section: Mapping, kind: type | OneOf, key: str, problems: list[str]):
  if isinstance(kind, OneOf):
    tag = section.get(kind.tag)
    if not isinstance(tag, str) or tag not in kind.records:
      name = join(key, kind.tag)
      given = f"{name}={tag!r}" if kind.tag in section else f"{name} is missing: it"
      choices = list(kind.records)
      problems.append(f"{given} must be one of {choices}.{near(tag, choices)}")
      return None
    kind = kind.records[tag]
  before, values = len(problems), {}
  hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
  problems += (
    _unknown(join(key, str(name)), section[name], hints) for name in section if name not in fields
  )
  for name, field in fields.items():
    required = dataclasses.MISSING is field.default is field.default_factory
    if name in section:
      values[name] = read(section[name], hints[name], join(key, name), problems, field.metadata)
    elif required:
      problems.append(
        f"{join(key, name)} is missing. It must be {wanted(hints[name], field.metadata)}."
      )
  if len(problems) > before:
    return None
  try:
    return kind(**values)
  except ValueError as error:  # What no range says; a record may name its own section, or not.
    problems.append(join(key, str(error).removeprefix(key.rpartition(".")[2] + ".")))


def _unknown(key: str, value, hints: Mapping[str, Any]) -> str:
  """Says that there is no such key, and which is meant: the nearest, or one in a section below."""
  name = key.rpartition(".")[2]
  below = (
    f"{section}.{name}"
    for section, kind in hints.items()
    if isinstance(kind, type) and name in getattr(kind, "__dataclass_fields__", ())
  )
  hint = near(name, hints) or "".join(f" Did you mean {k!r}?" for k in [*below][:1])
  shown = "" if isinstance(value, Mapping) else f"={value!r}"
  return f"{key}{shown}: there is no such key.{hint} Known: {', '.join(sorted(hints))}."

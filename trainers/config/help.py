"""Tells which arguments a config file takes.

What an argument means stands in the comment behind it, in the ARGUMENTS of the file that has it
first; so configs stay data, and are read here as source. Neither JAX nor TensorFlow is loaded.
"""

import ast
import importlib.util
import inspect
import io
import os
import shutil
import textwrap
import tokenize
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

NAME = "ARGUMENTS"
TYPES = {int: "int", float: "float", str: "text", bool: "bool"}
WIDTH = 100  # Columns at most.


class Argument(NamedTuple):
  """What the source says of an argument.

  Attributes:
    meaning: "" if nothing is said.
    home: the module that has it first; others change its default.
  """

  meaning: str
  home: ModuleType


def load(path: str) -> ModuleType:
  """The config file as a module.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has no ARGUMENTS.
  """
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or "."
    there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    known = [os.path.join(folder, f) for f in there if f.endswith(".py") and f != "__init__.py"]
    there = f" There are {', '.join(known)}." if known else ""
    raise FileNotFoundError(f"--config={path!r}: there is no such file.{there}")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not isinstance(getattr(module, NAME, None), Mapping):
    raise ValueError(
      f"--config={path!r} has no {NAME}, a dict of arguments with their defaults, so there is "
      "nothing to tell of it. It may be a part of other configs, or take no arguments."
    )
  return module


def arguments(module: ModuleType) -> dict[str, Argument]:
  """{name: what the source says} of all of a config's arguments.

  Follows `**other.ARGUMENTS`, `dict(other.ARGUMENTS, ...)` and `other.ARGUMENTS | ...`. A comment
  of a later file takes the place of an earlier one's.
  """
  found = {}
  _collect(module, found)
  return {name: found.get(name, Argument("", module)) for name in vars(module)[NAME]}


def _collect(module: ModuleType, found: dict[str, Argument]) -> None:
  """Adds what a module says to what those that it builds on say."""
  source = inspect.getsource(module)
  comments = _comments(source)

  def add(name, line):
    earlier = found.get(name, Argument("", module))
    found[name] = Argument(comments.get(line, earlier.meaning), earlier.home)

  def walk(node):
    match node:
      case ast.Attribute(ast.Name(other), attr) if attr == NAME:
        _collect(vars(module)[other], found)
      case ast.BinOp(left, ast.BitOr(), right):
        walk(left)
        walk(right)
      case ast.Call(ast.Name("dict"), args, keywords):
        for part in args:
          walk(part)
        for part in keywords:
          add(part.arg, part.value.end_lineno) if part.arg else walk(part.value)
      case ast.Dict(names, values):
        for key, value in zip(names, values, strict=True):
          add(key.value, value.end_lineno) if key else walk(value)

  for node in ast.parse(source).body:
    match node:
      case ast.Assign([ast.Name(name)], value) if name == NAME:
        walk(value)
      case ast.Assign([ast.Subscript(ast.Name(name), ast.Constant(key))], value) if name == NAME:
        add(key, value.end_lineno)


def _comments(source: str) -> dict[int, str]:
  """{line: the comment behind what stands there}; comments that have their lines are left out."""
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  return {
    token.start[0]: token.string.lstrip("# ").strip()
    for token in tokens
    if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
  }


def _groups(module: ModuleType, about: Mapping[str, Argument]) -> dict[str, list[str]]:
  """{file: names of the arguments that it has first}; the config's own come first."""
  homes = dict.fromkeys(a.home for a in about.values())
  # What builds on others comes before them.
  others = lambda home: sum(x in homes for x in vars(home).values() if isinstance(x, ModuleType))
  homes = sorted(homes, key=lambda home: (home is not module, -others(home)))
  files = {os.path.relpath(home.__file__): [] for home in homes}
  for name, argument in about.items():
    files[os.path.relpath(argument.home.__file__)].append(name)
  return files


def _type(value) -> str:
  return TYPES.get(type(value), type(value).__name__)


def _table(methods: Mapping[str, Mapping]) -> list[str]:
  """Methods as rows, their toggles as columns."""
  columns = list(next(iter(methods.values())))
  first = max(map(len, [*methods, "method="]))
  row = lambda name, cells: f"  {name:{first}}" + "".join(f"  {c:>{len(k)}}" for k, c in cells)
  head = row("method=", [(k, k) for k in columns])
  return [head, *(row(name, [(k, str(m[k])) for k in columns]) for name, m in methods.items())]


def describe(path: str, text: str, parse: Callable, methods: Mapping[str, Mapping]) -> str:
  """All arguments of a config with their values, types and meaning, as text.

  Args:
    path: of the config file.
    text: what stands behind the colon, "name=value,name=value"; may be "".
    parse: `configs.common.parse_arg`.
    methods: `configs.common.METHODS`.

  Raises:
    FileNotFoundError, ValueError: no such file, it has no ARGUMENTS, or `text` is wrong.
  """
  module = load(path)
  about, defaults = arguments(module), vars(module)[NAME]
  values = parse(text, **defaults)
  mark = {n: "*" if n in values.given else "+" for n in about if values[n] != defaults[n]}
  mark |= dict.fromkeys(values.given, "*")
  shown = {n: str(values[n]) if values[n] != "" else '""' for n in about}
  wide = [max(map(len, column)) for column in (about, shown.values())]
  lines = [(inspect.getdoc(module) or path).splitlines()[0], ""]
  lines += [f"Arguments go behind a colon: --config {path}:name=value,name=value"]
  if mark:
    lines += ["* is given" + (", + follows from the method" if "+" in mark.values() else "") + "."]
  width = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
  for file, names in _groups(module, about).items():
    lines += ["", file]
    for n in names:
      left = f"{mark.get(n, ' ')} {n:{wide[0]}}  {shown[n]:{wide[1]}}  {_type(defaults[n]):5}  "
      was = f" (default: {defaults[n]!r})" if values[n] != defaults[n] else ""
      indent = " " * len(left)
      lines += textwrap.wrap(
        left + about[n].meaning + was,
        max(width, len(left) + 30),
        **dict(
          subsequent_indent=indent,
          break_long_words=False,
          drop_whitespace=True,
        ),
      ) or [left.rstrip()]
  if "method" in about:
    lines += ["", "A method stands for", *_table(methods)]
  return "\n".join(lines)

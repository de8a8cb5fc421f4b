"""Tells which arguments a config file takes; neither JAX nor TensorFlow is loaded for it."""

import importlib.util
import inspect
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping
from types import ModuleType

NAME = "ARGUMENTS"
TYPES = {int: "int", float: "float", str: "text", bool: "bool"}
WIDTH = 100  # Columns at most.


def load(path: str) -> ModuleType:
  """Imports a config file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has no ARGUMENTS.
  """
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or "."
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    known = [os.path.join(folder, f) for f in files if f.endswith(".py") and f != "__init__.py"]
    there = f" There are {', '.join(known)}." if known else ""
    raise FileNotFoundError(f"--config={path!r}: there is no such file.{there}")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not isinstance(getattr(module, NAME, None), Mapping):
    raise ValueError(
      f"--config={path!r} has no {NAME}, a dict of arguments, so nothing can be told of it. It "
      "may be a part of other configs, or take no arguments."
    )
  return module


def _groups(module: ModuleType) -> dict[str, list[str]]:
  """Sorts the arguments of a config by the file that brings them: {file: names}, its own first."""
  others = [m for m in vars(module).values() if isinstance(m, ModuleType) and hasattr(m, NAME)]
  files = {os.path.relpath(home.__file__): [] for home in (module, *reversed(others))}
  for name in vars(module)[NAME]:
    home = next((other for other in others if name in vars(other)[NAME]), module)
    files[os.path.relpath(home.__file__)].append(name)
  return files


def _table(methods: Mapping) -> list[str]:
  """Writes methods as rows and what they set as columns."""
  rows = {name: {k: str(v) for k, v in row._asdict().items()} for name, row in methods.items()}
  columns = list(next(iter(rows.values())))
  wide = {c: max(len(c), *(len(row[c]) for row in rows.values())) for c in columns}
  lines = {"method=": {c: c for c in columns}, **rows}
  return [
    f"  {name:8}" + "".join(f"  {row[c]:>{wide[c]}}" for c in columns)
    for name, row in lines.items()
  ]


def describe(path: str, text: str, parse: Callable, methods: Mapping) -> str:
  """Writes all arguments of a config with their values, types and meaning.

  Args:
    path: of the config file.
    text: what stands behind the colon, "name=value,name=value"; may be "".
    parse: `configs.common.parse_arg`.
    methods: `configs.methods.METHODS`.

  Raises:
    FileNotFoundError, ValueError: no such file, it has no ARGUMENTS, or `text` is wrong.
  """
  module = load(path)
  arguments = vars(module)[NAME]
  values = parse(text, arguments)
  changed = {name for name, argument in arguments.items() if values[name] != argument.default}
  mark = dict.fromkeys(changed, "+") | dict.fromkeys(values.given, "*")
  shown = {name: str(values[name]) if values[name] != "" else '""' for name in arguments}
  names_wide, values_wide = max(map(len, arguments)), max(map(len, shown.values()))
  lines = [(inspect.getdoc(module) or path).splitlines()[0], ""]
  lines.append(f"Arguments go behind a colon: --config {path}:name=value,name=value")
  if mark:
    lines.append(
      "* is given" + (", + follows from the method" if "+" in mark.values() else "") + "."
    )
  width = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
  for file, names in _groups(module).items():
    lines += ["", file] if names else []
    for name in names:
      default, meaning, choices = arguments[name]
      kind = TYPES[type(default)]
      left = f"{mark.get(name, ' ')} {name:{names_wide}}  {shown[name]:{values_wide}}  {kind:5}  "
      right = meaning + (f" ({', '.join(choices[:-1])} or {choices[-1]})" if choices else "")
      right += f" (default: {default!r})" if name in changed else ""
      columns = max(width, len(left) + 30)
      indent = " " * len(left)
      lines += textwrap.wrap(left + right, columns, subsequent_indent=indent)
  if "method" in arguments:
    lines += ["", "A method stands for", *_table(methods)]
  return "\n".join(lines)

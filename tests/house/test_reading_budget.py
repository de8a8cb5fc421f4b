"""How much one reads to understand a training step of DiT, from its config to the update.

The step is built and traced, and every function of ours that runs on the way is noted: what one
opens to follow the code. Checks of the config and the data come before, and are not counted.
Functions count with their lines of code, classes with those that are in no method. Docstrings,
comments and blank lines do not count: they are there to be read.
"""

import ast
import functools
import io
import sys
import tokenize
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import quickstart
from trainers import diffusion, optim
from trainers.config.check import read_stage
from umd.codecs.codec import Pixels
from umd.devices.mesh import make_mesh
from umd.models.network import init_params
from umd.state import state_shapes

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES, MOST_LINES = 16, 1300
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def visited(function):
  """{file: lines at which functions of ours begin that `function()` calls}."""
  begun = {}

  def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(str(ROOT)):
      begun.setdefault(code.co_filename, set()).add(code.co_firstlineno)

  sys.setprofile(note)
  try:
    function()
  finally:
    sys.setprofile(None)
  files = {Path(name).relative_to(ROOT): lines for name, lines in begun.items()}
  return {file: lines for file, lines in files.items() if file.parts[0] not in ("tests", ".venv")}


def span(node):
  """The lines of a definition, with its decorators."""
  return range(min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno + 1)


def lines_of_code(source):
  """The numbers of the lines that hold code: no docstring, comment or blank line."""
  skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
  code = set()
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type not in skipped:
      code.update(range(token.start[0], token.end[0] + 1))
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node) is not None:
      docstring = node.body[0]
      code -= set(range(docstring.lineno, docstring.end_lineno + 1))
  return code


def lines_read(source, begun):
  """The lines of code of the definitions in which calls began."""
  tree, read = ast.parse(source), set()
  for node in ast.walk(tree):
    is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    if is_function and any(line in span(node) for line in begun):
      read.update(span(node))
  for node in ast.walk(tree):
    if isinstance(node, ast.ClassDef) and read & set(span(node)):
      methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
      read.update(set(span(node)).difference(*map(span, methods)))
  return read & lines_of_code(source)


class Digits:
  """Stands for the data, of which the step knows no more."""

  num_classes = 10

  def __len__(self):
    return 1437


def test_a_step_of_dit_is_read_in_an_hour():
  mesh, arguments = make_mesh(jax.devices()[:1]), "method=dit,scan=false,remat=none"
  config = read_stage(quickstart.get_config(arguments).pretrain)

  def walk():
    """What happens between a config and the update, as `trainers.diffusion` does it."""
    quickstart.get_config(arguments)
    parts = diffusion.assemble(config, mesh, Digits(), Pixels(), (8, 8, 1))
    state = state_shapes(functools.partial(init_params, parts.model), parts.tx, mesh)
    rows = (config.batch_size, 8, 8, 1)
    batch = {
      "image": jax.ShapeDtypeStruct(rows, jnp.float32),
      "label": jax.ShapeDtypeStruct(rows[:1], jnp.int32),
    }
    optim.make_step(config, parts, state).lower(state, batch)

  begun = visited(walk)
  budget = {file: len(lines_read((ROOT / file).read_text(), begun[file])) for file in begun}
  total = sum(budget.values())
  table = "\n".join(f"{lines:5} {file}" for file, lines in sorted(budget.items()))
  print(f"{table}\n{total:5} lines in {len(budget)} files")
  assert budget[Path("umd/objectives.py")] > 100 and budget[Path("umd/state.py")] > 50
  assert len(budget) <= MOST_FILES and total <= MOST_LINES, table

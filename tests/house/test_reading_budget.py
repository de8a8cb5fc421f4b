"""How much one reads to understand a training step of DiT, from its config to the update.

The step is built and traced, and every function of ours that ran on the way is noted: what a reader
who follows the code opens and reads. Functions count with all their lines, classes with the lines
that are no methods; lines of docstrings, comments and code count alike.
"""

import ast
import sys
from pathlib import Path

import jax

from configs import quickstart
from trainers import diffusion
from umd.codecs.codec import Pixels
from umd.devices.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES, MOST_LINES = 16, 1300


def visited(function):
  """{file: line numbers at which functions of ours begin that `function()` called}."""
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


def lines_read(file, begun):
  """The numbers of the lines of a file that belong to the definitions in which calls began."""
  read = set()

  def first_line(node):
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])

  def visit(node):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
        span = range(first_line(child), child.end_lineno + 1)
        if any(line in span for line in begun):
          read.update(span)
      elif isinstance(child, ast.ClassDef):
        before = len(read)
        visit(child)
        if len(read) > before or any(line == first_line(child) for line in begun):
          span = set(range(first_line(child), child.end_lineno + 1))
          for method in ast.walk(child):
            if isinstance(method, ast.FunctionDef):
              span -= set(range(first_line(method), method.end_lineno + 1))
          read.update(span)
      else:
        visit(child)

  visit(ast.parse((ROOT / file).read_text(encoding="utf-8")))
  return read


def dit_step():
  """Builds the quick start's DiT from its config and traces a step, as the trainer does."""
  config = quickstart.get_config("method=dit").pretrain
  mesh = make_mesh(jax.devices()[:1])
  source = type("Digits", (), {"num_classes": 10, "__len__": lambda self: 1437})()
  parts = diffusion.assemble(config, mesh, source, Pixels(), (8, 8, 1))
  return parts


def test_a_step_of_dit_is_read_in_an_hour():
  budget = {file: lines_read(file, begun) for file, begun in visited(dit_step).items()}
  total = sum(map(len, budget.values()))
  table = "\n".join(f"{len(lines):5} {file}" for file, lines in sorted(budget.items()))
  print(table, total, len(budget))
  assert len(budget) <= MOST_FILES and total <= MOST_LINES, table

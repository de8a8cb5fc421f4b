"""The plan of the house: who may import whom, how large folders get, how much one reads for a step.

`docs/architecture.md` explains the plan in words.
"""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("umd", "evaluators", "trainers", "configs", "tools", "benchmarks", "train", "sample")
FILES = sorted(
  file.relative_to(ROOT)
  for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in OURS))
  for file in ROOT.glob(pattern)
)
IDS = [str(file) for file in FILES]

# Each room, and the rooms that its files may import beside their own. A dotted name is that of a
# file, or of a folder with all below it; a module belongs to the longest name that fits.
ROOMS = {
  # The cellar: machines and files, no science.
  "umd.devices": set(),
  "umd.runs": {"umd.devices"},
  "umd.weights": {"umd.runs"},
  # The science, each row on the shoulders of the rows above it.
  "umd.paths": set(),
  "umd.masks": set(),
  "umd.losses": {"umd.paths"},
  "umd.models.layers": {"umd.devices"},
  "umd.models": {"umd.devices", "umd.masks", "umd.models.layers"},
  "umd.objectives": {"umd.devices", "umd.losses", "umd.masks", "umd.models.network", "umd.paths"},
  "umd.samplers": {"umd.paths"},
  "umd.state": {"umd.devices", "umd.runs"},
  "umd.data": {"umd.runs"},
  "umd.codecs": {"umd.data", "umd.devices", "umd.runs", "umd.weights"},
  "umd.metrics": {"umd.data", "umd.devices", "umd.runs", "umd.weights"},
  # What is built of it.
  "umd.trained": {
    *("umd.codecs", "umd.data", "umd.devices", "umd.masks", "umd.metrics", "umd.models"),
    *("umd.objectives", "umd.paths", "umd.runs", "umd.samplers", "umd.weights"),
  },
  "umd.report": {"umd.runs"},
  "umd.serve": {"umd.data", "umd.models", "umd.runs", "umd.samplers", "umd.trained"},
  "umd": {"umd.trained"},
  "evaluators": {
    *(
      "umd.codecs",
      "umd.data",
      "umd.devices",
      "umd.masks",
      "umd.metrics",
      "umd.models",
      "umd.objectives",
    ),
    *("umd.runs", "umd.samplers", "umd.state", "umd.trained", "umd.weights"),
  },
  "trainers": {"evaluators", "umd"},
  "configs": set(),
  "tools": {"configs", "evaluators", "trainers", "umd"},
  "benchmarks": {"configs", "evaluators", "tools", "trainers", "umd"},
  "train": {"configs", "trainers", "umd"},
  "sample": {"tools.command_line", "umd"},
}
# Packages that only some rooms may import.
RESERVED = {"ml_collections": {"configs", "trainers", "train", "tools", "benchmarks"}}
FILES_IN_A_FOLDER = 12
FILES_BESIDE_THE_ROOMS = 6  # of umd/ itself


def parse(file):
  return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def module_name(file):
  return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def covers(name, module):
  """Whether `module` is `name` or below it."""
  return module == name or module.startswith(name + ".")


def room_of(module):
  """The room that a module belongs to: the longest name in ROOMS that covers it."""
  if module == "umd":
    return "umd"
  rooms = [room for room in ROOMS if covers(room, module) and (room != "umd" or module == "umd")]
  return max(rooms, key=len, default=None)


def imported(nodes):
  """Dotted names of all that is imported; submodules of our own packages in full."""
  names = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative imports hide who imports whom"
      full = {f"{node.module}.{alias.name}" for alias in node.names}
      names |= {name if name in MODULES else node.module for name in full}
  return names


def at_import(tree):
  """The nodes that run when the module is imported: all but the bodies of functions."""
  for node in ast.iter_child_nodes(tree):
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
      yield node
      yield from at_import(node)


def violations(module, imports):
  """The imports that the plan forbids to `module`."""
  room, bad = room_of(module), set()
  for name in imports:
    top = name.split(".")[0]
    if top in OURS:
      allowed = any(covers(other, name) for other in ROOMS[room])
      if room_of(name) != room and not allowed:
        bad.add(name)
    elif (top in RESERVED and module.split(".")[0] not in RESERVED[top]) or (
      room == "configs" and top not in {"ml_collections", *sys.stdlib_module_names}
    ):
      bad.add(name)
  return bad


def test_every_file_is_in_a_room():
  assert {"umd.data.pipeline", "evaluators", "train"} <= set(MODULES)
  assert [module for module in MODULES if room_of(module) is None] == []


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_no_file_imports_what_the_plan_forbids(file):
  assert violations(module_name(file), imported(ast.walk(parse(file)))) == set()


@pytest.mark.parametrize(
  "module, code",
  [
    ("umd.paths", "from umd import data"),
    ("umd.models.layers.blocks", "from umd.models import autoencoder"),
    ("umd.samplers.solvers", "import umd.models.network"),
    ("umd.objectives", "from umd.models.autoencoder import AutoEncoder"),
    ("umd.data.pipeline", "def f():\n  from umd.models.autoencoder import AutoEncoder"),
    ("umd.runs.writers", "from umd.data import pipeline"),
    ("umd.runs.checkpoint", "from umd.state import TrainState"),
    ("umd.trained.saved", "from trainers import transfer"),
    ("umd.runs.workdir", "from ml_collections import ConfigDict"),
    ("evaluators.losses", "from trainers import stages"),
    ("trainers.diffusion", "from configs import common"),
    ("configs.common", "import numpy as np"),
  ],
)
def test_the_check_catches_a_forbidden_import(module, code):
  assert violations(module, imported(ast.walk(ast.parse(code))))


def test_no_import_goes_in_a_circle():
  """Nor does one inside a function: there it would only be hidden."""
  imports = {
    module: {name for name in imported(ast.walk(parse(file))) if name in MODULES} - {module}
    for module, file in MODULES.items()
  }
  while leaves := [module for module, names in imports.items() if not names & imports.keys()]:
    for module in leaves:
      del imports[module]
  in_circles = set(imports)
  while sources := [m for m in in_circles if not any(m in imports[n] for n in in_circles)]:
    in_circles -= set(sources)
  assert sorted(in_circles) == []


def test_folders_can_be_taken_in_at_a_glance():
  sizes = Counter(str(file.parent) for file in FILES if file.name != "__init__.py")
  assert {folder: n for folder, n in sizes.items() if n > FILES_IN_A_FOLDER} == {}
  assert len([file for file in FILES if str(file.parent) == "umd"]) <= FILES_BESIDE_THE_ROOMS


def test_a_class_name_has_one_meaning():
  names = Counter(
    node.name for file in FILES for node in ast.walk(parse(file)) if isinstance(node, ast.ClassDef)
  )
  # Of plug-ins: what each evaluator and each trainer calls what it is asked for by name.
  of_plug_ins = {"Evaluator", "Settings", "Parts"}
  assert [name for name, n in names.items() if n > 1 and name not in of_plug_ins] == []


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_heavy_packages_are_imported_only_inside_functions(file):
  heavy = {"tensorflow", "tensorflow_datasets", "clu", "wandb", "sklearn", "tensorboard"}
  assert {name.split(".")[0] for name in imported(at_import(parse(file)))} & heavy == set()


def test_importing_everything_but_the_programs_leaves_tensorflow_out():
  rooms = ("umd", "evaluators", "trainers")
  modules = [m for m in MODULES if m.split(".")[0] in rooms and not covers("umd.serve", m)]
  loads = "\n".join(f"import {module}" for module in modules)
  code = f"import sys\n{loads}\nsys.exit('tensorflow' in sys.modules)"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_no_file_is_named_after_nothing():
  assert not {f.stem for f in FILES} & {"utils", "util", "helpers", "helper", "misc"}

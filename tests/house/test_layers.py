"""The house's plan: who may import whom, TensorFlow only where files are read, small pieces."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
  file.relative_to(ROOT)
  for pattern in ("*.py", "[a-z]*/**/*.py")
  for file in ROOT.glob(pattern)
  if file.relative_to(ROOT).parts[0] != "tests"
)
IDS = [str(file) for file in FILES]
OURS = {"umd", "evaluators", "trainers", "configs", "train", "sample", "tools", "benchmarks"}
PURE = {"umd.paths", "umd.masks", "umd.devices.placement", "umd.devices.placement"}
TOOLBOX = {
  "umd.state",
  "trainers.optim",
  "umd.devices.mesh",
  "umd.runs.checkpoint",
  "umd.runs.writers",
  "umd.metrics.frechet",
}
TOOLBOX |= {
  "umd.runs.workdir",
  "umd.runs.progress",
  "umd.runs.integrity",
  "umd.runs.integrity",
  "umd.runs.checkpoint",
}
TOOLBOX |= {
  "umd.devices.placement",
  "umd.devices.placement",
  "umd.state",
  "umd.runs.goodput",
  "umd.runs.lock",
  "umd.runs.preemption",
  "umd.runs.preemption",
}
ALONE = {
  "umd.metrics.linear_probe",
  "umd.devices.distributed",
  "umd.metrics.quantize",
  "umd.weights.pytorch",
  "umd.metrics.pairwise",
}
ALONE |= {"umd.trained.inputs"}

# Part of the house: which others it may import. A name stands for itself and all below it; the
# first row that fits counts, and files in no row may import anything.
ALLOWED = {
  **dict.fromkeys(PURE, PURE),
  "umd.models": PURE | {"umd.models"},
  "umd.samplers": {"umd.paths", "umd.samplers"},
  "umd.objectives": PURE | {"umd.models"},
  "trainers.kl_vae": {"umd.models"},
  "umd.trained.inference": PURE | {"umd.models", "umd.objectives", "umd.samplers"},
  "umd.data": {"umd.data", "umd.runs.progress"},
  "trainers.transfer": {"umd.state"},
  "umd.weights.pytorch": {"umd.weights.pytorch"},
  "umd.weights.download": {"umd.runs.progress"},
  "umd.report": TOOLBOX | {"umd.report"},
  "umd.weights.safetensors": {"umd.runs.workdir"},
  "umd.trained.pictures": TOOLBOX,
  **{name: set() for name in ALONE},
  **dict.fromkeys(TOOLBOX, TOOLBOX | {"umd.data"}),
  "umd": {"umd"},
  "evaluators": {"umd", "evaluators"},
  "trainers": {"umd", "evaluators", "trainers"},
  "configs": {"configs"},
}
# Packages that only some parts may import.
RESERVED = {"ml_collections": {"configs", "trainers", "train", "sample", "tools", "benchmarks"}}


def parse(file):
  return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def module_name(file):
  return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def covers(names, module):
  """Whether `module` is one of `names` or below it."""
  return any(module == n or module.startswith(n + ".") for n in names)


def is_module(name):
  path = ROOT.joinpath(*name.split("."))
  return path.is_dir() or path.with_suffix(".py").exists()


def imported(nodes):
  """Dotted names of all that is imported, submodules of our packages in full."""
  found = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative imports hide who imports whom"
      deep = {f"{node.module}.{alias.name}" for alias in node.names}
      ours = node.module.split(".")[0] in OURS
      found |= {d if ours and is_module(d) else node.module for d in deep}
  return found


def at_import(tree):
  """Nodes that run when the module is imported: all but the bodies of functions."""
  for node in ast.iter_child_nodes(tree):
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
      yield node
      yield from at_import(node)


def violations(module, imports):
  """The imports that the plan forbids to `module`."""
  row = next((name for name in ALLOWED if covers([name], module)), None)
  bad = set()
  for name in imports:
    top = name.split(".")[0]
    foreign = top in OURS and row is not None and not covers(ALLOWED[row], name)
    reserved = top in RESERVED and module.split(".")[0] not in RESERVED[top]
    if foreign or reserved:
      bad.add(name)
    if row == "configs" and top not in {"configs", "ml_collections"} | sys.stdlib_module_names:
      bad.add(name)
  return bad


def test_the_walk_finds_the_house():
  assert {"train.py", "umd/data/pipeline.py", "evaluators/__init__.py"} <= set(IDS)
  assert {module_name(f).split(".")[0] for f in FILES} <= OURS


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_no_file_imports_what_the_plan_forbids(file):
  assert violations(module_name(file), imported(ast.walk(parse(file)))) == set()


@pytest.mark.parametrize(
  "module, code",
  [
    ("umd.paths", "from umd import data"),
    ("umd.masks", "from umd.models import blocks"),
    ("umd.models.layers.blocks", "from umd.objectives import score"),
    ("umd.samplers", "import umd.masks"),
    ("umd.objectives", "from umd.samplers import ddim"),
    ("trainers.kl_vae", "from umd.codecs.vae_files import load"),
    ("umd.trained.inference", "from umd.state import TrainState"),
    ("umd.state", "from umd.trained.inference import Inference"),
    ("umd.data.pipeline", "from umd.state import TrainState"),
    ("umd.data", "def f():\n  from umd.models.autoencoder import AutoEncoder"),
    ("umd.runs.writers", "from ml_collections import ConfigDict"),
    ("umd.runs.workdir", "from evaluators import context"),
    ("umd.state", "from umd import transfer"),
    ("trainers.transfer", "from umd.runs.checkpoint import load_params"),
    ("umd.metrics.linear_probe", "from umd.trained.inference import Inference"),
    ("umd.devices.distributed", "from umd import workdir"),
    ("umd.report.read", "from umd.trained.inference import Inference"),
    ("umd.runs.workdir", "from umd.report import read"),
    ("umd.trained.inputs", "from umd.trained.inference import Inference"),
    ("umd.trained.pictures", "from umd.trained.model import load"),
    ("evaluators.losses", "from trainers import stages"),
    ("evaluators", "import ml_collections.config_dict"),
    ("trainers.diffusion", "from configs import common"),
    ("configs.common", "import numpy as np"),
    ("configs.common", "from umd.models.autoencoder import SIZES"),
  ],
)
def test_the_check_catches_a_forbidden_import(module, code):
  assert violations(module, imported(ast.walk(ast.parse(code))))


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_tensorflow_is_imported_only_inside_functions(file):
  heavy = {"tensorflow", "tensorflow_datasets", "clu", "wandb", "sklearn", "tensorboard"}
  assert {name.split(".")[0] for name in imported(at_import(parse(file)))} & heavy == set()


def test_importing_everything_but_the_programs_leaves_tensorflow_out():
  modules = [module_name(f) for f in FILES if f.parts[0] in ("umd", "evaluators", "trainers")]
  loads = "\n".join(f"import {m}" for m in modules)
  code = f"import sys\n{loads}\nsys.exit('tensorflow' in sys.modules)"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_files_and_functions_are_short(file):
  assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 300
  for node in ast.walk(parse(file)):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      limit = 130 if file.parts[0] == "trainers" and node.name == "run" else 60
      assert node.end_lineno - node.lineno + 1 <= limit, node.name


def test_no_file_is_named_after_nothing():
  assert not {f.stem for f in FILES} & {
    "utils",
    "util",
    "helpers",
    "helper",
    "misc",
    "common_utils",
  }

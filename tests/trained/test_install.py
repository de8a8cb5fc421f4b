"""The installed library: what a wheel holds, and that an exported model needs little else."""

import glob
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pretrained_runs
import pytest

from tools import export
from umd import load

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Loads an exported model and samples, with nothing of training nor of the checkout.
PROGRAM = """
import sys

library, folder, out = sys.argv[1:]
sys.path[:0] = [library] if library else []
import numpy as np
import umd
import umd.metrics.frechet, umd.metrics.inception, umd.metrics.pairwise, umd.metrics.statistics

assert umd.__file__.startswith(library or sys.prefix), umd.__file__
np.save(out, umd.load(folder).sample([3, 7], 2, seed=1))
training = {"tensorflow", "orbax", "ml_collections", "clu", "trainers", "evaluators", "configs"}
sys.exit(str(training & set(sys.modules)) if training & set(sys.modules) else 0)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel of the files that git knows, built in a copy: building leaves folders behind."""
  source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
  files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT)
  known = [name for name in files.decode().split("\n") if name.startswith(("umd/", "req", "pyp"))]
  for name in (*known, "README.md", "LICENSE"):
    os.makedirs(source / os.path.dirname(name), exist_ok=True)
    if os.path.exists(os.path.join(ROOT, name)):
      shutil.copy(os.path.join(ROOT, name), source / name)
  pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
  subprocess.run([*pip, "--wheel-dir", out, source], check=True)
  (path,) = glob.glob(f"{out}/umd-0.1.0-*.whl")
  return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """An exported model, and two of its samples."""
  folder = tmp_path_factory.mktemp("exported")
  run = pretrained_runs.make(folder / "run", pretrained_runs.config())
  export.main([f"--workdir={run}", f"--out={folder / 'model'}"])
  return str(folder / "model"), load(run).sample([3, 7], 2, seed=1)


def sample(python, library, exported, out):
  """Samples with the installed library in a folder of its own, as the checkout did."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  command = [python, "-I", "-c", PROGRAM, library, exported[0], str(out / "samples.npy")]
  subprocess.run(command, check=True, cwd=out, env=environment)
  found = np.load(out / "samples.npy").astype(int)
  assert np.abs(found - exported[1]).max() <= 1  # Of other compiler options.


def test_the_wheel_holds_the_library_alone_and_all_of_its_files(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert {name.split("/")[0] for name in names} == {"umd", "umd-0.1.0.dist-info"}
  tracked = subprocess.check_output(["git", "ls-files", "umd"], cwd=ROOT, text=True).split()
  assert {name for name in tracked if os.path.exists(os.path.join(ROOT, name))} <= set(names)


def test_an_exported_model_needs_nothing_of_training(wheel, exported, tmp_path):
  zipfile.ZipFile(wheel).extractall(tmp_path / "library")
  sample(sys.executable, str(tmp_path / "library"), exported, tmp_path)


@pytest.mark.slow
def test_a_fresh_environment_with_the_wheel_alone_samples(wheel, exported, tmp_path):
  """It installs what the wheel asks for, so it takes a network."""
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
  python = str(tmp_path / "venv/bin/python")
  subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
  sample(python, "", exported, tmp_path)

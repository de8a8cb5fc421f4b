"""What --help_config prints: each argument of each config with its value and a meaning."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys

import pytest

import configs
from configs import common, methods
from trainers.config import help, records
from trainers.kl_vae import ERRORS
from umd.metrics.quantize import QUANTIZERS
from umd.models import MODELS
from umd.models.layers.attention import IMPLEMENTATIONS
from umd.models.layers.blocks import CONDITIONS, REMAT
from umd.paths import PATHS
from umd.runs.checkpoint import WEIGHTS
from umd.samplers import SOLVERS

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHARED = {"common", "images", "methods"}  # Parts of configs.
ALL = sorted(m.name for m in pkgutil.iter_modules(configs.__path__))
CONFIGS = [name for name in ALL if name not in SHARED]


def path(name):
  return os.path.join(ROOT, "configs", f"{name}.py")


def describe(name, text=""):
  return help.describe(path(name), text, common.parse_arg, methods.METHODS)


def rows(text):
  """{argument: (mark, value, type and meaning)} of what is printed."""
  found = {}
  for line in text.split("A method stands for")[0].splitlines():
    if row := re.match(r"([* +]) (\w+) +(\S+)  +((?:int|float|text|bool)\b.*)", line):
      found[row[2]] = row[1].strip(), row[3], row[4]
  return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_argument_is_printed_once_with_its_default_type_and_meaning(name):
  text = describe(name)
  arguments = importlib.import_module(f"configs.{name}").ARGUMENTS
  found = rows(text)
  assert found.keys() == arguments.keys()
  for argument, (default, meaning, choices) in arguments.items():
    kind = {int: "int", float: "float", bool: "bool", str: "text"}[type(default)]
    mark, value, rest = found[argument]
    assert (mark, value, rest.split()[0]) == ("", str(default) or '""', kind)
    assert len(meaning) > 3 and meaning.split()[0] in rest
    assert not choices or default in choices
  assert ("maskdit" in text) == ("method" in arguments)
  lines = [line for line in text.splitlines() if "--config" not in line]
  assert max(map(len, lines)) <= help.WIDTH


def test_choices_are_those_that_there_are():
  known = {
    "method": methods.METHODS,
    "path": {*PATHS} - {"ve", "edm"},  # These have no T, which `timesteps` sets.
    "dtype": records.DTYPES,
    "scan": ("auto", "true", "false"),
    "remat": ("auto", *REMAT),
    "attention": IMPLEMENTATIONS,
    "adaln": common.CONDITIONS,
    "quantize": QUANTIZERS,
    "weights": WEIGHTS,
    "init_weights": WEIGHTS,
    "sampler": SOLVERS,
    "error": ERRORS,
  }
  checked = set()
  for name in CONFIGS:
    for argument, (default, _, choices) in help.load(path(name)).ARGUMENTS.items():
      if argument in known and isinstance(default, str):
        assert set(choices) == set(known[argument]), (name, argument)
        checked.add(argument)
  assert checked == known.keys()
  assert set(common.CONDITIONS.values()) == set(CONDITIONS)
  assert {row.network for row in methods.METHODS.values()} <= set(MODELS)


def test_values_in_effect_are_shown_and_those_given_marked():
  found = rows(describe("ae_i1k", "variant=L/2,method=mae,epochs=1"))
  assert found["variant"][:2] == ("*", "L/2") and found["method"][:2] == ("*", "mae")
  assert found["epochs"][:2] == ("*", "1.0")
  assert found["no_noise_prob"][:2] == ("+", "1.0")  # Of the method.
  assert found["mask_ratio"][:2] == ("+", "0.0")
  assert found["mask_ratio_no_noise"][0] == found["size"][0] == ""
  given = rows(describe("ae_i1k", "no_noise_prob=0.5"))
  assert given["no_noise_prob"][:2] == ("*", "0.5")  # Though it is the default.
  assert {mark for name, (mark, *_) in given.items() if name != "no_noise_prob"} == {""}


def test_the_configs_own_arguments_come_first_and_shared_ones_where_they_are_from():
  lines = describe("folder").splitlines()
  heads = [line for line in lines if re.fullmatch(r"\S+\.py", line)]
  assert [os.path.basename(h) for h in heads] == ["folder.py", "images.py", "common.py"]
  own, images, shared = map(lines.index, heads)
  line_of = lambda name: next(i for i, x in enumerate(lines) if x[2:].startswith(name + " "))
  assert own < line_of("root") < images < line_of("train_split") < shared < line_of("variant")


def test_a_config_of_ones_own_may_build_on_others(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text('''
"""Mine."""
from configs import common

ARGUMENTS = dict(
  common.with_defaults(common.ARGUMENTS, adaln="false"),
  blur=common.Argument(3, "side of the blur", ()),
)
''')
  text = help.describe(str(file), "blur=5", common.parse_arg, methods.METHODS)
  found, shared = rows(text), help.load(path("common")).ARGUMENTS
  assert found["blur"] == ("*", "5", "int    side of the blur (default: 3)")
  assert found["adaln"][:2] == ("", "false") and shared["adaln"].default == "true"
  assert shared["adaln"].meaning.split()[0] in found["adaln"][2]
  assert text.index("mine.py\n") < text.index("configs/common.py\n")


@pytest.mark.parametrize(
  "name, text, told",
  [
    ("quickstart", "stepz=3", "Did you mean 'steps'"),
    ("quickstart", "lr=fast", "lr='fast'"),
    ("quickstart", "method=ddpm", "method='ddpm'"),
    ("absent", "", "no such file.*quickstart.py"),
    ("__init__", "", "has no ARGUMENTS"),
  ],
)
def test_what_is_wrong_is_told(name, text, told):
  with pytest.raises((ValueError, FileNotFoundError), match=told):
    describe(name, text)


def run(*arguments, code=None):
  command = ["-c", code] if code else ["-m", "train", *arguments]
  return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_the_command_needs_neither_workdir_nor_what_the_config_needs():
  done = run("--help_config", "--config", "configs/folder.py:size=32", "--workdir", "W")
  assert done.returncode == 0 and done.stderr == ""
  assert rows(done.stdout)["size"][:2] == ("*", "32")
  assert not os.path.exists(os.path.join(ROOT, "W"))


@pytest.mark.parametrize(
  "arguments, told",
  [
    (["--config=configs/quickstart.py:stepz=3", "--help_config"], "Did you mean 'steps'"),
    (["--help_config"], "give --config"),
  ],
)
def test_a_wrong_command_ends_with_one_message(arguments, told):
  done = run(*arguments)
  assert done.returncode != 0 and told in done.stderr and done.stderr.count("error:") == 1
  assert "Traceback" not in done.stderr


def test_neither_jax_nor_tensorflow_is_loaded():
  code = """
import sys
from configs import common, methods
from trainers.config import help as config_help
from configs import methods
text = config_help.describe("configs/ae_i1k.py", "", common.parse_arg, methods.METHODS)
sys.exit(f"{'jax' in sys.modules} {'tensorflow' in sys.modules}" * ("batch_size" in text))
"""
  assert run(code=code).stderr.strip() == "False False"

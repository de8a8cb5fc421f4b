"""What --help_config prints: each argument of each config with its value and a meaning."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys

import pytest

import configs
from configs import common
from trainers.config import help
from umd.metrics.quantize import QUANTIZERS
from umd.paths import PATHS
from umd.runs.checkpoint import WEIGHTS
from umd.samplers import SOLVERS

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHARED = {"common", "images", "two_stages"}  # Parts of configs.
ALL = sorted(m.name for m in pkgutil.iter_modules(configs.__path__))
CONFIGS = [name for name in ALL if name not in SHARED]


def path(name):
  return os.path.join(ROOT, "configs", f"{name}.py")


def describe(name, text=""):
  return help.describe(path(name), text, common.parse_arg, common.METHODS)


def rows(text):
  """{argument: (mark, value, type and meaning)} of what is printed."""
  found = {}
  for line in text.split("A method stands for")[0].splitlines():
    if row := re.match(r"([* +]) (\w+) +(\S+)  +((?:int|float|text|bool)\b.*)", line):
      found[row[2]] = row[1].strip(), row[3], row[4]
  return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_argument_of_every_config_has_a_meaning(name):
  found = help.arguments(help.load(path(name)))
  assert list(found) == list(importlib.import_module(f"configs.{name}").ARGUMENTS)
  assert [n for n, argument in found.items() if len(argument.meaning) < 5] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_argument_is_printed_once_with_its_default_and_type(name):
  text = describe(name)
  defaults = importlib.import_module(f"configs.{name}").ARGUMENTS
  found = rows(text)
  assert found.keys() == defaults.keys()
  for argument, default in defaults.items():
    kind = {int: "int", float: "float", bool: "bool", str: "text"}[type(default)]
    mark, value, rest = found[argument]
    assert (mark, value, rest.split()[0]) == ("", str(default) or '""', kind)
  assert ("maskdit" in text) == ("method" in defaults)
  lines = [line for line in text.splitlines() if "--config" not in line]
  assert max(map(len, lines)) <= help.WIDTH


def test_the_choices_that_a_meaning_lists_are_those_that_there_are():
  """Where the choices are a table, the words "a, b or c" must be its keys."""
  known = {
    "method": common.METHODS,
    "path": PATHS,
    "dtype": ("bfloat16", "float32"),
    "quantize": QUANTIZERS,
    "weights": WEIGHTS,
    "init_weights": WEIGHTS,
    "sampler": SOLVERS,
    "wandb_mode": ("online", "offline", "disabled"),
  }
  checked = set()
  for name in CONFIGS:
    for argument, (meaning, _) in help.arguments(help.load(path(name))).items():
      if argument in known:
        listed = re.search(r"((?:\w+, )*\w+) or (\w+)", meaning)
        assert {*listed[1].split(", "), listed[2]} == set(known[argument]), (name, argument)
        checked.add(argument)
  assert checked == known.keys()


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
  assert [os.path.basename(h) for h in heads] == [
    *("folder.py", "two_stages.py", "images.py", "common.py")
  ]
  where = {h: lines.index(h) for h in heads}
  line_of = lambda name: next(i for i, x in enumerate(lines) if x[2:].startswith(name + " "))
  own, two_stages, images, shared = where.values()
  assert own < line_of("root") < two_stages < line_of("shots") < images
  assert images < line_of("train_split") < shared < line_of("variant")


CONFIG = '''
"""Mine."""
from configs import common

ARGUMENTS = {
  **common.ARGUMENTS,
  "adaln": "false",  # the other way
  # A remark on what comes next, no meaning.
  "seed": 5,
  "own": "a#b",  # of mine
  "lines": max(
    1,
    2,
  ),  # of two lines
  "silent": 1,
} | dict(more=2, **{"late": 3})  # late
del ARGUMENTS["remat"]
ARGUMENTS["added"] = 1  # afterwards
for i in range(2):
  ARGUMENTS[f"loop{i}"] = i
'''


def test_meanings_follow_the_ways_in_which_arguments_are_written(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(CONFIG)
  found = help.arguments(help.load(str(file)))
  meaning = {name: argument.meaning for name, argument in found.items()}
  assert meaning["adaln"] == "the other way"  # The newest comment.
  shared = help.arguments(help.load(path("common")))
  assert meaning["seed"] == shared["seed"].meaning != ""  # A new default, the old meaning.
  assert (meaning["own"], meaning["lines"]) == ("of mine", "of two lines")
  assert meaning["silent"] == meaning["loop0"] == meaning["loop1"] == ""
  assert meaning["added"] == "afterwards" and meaning["late"] == "late"
  assert "remat" not in meaning
  names = {os.path.basename(found[n].home.__file__) for n in ("adaln", "seed", "method")}
  assert names == {"common.py"}


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
from configs import common
from trainers.config import help as config_help
text = config_help.describe("configs/ae_i1k.py", "", common.parse_arg, common.METHODS)
sys.exit(f"{'jax' in sys.modules} {'tensorflow' in sys.modules}" * ("batch_size" in text))
"""
  assert run(code=code).stderr.strip() == "False False"

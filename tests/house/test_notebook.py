"""The notebook runs, and docs/methods.md shows the methods that train."""

import ast
import builtins
import importlib
import inspect
import json
import re
import symtable
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from configs import methods
from tools import method_pictures
from trainers import diffusion
from trainers.config import check as validate
from trainers.config.check import read_stage
from umd import objectives
from umd.masks import patchify
from umd.objectives import check
from umd.paths import make_path
from umd.trained.model import Pretrained

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "umd.ipynb"
CELLS = [
  "".join(cell["source"])
  for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
  if cell["cell_type"] == "code"
]
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", METHODS_PAGE, re.DOTALL)
OURS = ("umd", "configs", "trainers", "tools")


def unbound(cells: list[str]) -> set[str]:
  """Names that a cell looks up, and that no cell up to it binds."""
  known, missing = set(dir(builtins)), set()
  for cell in cells:
    tables, names = [symtable.symtable(cell, "cell", "exec")], []
    while tables:
      table = tables.pop()
      tables += table.get_children()
      names += [(table, symbol) for symbol in table.get_symbols()]
    top = {s.get_name() for t, s in names if t.get_type() == "module" and s.is_assigned()}
    top |= {s.get_name() for t, s in names if t.get_type() == "module" and s.is_imported()}
    used = {s.get_name() for _, s in names if s.is_referenced() and s.is_global()}
    used |= {s.get_name() for t, s in names if t.get_type() == "module" and s.is_referenced()}
    known |= top
    missing |= used - known
  return missing


def test_every_name_in_the_notebook_is_known_where_it_is_used():
  assert unbound(CELLS) == set()


def test_the_check_of_names_finds_one_that_is_missing():
  assert unbound(["a = 1", "def f(x):\n  return a + x + b\nf(c)", "c = 2"]) == {"b", "c"}


def test_everything_that_the_notebook_imports_from_us_is_there():
  found = 0
  for cell in CELLS:
    for node in ast.walk(ast.parse(cell)):
      if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
        module = importlib.import_module(node.module)
        for alias in node.names:
          found += 1
          if not hasattr(module, alias.name):
            importlib.import_module(f"{node.module}.{alias.name}")
  assert found >= 4


def test_every_question_to_a_model_has_arguments_that_it_takes():
  asked = set()
  for node in ast.walk(ast.parse("\n".join(CELLS))):
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
      continue
    of, name = node.func.value, node.func.attr
    if isinstance(of, ast.Name) and of.id in ("model", "encoder", "again"):
      keywords = {k.arg: None for k in node.keywords}
      inspect.signature(getattr(Pretrained, name)).bind(None, *node.args, **keywords)
      asked.add(name)
  assert asked == {"represent", "reconstruct", "sample", "trajectory", "inpaint"}


def test_the_notebook_is_small():
  assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("UMD_NOTEBOOK_STEPS", "2")
  monkeypatch.setattr("matplotlib.pyplot.show", lambda: matplotlib.pyplot.close("all"))
  matplotlib.use("Agg")
  names = {"__name__": "notebook"}
  for i, cell in enumerate(CELLS):
    exec(compile(cell, f"cell {i}", "exec"), names)
  assert "draws the same samples: True" in capsys.readouterr().out
  assert (tmp_path / names["WORKDIR"] / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_page_shows_each_method_as_it_stands_in_the_config(name):
  section = METHODS_PAGE.lower().index(f"\n## {name}\n")
  start = METHODS_PAGE.index("```python\n", section) + len("```python\n")
  shown = eval(METHODS_PAGE[start : METHODS_PAGE.index("```", start)], {"dict": dict})
  assert shown == methods.streams_of(name)


def test_the_config_on_the_page_trains_flow_matching(tmp_path):
  (block,) = (block for block in BLOCKS if "def get_config" in block)
  exec(block, names := {})
  config = names["get_config"]("variant=nano/2,steps=2,finetune_steps=1,num_samples=20")
  validate.validate(config, str(tmp_path))
  for name in config.stages:
    parts = diffusion.prepare(read_stage(config[name]), str(tmp_path), str(tmp_path))
    (stream,) = parts.streams
    assert [term.head for term in stream.terms.values()] == ["v"] == list(parts.model.heads)
    assert config[name].path.name == "flow"
  assert config.finetune.evals.generation.sampling.head == "v"


def test_pictures_are_of_all_methods_and_on_the_page():
  for name in method_pictures.methods():
    assert f"(images/method_{name}.png)" in METHODS_PAGE
    assert 0 < (ROOT / "docs" / "images" / f"method_{name}.png").stat().st_size < 60_000


@pytest.mark.parametrize("name", method_pictures.methods())
def test_a_picture_shows_what_is_trained(nano, name):
  path, streams = method_pictures.methods()[name]
  streams = objectives.make_streams(streams)
  heads = tuple(term.head for s in streams for term in s.terms.values())
  model, _ = nano("nano/2", heads=tuple(dict.fromkeys(heads)))
  check(streams, model, make_path(path), 16)  # They can be trained.
  # No pixel of the image is as grey as what is left out.
  image = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (1, 16, 16, 3)), jnp.float32)
  tokens = lambda picture: np.asarray(patchify(jnp.asarray(picture)[None], 2)[0])
  for stream in streams:
    first, noised, seen, *scored = method_pictures.panels(stream, path, image, 2)
    np.testing.assert_array_equal(first.image, image[0])
    clean = stream.timesteps == "clean"
    assert np.array_equal(noised.image, first.image) == clean
    visible = (tokens(seen.image) != 2 * method_pictures.HIDDEN - 1).any(axis=1)
    assert visible.sum() == round((1 - stream.mask_ratio) * 64)
    np.testing.assert_array_equal(tokens(seen.image)[visible], tokens(noised.image)[visible])
    # Terms: of the visible patches, of the others, or of all.
    expected = {"visible": visible, "masked": ~visible, "all": np.ones(64, bool)}
    unscored = np.float32(2 * method_pictures.UNSCORED - 1)
    for panel, term in zip(scored, stream.terms.values(), strict=True):
      shown = ~(tokens(panel.image) == unscored).all(axis=1)
      np.testing.assert_array_equal(shown, expected[term.where])
      if term.head == "x0":
        np.testing.assert_array_equal(tokens(panel.image)[shown], tokens(first.image)[shown])

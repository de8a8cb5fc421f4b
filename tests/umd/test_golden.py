"""The first steps of every method give the numbers that were committed."""

import copy
import re

import pytest

from tools import golden


@pytest.fixture(scope="module")
def committed():
  return golden.read()


# Those of CI reach both kinds of conditioning, masks and labels; the others take as long again.
SLOW = {"mae", "maskdit"}


@pytest.mark.parametrize(
  "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in golden.RUNS]
)
def test_numbers_of_training_are_the_golden_ones(method, committed):
  found = golden.train(method)
  wrong = golden.compare(method, found, committed["runs"][method])
  now = golden.environment()
  assert not wrong, "\n".join(
    [*wrong, f"golden: {committed['environment']}", f"now: {now}", golden.ACCEPT]
  )


def test_the_file_holds_all_methods_and_every_step(committed):
  assert committed["runs"].keys() == golden.RUNS.keys()
  for series in committed["runs"].values():
    lengths = {name: len(values) for name, values in series.items()}
    assert lengths.pop("average_behind") == 1
    assert set(lengths.values()) == {golden.STEPS}
    assert {"loss", "lr", "grad_norm", "param_norm"} < lengths.keys()
  assert {"jax", "jaxlib", "flax", "optax", "numpy"} <= committed["environment"]["versions"].keys()


@pytest.mark.parametrize("step", [0, golden.STEPS - 1])
def test_a_number_that_is_off_is_named_with_its_step(committed, step):
  run = committed["runs"]["umd"]
  changed = copy.deepcopy(run)
  name = "loss/noised/eps"
  changed[name][step] += 3 * golden.RTOL * max(run[name])
  assert golden.compare("umd", run, run) == []
  (line,) = golden.compare("umd", changed, run)
  assert re.match(rf"umd: {name} of step {step + 1} was .*, is .*: off by 3\.0e-", line)
  changed[name][step] = float("nan")
  assert len(golden.compare("umd", changed, run)) == 1


def test_a_metric_that_is_gone_or_new_is_named(committed):
  run = committed["runs"]["mae"]
  changed = {**run, "loss/new": run["loss"]}
  del changed["param_norm"]
  (line,) = golden.compare("mae", changed, run)
  assert "['param_norm'] are gone, ['loss/new'] are new" in line


def test_without_the_file_the_error_says_how_to_write_it(monkeypatch, tmp_path):
  monkeypatch.setattr(golden, "FILE", tmp_path / "losses.json")
  with pytest.raises(FileNotFoundError, match=r"tools\.golden --write"):
    golden.read()


def test_another_number_ends_the_command_with_what_to_do(monkeypatch, committed):
  """Not trained again here: its numbers are those of the file, but for one."""
  runs = copy.deepcopy(committed["runs"])
  monkeypatch.setattr(golden, "train", lambda method: runs[method])
  golden.main([])
  runs["dit"]["loss"][3] *= 1.5
  with pytest.raises(SystemExit, match=r"dit: loss of step 4 .*(?s:.)*tools\.golden --write"):
    golden.main([])

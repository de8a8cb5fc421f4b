"""A dry run tells what a start would do, fails as a start would, and leaves no trace."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from configs import ae_i1k_lp, eval_ae_i1k, methods, quickstart
from evaluators import Scheduled
from trainers import auto, diffusion, stages
from trainers.config import describe
from trainers.config.check import read_stage
from trainers.config.records import to_dict
from umd import objectives
from umd.codecs.codec import Pixels
from umd.devices import flops, memory
from umd.devices.mesh import make_mesh
from umd.models.network import param_shapes
from umd.runs import workdir as folder
from umd.runs import writers
from umd.runs.checkpoint import Checkpoints
from umd.state import TrainState, init_state
from umd.trained import saved

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = "variant=nano/2,steps=20,finetune_steps=4,batch_size=32,num_samples=20,sampling_steps=2"


def section(text, title):
  """The lines of the first section of that name."""
  lines = text.splitlines()
  at = next(i for i, line in enumerate(lines) if line.startswith(f"  {title} "))
  own = [lines[at], *(x for x in lines[at + 1 :])]
  end = next((i for i, x in enumerate(own) if i and not x.startswith(" " * 13)), len(own))
  return [x[15:] for x in own[:end]]


@pytest.fixture(scope="module")
def told():
  return describe.describe(quickstart.get_config(SMALL), None)


def test_both_stages_are_told_with_all_that_one_wants_to_know(told):
  first, second = told.split("[finetune]")
  assert "[pretrain] trainer diffusion" in first
  assert section(first, "data")[0].startswith("digits:train: 1,442 images, 8 x 8 x 1, 10 classes")
  assert "4 x cpu" in section(first, "devices")[0]
  assert "batch_size=32: 8 rows on each device" in section(first, "devices")
  assert section(first, "length") == [f"20 steps of 32 images, {20 * 32 / 1442:.4g} epochs"]
  assert "0 to 0.002 in 1 steps" in section(first, "optimiser")[0]
  assert section(first, "starts from") == ["random weights"]
  assert "FLOP a step" in section(first, "compute")[0]
  assert "stage 'pretrain' of this command, ema weights; afresh: label_embed" in second
  assert "20 samples; train digits:train" in section(second, "evaluation")[1]
  assert "sampler=ddim, steps=2, " in section(second, "samples")[0]
  assert "  samples " not in first
  assert told.endswith("dry run: nothing was written")


@pytest.mark.parametrize("every, steps", [(0, 7), (1, 7), (3, 7), (7, 7), (9, 7), (3, 9)])
def test_how_often_it_says_is_how_often_evaluators_are_due(every, steps):
  scheduled = Scheduled("", every, print)
  assert describe.times(every, steps) == sum(scheduled.due(s, steps) for s in range(1, steps + 1))


def test_the_parts_are_those_of_the_model_and_add_up(told):
  config = read_stage(quickstart.get_config(SMALL).finetune)
  model = diffusion.make_model(config, (8, 8, 1), 10)
  params = random_params(model)
  rows = describe.parts(params)[1:]
  number = {name: int(n.replace(",", "")) for name, _, n, _ in rows}
  assert number == {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}
  assert describe.count(params) == sum(number.values())
  assert abs(sum(float(row[3].removesuffix(" %")) for row in rows) - 100) < 0.1 * len(rows)
  printed = section(told.split("[finetune]")[1], "model")
  assert all(any(line.startswith(name) for line in printed) for name in number)
  assert f"{sum(number.values()) / 1e6:.2f}M parameters" in printed


def test_the_bytes_are_those_that_the_state_takes(tmp_path):
  config = quickstart.get_config(f"{SMALL},fsdp=4").pretrain
  config.optim.mu_dtype = "bfloat16"
  config.evals = {}
  parts = diffusion.prepare(read_stage(config), str(tmp_path), str(tmp_path))
  params = random_params(parts.model)  # Drawing them in the state would take long to compile.
  state = init_state(lambda key: params, parts.tx, jax.random.key(0), parts.mesh)
  shapes = describe.state_sizes(parts)
  whole = sum(x.nbytes for x in jax.tree.leaves(state))
  on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  assert memory.nbytes(shapes) == describe.nbytes_of_device(shapes, make_mesh()) == whole
  assert describe.nbytes_of_device(shapes, parts.mesh) == on_one < 0.7 * whole


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_streams_are_those_of_the_method(method):
  config = read_stage(quickstart.get_config(f"method={method}").pretrain)
  model = diffusion.make_model(config, (8, 8, 1), 10)
  streams = objectives.make_streams(to_dict(config.streams))
  head, *rows = describe.streams(model, streams, 128)
  assert {row[0] for row in rows} == set(config.streams)
  assert sum(int(row[1].split(" of ")[0]) for row in rows) == 128  # They share the batch.
  for row in rows:
    cells, stream = dict(zip(head, row, strict=True)), config.streams[row[0]]
    assert cells["mask"] == f"{stream.mask_ratio:g}"
    assert cells["patches seen"] == f"{round(16 * (1 - stream.mask_ratio))} of 16"
    assert cells["scored"].count(" on ") == len(stream.terms)


def test_the_peak_of_the_learning_rate_is_where_it_says(tmp_path):
  config = quickstart.get_config("steps=40").pretrain
  config.optim.warmup = 0.3
  parts = diffusion.prepare(read_stage(config), str(tmp_path), str(tmp_path))
  rates = [float(parts.schedule(step)) for step in range(41)]
  steps = int(
    re.search(r"0 to 0.002 in (\d+) steps", describe._optimiser(read_stage(config), 40)[1][0])[1]
  )
  assert np.argmax(rates) == steps == 12 and rates[steps] == np.float32(0.002)


@pytest.mark.parametrize(
  "number, unit, text",
  [
    (0, "B", "0 B"),
    (999, "B", "999 B"),
    (1000, "B", "1 kB"),
    (1234567, "B", "1.23 MB"),
    (9.996e8, "FLOP", "1 GFLOP"),
    (2e18, "FLOP", "2e+03 PFLOP"),
  ],
)
def test_amounts_are_told_with_three_digits(number, unit, text):
  assert describe.amount(number, unit) == text


def everything_below(path):
  return {str(f): f.is_file() and (f.stat().st_mtime_ns, f.stat().st_size) for f in path.rglob("*")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(workdir, config): its "pretrain" is a finished run of three steps, as training leaves it."""
  workdir = tmp_path_factory.mktemp("runs")
  config = quickstart.get_config("variant=nano/2,steps=3,batch_size=32")
  config.stages, config.pretrain.evals = ("pretrain",), {}
  model = diffusion.make_model(read_stage(config.pretrain), (8, 8, 1), 10)
  params, place = random_params(model), str(workdir / "pretrain")
  folder.start(place, to_dict(read_stage(config.pretrain)))
  folder.write_json(f"{place}/model.json", saved.describe_model(model, Pixels()))
  with Checkpoints(place) as checkpoints:
    checkpoints.save(TrainState(jnp.int32(3), params, params, ()), 3, {})
  folder.finish(place, {"step": 3})
  return workdir, config


def test_what_is_there_is_looked_at_and_nothing_written(trained):
  workdir, config = trained
  before = everything_below(workdir)
  finished = describe.describe(config, str(workdir))
  assert section(finished, "workdir") == [f"{workdir}/pretrain, finished at step 3"]
  (workdir / "pretrain/summary.json").rename(workdir / "aside.json")
  try:
    assert "goes on from step 3" in section(describe.describe(config, str(workdir)), "workdir")[0]
  finally:
    (workdir / "aside.json").rename(workdir / "pretrain/summary.json")
  assert everything_below(workdir) == before
  with pytest.raises(ValueError, match="another config"):
    other = quickstart.get_config("variant=nano/2,steps=4,batch_size=32")
    describe.describe(other, str(workdir))


def test_evaluation_and_probe_of_a_run_are_told(trained):
  workdir, _ = trained
  digits = dict(dataset="digits", train_split="train", test_split="test", size=8, batch_size=32)
  text = ",".join(f"{k}={v}" for k, v in digits.items())
  config = eval_ae_i1k.get_config(f"{text},probe=False,sample_fid=False,num_samples=20")
  for spec in (config.eval.evals.generation.train, config.eval.evals.generation.test):
    spec.update(name="digits", pp="")
  evaluation = describe.describe(config, str(workdir))
  assert section(evaluation, "starts from") == [f"the run in {workdir}/pretrain, ema weights"]
  assert "AutoEncoder: 8 x 8 x 1 in 16 patches" in section(evaluation, "model")[0]
  assert "cfg_scale=1.0" in section(evaluation, "samples")[0]  # It has no labels to be guided by.
  assert "once" in section(evaluation, "evaluation")[1]
  probe = ae_i1k_lp.get_config(f"{text},select_split=test,steps=9,lrs=0.1+1")
  for spec in (probe.linear_probe.data, probe.linear_probe.select, probe.linear_probe.test):
    spec.update(name="digits", pp="")
  linear = describe.describe(probe, str(workdir))
  assert "2 learning rates x timesteps (0, 50), a head each: 32 x 10" in section(linear, "heads")[0]
  assert section(linear, "length")[0].startswith("9 steps of 32 images")
  assert not (workdir / "eval").exists() and not (workdir / "linear_probe").exists()


def test_a_run_that_only_a_workdir_can_hold_needs_one(tmp_path):
  with pytest.raises(ValueError, match=r"init_from='stage:pretrain'.*Give --workdir"):
    describe.describe(eval_ae_i1k.get_config("probe=False"), None)
  with pytest.raises(FileNotFoundError, match="holds no run"):
    describe.describe(eval_ae_i1k.get_config("probe=False"), str(tmp_path / "empty"))


@pytest.mark.parametrize(
  "overrides, error, told",
  [
    ({"batch_size": 30}, ValueError, "batch_size=30 must be a positive multiple"),
    ({"optim.lr": -1.0}, ValueError, "optim.lr=-1.0"),
    ({"data.name": "npz:absent.npz", "data.split": "all"}, FileNotFoundError, "no such file"),
    ({"init_from": "absent"}, FileNotFoundError, "no checkpoint in"),
  ],
)
def test_errors_are_those_of_a_start(tmp_path, overrides, error, told):
  found = []
  for start in (describe.describe, stages.run):
    config = quickstart.get_config(SMALL).pretrain
    config.update_from_flattened_dict(overrides)
    with pytest.raises(error, match=told) as raised:
      start(config, str(tmp_path / "run"))
    found.append(str(raised.value))
  assert found[0] == found[1]


def test_the_command_needs_no_workdir_and_writes_nothing(tmp_path):
  command = [sys.executable, "-m", "train", "--config", f"configs/quickstart.py:{SMALL}"]
  temporary = tmp_path / "temporary"
  temporary.mkdir()
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TMPDIR": str(temporary)}
  settings = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
  workdir = tmp_path / "run"
  done = subprocess.run([*command, "--dry_run", "--workdir", str(workdir)], **settings)
  assert done.returncode == 0 and "dry run: nothing was written" in done.stdout, done.stderr
  assert f"{workdir}/pretrain, new" in done.stdout
  assert not workdir.exists() and not list(temporary.iterdir())


@pytest.mark.parametrize("kind, peak", [("cpu", None), ("TPU v4", 275e12)])
def test_the_work_of_a_step_is_told_and_shared_by_the_devices(monkeypatch, tmp_path, kind, peak):
  config = quickstart.get_config(f"{SMALL},dtype=bfloat16").pretrain
  config.evals = {}
  monkeypatch.setattr(diffusion.chips, "peak_flops", lambda found, dtype: known[found, dtype])
  known = {("cpu", "bfloat16"): peak}  # What this machine is taken for.
  parts = diffusion.prepare(read_stage(config), str(tmp_path), str(tmp_path))
  batch = auto.batch_shapes(parts.model, 32)
  total = flops.train_step(parts.objective, param_shapes(parts.model), batch)
  assert parts.work == writers.Work(total / 4, peak)
  lines = describe.compute(parts, 32)
  assert lines[0].startswith(
    f"{describe.amount(total, 'FLOP')} a step, {describe.amount(total / 32, 'FLOP')} "
  )
  assert ("275 TFLOP/s a device" in lines[-1]) == bool(peak)
  if peak:
    assert float(lines[-1].split()[0]) == pytest.approx(total / 4 / peak, rel=5e-3)

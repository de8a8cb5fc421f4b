"""The trainer as a user meets it: interrupted, resumed, staged, and stopped by bad numbers."""

import json
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import quickstart
from trainers import diffusion, stages
from trainers.config.check import read_stage
from umd import data, report
from umd.runs import workdir
from umd.runs.writers import read_jsonl

STEPS = 24
ARGUMENTS = f"variant=nano/2,steps={STEPS},finetune_steps=4,batch_size=32,num_samples=20"
OVERRIDES = {
  "checkpoint.every": 4,
  "log_every": 4,
  "evals.fewshot.every": 8,
  "evals.losses.every": 8,
  "evals.reconstruction.every": 8,
}


def quick_judge(config):
  """The config, its samples judged by a classifier that has learnt from few images, and quickly."""
  config.finetune.evals.generation.train.split = "train[:10%]"
  return config


def pretrain_config(**overrides):
  config = quickstart.get_config(ARGUMENTS + ",method=mae").pretrain  # compiles fastest
  config.update_from_flattened_dict({**OVERRIDES, **overrides})
  return config


def train(config, workdir, **arguments) -> dict:
  stage = read_stage(config)
  parts = diffusion.prepare(stage, str(workdir), str(workdir))
  return diffusion.run(parts, stage, str(workdir), "run", cache=str(workdir), **arguments)


def saved_state(workdir: str, step: int) -> dict:
  """{leaf: array} of everything that a checkpoint holds."""
  path = os.path.join(workdir, "checkpoints", str(step), "state")
  with ocp.PyTreeCheckpointer() as checkpointer:
    state = checkpointer.restore(path)
  return {
    jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)
  }


def reported(workdir) -> list[dict]:
  """What the report in a folder says of its runs."""
  text = (workdir / "report.html").read_text(encoding="utf-8")
  return json.loads(text.split('id="report-data">')[1].split("</script>")[0])["runs"]


def test_stages_run_in_order_and_a_finished_one_is_not_run_again(tmp_path, capsys):
  arguments = (
    "variant=nano/2,steps=3,finetune_steps=2,batch_size=32,num_samples=20,sampling_steps=2"
  )
  config = quick_judge(quickstart.get_config(arguments))
  first = stages.run(config, str(tmp_path), default=quickstart.get_config())
  assert [s["step"] for s in first] == [3, 2]
  for stage in ("pretrain", "finetune"):
    files = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "model.json")
    for name in (*files, "checkpoints"):
      assert (tmp_path / stage / name).exists()
  for summary, stage in zip(first, ("pretrain", "finetune"), strict=True):
    (told,) = reported(tmp_path / stage)
    assert (told["state"], told["step"]) == ("finished", summary["step"])
    assert told["latest"].keys() == summary["metrics"].keys()
    run = report.read_run(str(tmp_path / stage))
    changed = workdir.differences(run.default, run.config)
    assert not any(default is None for default, _ in changed.values())
    assert list(changed["steps"]) == [{3: 2000, 2: 500}[summary["step"]], summary["step"]]
  assert [run["state"] for run in reported(tmp_path)] == ["finished", "finished"]
  printed = capsys.readouterr().out
  assert "started from" in printed and "is finished" not in printed
  again = stages.run(quick_judge(quickstart.get_config(arguments)), str(tmp_path))
  assert capsys.readouterr().out.count("is finished") == 2
  assert json.loads(json.dumps(first)) == again
  other = quickstart.get_config(arguments + ",lr=0.1")
  with pytest.raises(ValueError, match=r"optim\.lr: there 0\.002, now 0\.1"):
    stages.run(other, str(tmp_path))
  table = stages.table(again)
  assert "generation/agreement" in table and "fewshot/class_strict_10shot_mean" in table


def test_another_config_in_the_same_workdir_is_refused(tmp_path, capsys):
  config = pretrain_config(steps=2, log_every=2)
  config.evals = {}
  train(config, tmp_path)
  config.log_every = 1  # This one changes no number: it is told, and no more.
  diffusion.prepare(read_stage(config), str(tmp_path), str(tmp_path))
  assert "config: log_every was 2, is now 1" in capsys.readouterr().out
  config.optim.lr = 0.1
  with pytest.raises(ValueError, match=r"optim\.lr: there 0\.002, now 0\.1"):
    train(config, tmp_path)


def test_without_checkpoints_a_run_ends_but_nothing_can_start_from_it(tmp_path):
  config = quickstart.get_config("method=mae,variant=nano/2,steps=2,batch_size=32")
  config.pretrain.evals, config.pretrain.checkpoint.every = {}, 0
  summary = train(config.pretrain, tmp_path / "pretrain")
  assert summary["step"] == 2 and (tmp_path / "pretrain/summary.json").exists()
  assert not list((tmp_path / "pretrain/checkpoints").glob("*"))
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    stages.run(config, str(tmp_path))


def test_labels_cannot_be_used_where_there_are_none(tmp_path):
  path = tmp_path / "unlabelled.npz"
  np.savez(path, images=np.zeros((40, 8, 8, 1), np.float32))
  spec = {"data.name": f"npz:{path}", "data.split": "all"}
  config = pretrain_config(use_labels=True, **spec)
  with pytest.raises(ValueError, match=r"use_labels=True, but .* has no labels"):
    diffusion.prepare(read_stage(config), str(tmp_path / "run"), str(tmp_path))


def poison(monkeypatch, bad):
  """Makes the images of the steps for which `bad(step)` is true NaN."""
  honest = data.train_batches

  def poisoned(*args, start_step=0, **kwargs):
    batches = honest(*args, start_step=start_step, **kwargs)
    for step, batch in enumerate(batches, start_step + 1):
      if bad(step):
        batch["image"] = np.full_like(batch["image"], np.nan)
      yield batch

  monkeypatch.setattr(data, "train_batches", poisoned)


def test_a_batch_that_is_not_finite_is_skipped_and_told(tmp_path, monkeypatch, capsys):
  poison(monkeypatch, lambda step: step in (6, 7))
  summary = train(pretrain_config(steps=12, evals={}), tmp_path)
  assert summary["step"] == 12 and np.isfinite(summary["metrics"]["loss"])
  assert "not applied: step 6, 7: grad_norm, loss" in capsys.readouterr().out
  skipped = {r["step"]: r["skipped"] for r in read_jsonl(str(tmp_path / "metrics.jsonl"))}
  assert skipped == {4: 0, 8: 2, 12: 0}
  for leaf, value in saved_state(str(tmp_path), 12).items():
    assert np.isfinite(value).all(), leaf


def test_values_that_stay_not_finite_stop_the_run_and_are_found(tmp_path, monkeypatch):
  poison(monkeypatch, lambda step: step >= 6)
  config = pretrain_config(evals={}, **{"guard.max_skipped": 5})
  with pytest.raises(FloatingPointError, match=r"Step 10: .*5 steps in a row.*\n?.*image"):
    train(config, tmp_path)
  assert {"nonfinite_step_10.npz", "nonfinite_step_10.txt"} <= set(os.listdir(tmp_path))
  assert [(run["state"], run["step"]) for run in reported(tmp_path)] == [("failed", 8)]


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"batch_size": 30}, "batch_size=30 must be a positive multiple of the 4 devices"),
    ({"data.name": "cats"}, r"data.name='cats' is not one of \['digits', 'tfds:NAME'"),
    ({"model.variant": "nano/3"}, "patch of 3 px does not divide"),
    ({"streams.clean.rows": (0.0, 0.001)}, "rounds to no row"),
    ({"optim.warmup": float(STEPS)}, "optim.warmup=24.0 must be a number in"),
    ({"epochs": 3.0}, "steps=24 and epochs=3.0: give one"),
    ({"evals.fewshot.type": "fewshots"}, "evals.fewshot.type='fewshots' must be one of"),
  ],
)
def test_bad_settings_are_errors_before_anything_is_written(tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    diffusion.prepare(read_stage(pretrain_config(**overrides)), str(tmp_path), str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_flow_matching_is_a_config(tmp_path):
  """The example of the README: another method, another head, no code."""
  config = quick_judge(quickstart.get_config(ARGUMENTS)).finetune
  terms = {"v": {"head": "v", "where": "all", "weight": 1.0}}
  noised = {"rows": (0.0, 1.0), "timesteps": "uniform", "mask_ratio": 0.0, "labels": True}
  with config.unlocked():
    config.streams = {"noised": {**noised, "terms": terms}}
    config.model.heads = ("v",)
    config.path.name = "flow"
    config.evals.generation.sampling.update(head="v", sampler="heun", steps=2)
  summary = train(config, tmp_path)
  assert summary["step"] == 4
  assert np.isfinite(summary["metrics"]["loss/noised/v"])
  assert 0 <= summary["metrics"]["generation/agreement"] <= 1


@pytest.mark.parametrize(
  ("sampling", "message"),
  [
    ({"eta": 0.5, "sampler": "heun"}, r"eta=0\.5: sampler='heun' takes no eta"),
    ({"steps": 1001}, r"steps=1001 must be in \[1, timesteps=1000\]"),
    ({"head": "v"}, "head='v' is not among"),
  ],
)
def test_bad_sampling_is_an_error_at_start(tmp_path, sampling, message):
  config = quickstart.get_config(ARGUMENTS).finetune
  with config.unlocked():
    config.evals.generation.sampling.update(sampling)
  with pytest.raises(ValueError, match=rf"evals.generation[^\n]*{message}"):
    diffusion.prepare(read_stage(config), str(tmp_path), str(tmp_path))

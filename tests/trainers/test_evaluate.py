"""Evaluation of a trained run: the numbers of training again, and nothing without a checkpoint."""

import os

import pytest

from configs import eval_ae_i1k, quickstart
from trainers import evaluate, stages
from trainers.config.check import read_stage
from umd.runs import workdir as folder
from umd.runs.writers import read_jsonl

RUN = "variant=nano/2,finetune_steps=3,batch_size=32,num_samples=20,sampling_steps=2"


def trained_config(arguments=RUN):
  """One stage with labels, measured by every evaluator at step 3 and never before."""
  found = quickstart.get_config(arguments)
  with found.unlocked():
    evals = {**found.pretrain.evals.to_dict(), **found.finetune.evals.to_dict()}
    evals["fewshot"].update(shots=(1, 5), features=("class",), pixels=False)
    evals["losses"].update(bins=2, num=200)
    evals["generation"]["train"]["split"] = "train[:10%]"  # to be judged by a quick learner
    stage = found.finetune
    stage.evals, stage.init_from, stage.init_fresh = evals, "", ()
    found.stages, found.pretrain = ("pretrain",), stage
    # Weights that differ: the average is behind what was trained.
    stage.optim.warmup, stage.optim.lr = 0.0, 0.01
  return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(workdir, summary of the training in its folder "pretrain")."""
  workdir = tmp_path_factory.mktemp("trained")
  (summary,) = stages.run(trained_config(), str(workdir))
  return workdir, summary


def eval_config(arguments="", evals=None):
  """A config for the digits, in the shape of the one for ImageNet."""
  config = eval_ae_i1k.get_config(f"size=8,probe=False,batch_size=256{arguments}")
  with config.unlocked():
    config.eval.evals = trained_config().pretrain.evals if evals is None else evals
  return config


def measured(summary) -> dict:
  names = "fewshot/", "losses/", "reconstruction/", "generation/"
  return {k: v for k, v in summary["metrics"].items() if k.startswith(names)}


def contents(path) -> dict:
  return {str(f): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_an_evaluation_gives_the_numbers_of_training(trained):
  workdir, summary = trained
  before, expected = contents(workdir / "pretrain"), measured(summary)
  assert {name.split("/")[0] for name in expected} == set(trained_config().pretrain.evals)
  (found,) = stages.run(eval_config(), str(workdir))
  assert found["step"] == 3
  assert found["metrics"] == expected
  assert contents(workdir / "pretrain") == before
  assert os.listdir(workdir / "eval" / "images")
  assert "generation/agreement" in stages.table([found])


def test_every_evaluation_adds_a_line_that_says_what_was_measured(trained):
  """It is no run that could be continued wrongly, so its settings may change."""
  workdir, summary = trained
  path = str(workdir / "eval" / "evaluations.jsonl")
  earlier = read_jsonl(path)
  evals = {"reconstruction": trained_config().pretrain.evals.reconstruction.to_dict()}
  for count, num in ((1, 0), (2, 64)):
    evals["reconstruction"]["num"] = num
    (found,) = stages.run(eval_config(evals=evals), str(workdir))
    assert set(found["metrics"]) == {"reconstruction/masked_mse", "reconstruction/mean_image_mse"}
    records = read_jsonl(path)
    assert records[:-1] == earlier and len(records) == len(earlier) + 1
    record, earlier = records[-1], records
    assert record["metrics"] == found["metrics"]
    assert (record["step"], record["weights"]) == (3, "ema")
    assert record["run"] == str(workdir / "pretrain")
    assert record["evals"]["reconstruction"]["num"] == num
    of_training = {k: v for k, v in measured(summary).items() if k in found["metrics"]}
    assert (found["metrics"] == of_training) == (count == 1)


def test_weights_are_the_average_or_the_raw_ones_as_asked(trained, tmp_path):
  workdir, summary = trained
  losses = {"losses": trained_config().pretrain.evals.losses.to_dict()}
  config = eval_config(f",weights=raw,run={workdir}", losses)
  (found,) = stages.run(config, str(tmp_path))  # Another workdir than the run's.
  raw = {k: v for k, v in measured(summary).items() if k.startswith("losses/raw/")}
  average = {k: v for k, v in measured(summary).items() if k.startswith("losses/ema/")}
  for name, value in raw.items():
    assert value != average[name.replace("raw", "ema")]
    # What evaluators take for the average is what was chosen.
    assert found["metrics"][name] == found["metrics"][name.replace("raw", "ema")] == value
  assert set(os.listdir(tmp_path)) <= {"eval", "cache", "report.html", "stages.json"}


@pytest.mark.parametrize(
  "arguments, told",
  [
    (",variant=:B/4", "variant='B/4', there 'nano/2'"),
    (",size=64", "size=64, there 8"),
    (",latent_diffusion=True", "latent_diffusion=True, there False"),
  ],
)
def test_a_description_of_another_model_is_refused(trained, arguments, told):
  with pytest.raises(ValueError, match=told):
    stages.run(eval_config(arguments), str(trained[0]))


@pytest.mark.parametrize("finetune", [False, True])
def test_without_a_checkpoint_nothing_is_evaluated(tmp_path, finetune):
  """Random weights would give numbers, too."""
  workdir = tmp_path / "work"
  with pytest.raises(FileNotFoundError, match="holds no run"):
    stages.run(eval_config(f",finetune={finetune}"), str(workdir))
  assert not workdir.exists()


def test_a_run_that_saved_nothing_is_not_evaluated(trained, tmp_path):
  for name in ("config.json", "model.json"):
    kept = folder.read_json(str(trained[0] / "pretrain" / name))
    folder.write_json(str(tmp_path / "pretrain" / name), kept)
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    stages.run(eval_config(), str(tmp_path))
  assert not (tmp_path / "eval").exists()


def test_an_evaluation_can_be_planned_before_its_run_is_trained(tmp_path):
  config = read_stage(eval_config().eval)
  assert evaluate.prepare(config, str(tmp_path / "eval"), str(tmp_path)) is None
  with pytest.raises(FileNotFoundError, match="'' holds no run"):
    evaluate.run(None, config, str(tmp_path / "eval"), "eval", cache=str(tmp_path))
  assert not os.listdir(tmp_path)

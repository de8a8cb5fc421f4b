"""The linear probe of a trained run: chosen on one set, reported on another, resumed bitwise."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import ae_i1k_lp, quickstart
from trainers import linear_probe, stages
from trainers.config.check import read_stage
from umd import data
from umd.codecs.codec import Pixels
from umd.devices.mesh import make_mesh, replicated
from umd.models.autoencoder import AutoEncoder
from umd.runs import workdir as folder
from umd.runs.checkpoint import Checkpoints
from umd.runs.writers import read_jsonl
from umd.state import TrainState
from umd.trained import saved

STEPS = 60
USELESS, GOOD = 1e-6, 30.0  # Learning rates: the first leaves its head where it started.
ACCURACIES = [f"probe/{s}/t{t}" for t in (0, 50) for s in ("top1", "top5", "lr")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, nano):
  """Workdir of stages whose "pretrain" holds an encoder: random features will do."""
  workdir, (model, params) = tmp_path_factory.mktemp("encoder"), nano("nano/2", (8, 8, 1))
  state = TrainState(jnp.int32(7), params, jax.tree.map(jnp.copy, params), ())
  path = str(workdir / "pretrain")
  folder.start(path, quickstart.get_config("variant=nano/2,adaln=true").pretrain.to_dict())
  folder.write_json(os.path.join(path, "model.json"), saved.describe_model(model, Pixels()))
  checkpoints = Checkpoints(path)
  checkpoints.save(jax.device_put(state, replicated(make_mesh())), 7, {"position": 0})
  checkpoints.close()
  return workdir


def digits(split):
  return dict(name="digits", split=split, pp="", data_dir="", cache=False)


def probe_config(arguments="", **overrides):
  """A config for the digits, in the shape of the one for ImageNet."""
  config = ae_i1k_lp.get_config(f"size=8,steps={STEPS},batch_size=256{arguments}")
  with config.unlocked():
    stage = config.linear_probe
    stage.data, stage.select, stage.test = map(digits, ("train[:90%]", "train[90%:]", "test"))
    stage.eval_batch_size, stage.log_every, stage.eval_every = 64, 1, 20
    stage.lrs, stage.checkpoint.every = (USELESS, GOOD), 20
    stage.update_from_flattened_dict(overrides)
  return config


def saved_heads(workdir, step) -> dict:
  path = os.path.join(workdir, "checkpoints", str(step), "state")
  with ocp.PyTreeCheckpointer() as checkpointer:
    leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path))
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}


def run(config, workdir, encoder):
  """The stage alone, on the encoder in another workdir."""
  stage, cache = read_stage(config.linear_probe), str(workdir)
  start = dict(init_from=str(encoder / "pretrain"))
  parts = linear_probe.prepare(stage, str(workdir), cache, **start)
  return linear_probe.run(parts, stage, str(workdir), "linear_probe", cache=cache, **start)


@pytest.fixture(scope="module")
def finished(encoder):
  """(summary, workdir) of a probe that ran through, as the command runs it."""
  before = {f: f.read_bytes() for f in (encoder / "pretrain").rglob("*") if f.is_file()}
  (summary,) = stages.run(probe_config(), str(encoder))
  after = {f: f.read_bytes() for f in (encoder / "pretrain").rglob("*") if f.is_file()}
  assert before == after, "the probe changed what it probes"
  return summary, encoder / "linear_probe"


def test_both_kinds_of_features_are_probed_and_the_better_head_is_reported(finished):
  summary, workdir = finished
  metrics = summary["metrics"]
  assert summary["step"] == STEPS and summary["headline"] == [
    *(
      "probe/top1/t0",
      "probe/top5/t0",
      "probe/lr/t0",
      "probe/top1/t50",
      "probe/top5/t50",
      "probe/lr/t50",
    ),
  ]
  for t in (0, 50):
    assert metrics[f"probe/lr/t{t}"] == GOOD
    assert (
      metrics[f"probe/select/t{t}/lr{GOOD:g}"] > 0.2 > metrics[f"probe/select/t{t}/lr{USELESS:g}"]
    )
    assert 0.2 < metrics[f"probe/top1/t{t}"] < metrics[f"probe/top5/t{t}"] <= 1
  assert metrics["probe/top1/t0"] != metrics["probe/top1/t50"]
  records = read_jsonl(str(workdir / "metrics.jsonl"))
  assert [r["step"] for r in records if "probe/top1/t0" in r] == [20, 40, 60]
  rates = [r["lr"] for r in records if "lr" in r]
  assert len(rates) == STEPS
  assert max(rates) == 1.0 and rates[-1] < 0.05  # a share of every head's own


def test_a_finished_probe_is_not_run_again(finished, encoder, capsys):
  summary, _ = finished
  again = stages.run(probe_config(), str(encoder))
  assert "is finished" in capsys.readouterr().out
  assert again == json.loads(json.dumps([summary]))


def test_accuracies_are_those_of_the_saved_heads(finished, encoder):
  """From the checkpoints alone, with NumPy behind the encoder, at t = 0."""
  summary, workdir = finished
  heads = saved_heads(str(workdir), STEPS)
  known = saved.open_run(str(encoder / "pretrain"))
  with ocp.PyTreeCheckpointer() as checkpointer:
    state = checkpointer.restore(str(encoder / "pretrain/checkpoints/7/state"))
  images, labels = data.load("digits", "test").arrays()
  keys = jax.random.split(jax.random.key(0), len(images))
  represent = jax.jit(lambda *inputs: known.inference.represent(*inputs)["class"])
  features = np.asarray(represent(state["ema_params"], images, keys))
  leaf = lambda name: next(v for k, v in heads.items() if "'t0'" in k and k.endswith(name))
  x = (features - leaf("['mean']")) / np.sqrt(leaf("['var']") + 1e-6)
  kernel, bias = (leaf(f"['params']['{name}']")[1] for name in ("kernel", "bias"))
  logits = x @ kernel + bias
  ranks = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
  assert summary["metrics"]["probe/top1/t0"] == pytest.approx((ranks < 1).mean(), abs=0.01)
  assert summary["metrics"]["probe/top5/t0"] == pytest.approx((ranks < 5).mean(), abs=0.01)


def test_an_interrupted_probe_continues_bitwise(finished, encoder, tmp_path, monkeypatch):
  whole, reference = finished
  honest = data.train_batches

  def interrupted(*args, **kwargs):
    for step, batch in enumerate(honest(*args, **kwargs), 1):
      if step == 40:  # Two batches are read ahead: step 20 is saved, step 40 never is.
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(data, "train_batches", interrupted)
    run(probe_config(), tmp_path, encoder)
  assert os.listdir(tmp_path / "checkpoints") == ["20"]
  summary = run(probe_config(), tmp_path, encoder)
  want, got = (saved_heads(str(path), STEPS) for path in (reference, tmp_path))
  assert want.keys() == got.keys()
  for leaf in want:
    assert want[leaf].tobytes() == got[leaf].tobytes(), leaf
  for name in ACCURACIES:
    assert summary["metrics"][name] == whole["metrics"][name]


def test_the_learning_rate_is_chosen_on_select_and_not_on_test(encoder, tmp_path):
  """Where `select` calls every digit by another's name, the head that learnt least is best."""
  images, labels = data.load("digits", "train[90%:]").arrays()
  wrong = str(tmp_path / "wrong.npz")
  np.savez(wrong, images=images, labels=(labels + 3) % 10)
  select = {"select.name": f"npz:{wrong}", "select.split": "all"}
  config = probe_config(",use_noised_pred=False", **select)
  metrics = run(config, tmp_path / "run", encoder)["metrics"]
  assert metrics[f"probe/select/t0/lr{USELESS:g}"] > metrics[f"probe/select/t0/lr{GOOD:g}"]
  assert metrics["probe/lr/t0"] == USELESS
  assert metrics["probe/top1/t0"] < 0.25  # of that head, on the honest test
  assert not any("t50" in name for name in metrics)


def prepare(config, encoder, workdir):
  where = saved.locate(config.linear_probe.init_from, str(encoder))
  return linear_probe.prepare(read_stage(config.linear_probe), str(workdir), str(workdir), where)


@pytest.mark.parametrize(
  "arguments, told",
  [
    (",width=768", "width=768, there 32"),
    (",variant=B/4", "variant='B/4', there 'nano/2'"),
  ],
)
def test_a_description_of_another_encoder_is_refused(encoder, tmp_path, arguments, told):
  with pytest.raises(ValueError, match=told):
    prepare(probe_config(arguments), encoder, tmp_path)


def test_a_true_description_is_accepted(encoder, tmp_path):
  true = ",width=32,variant=:nano/2,adaln=True,size=8,latent_diffusion=False"
  assert prepare(probe_config(true), encoder, tmp_path).steps == STEPS


@pytest.mark.parametrize(
  "overrides, told",
  [
    ({"batch_size": 30}, "batch_size=30 must be a positive multiple of the 4 devices"),
    ({"lrs": (1.0, 0.0)}, r"lrs=.* must be a tuple of numbers in \(0, inf\)"),
    ({"timesteps": (0, 1001)}, r"timesteps=\[1001\] must be in \[0, 1000\]"),
    ({"warmup": 5.0}, "warmup=5.0 must be a number in"),
    ({"data.pp": "resize(16)"}, r"images of \(16, 16, 1\) and 10 classes"),
  ],
)
def test_bad_settings_are_errors_before_anything_is_written(encoder, tmp_path, overrides, told):
  with pytest.raises(ValueError, match=told):
    prepare(probe_config(**overrides), encoder, tmp_path)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  "labels, told",
  [(None, "0 classes"), (np.arange(4) % 2, "2 classes")],
  ids=["no labels", "other classes"],
)
def test_data_of_other_classes_are_refused(encoder, tmp_path, labels, told):
  path = str(tmp_path / "other.npz")
  arrays = dict(images=np.zeros((4, 8, 8, 1), np.float32))
  np.savez(path, **arrays, **({} if labels is None else dict(labels=labels)))
  with pytest.raises(ValueError, match=told):
    prepare(probe_config(**{"test.name": f"npz:{path}", "test.split": "all"}), encoder, tmp_path)


def test_without_a_checkpoint_nothing_is_probed(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no run"):
    stages.run(probe_config(), str(tmp_path / "work"))
  # A run that has started but saved nothing is no encoder either.
  path = str(tmp_path / "work/pretrain")
  folder.start(path, quickstart.get_config("variant=nano/2").pretrain.to_dict())
  model = AutoEncoder("nano/2", (8, 8, 1))
  folder.write_json(os.path.join(path, "model.json"), saved.describe_model(model, Pixels()))
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    stages.run(probe_config(), str(tmp_path / "work"))


def test_a_probe_can_be_planned_before_its_encoder_is_trained(tmp_path):
  config = read_stage(probe_config().linear_probe)
  assert linear_probe.prepare(config, str(tmp_path / "lp"), str(tmp_path)) is None
  with pytest.raises(FileNotFoundError, match="'' holds no run"):
    linear_probe.run(None, config, str(tmp_path / "lp"), "linear_probe", cache=str(tmp_path))
  assert not os.listdir(tmp_path)


def test_another_config_in_the_same_workdir_is_refused(finished, encoder):
  with pytest.raises(ValueError, match=r"wd: there 5e-05, now 0\.1"):
    stages.run(probe_config(",wd=0.1"), str(encoder))

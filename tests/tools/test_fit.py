"""tools.fit: the trainer's own step, without data and without devices, and arithmetic for GPUs."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import Function, at_once

from configs import ae_i1k, methods, quickstart
from tools.fit import __main__, compile, shapes
from trainers import diffusion, stages
from trainers.config import describe
from trainers.config.check import read_stage
from trainers.optim import make_step
from umd import objectives, paths
from umd.devices import chips, memory, mesh
from umd.models.autoencoder import AutoEncoder
from umd.models.network import param_shapes
from umd.state import Step, init_state

SMALL = "variant=nano/2,steps=20,batch_size=32"
NO_DATA = "variant=nano/8,size=64,steps=9,batch_size=32"
UNSAID = argparse.Namespace(image_size=0, num_classes=0)


@pytest.fixture
def alone(monkeypatch):
  """Keeps what the program sets for the whole process from the other tests."""
  monkeypatch.setattr(compile, "prepare", lambda: None)


def program(*arguments):
  """(exit status of the program; its arguments are these)."""
  with pytest.raises(SystemExit) as ended:
    __main__.main(list(arguments))
  return ended.value.code


def test_the_step_is_the_trainers(tmp_path):
  config = quickstart.get_config(f"{SMALL},scan=true").pretrain
  config.evals = {}
  config = read_stage(config)
  planned = shapes.plan(config, jax.devices())
  parts = diffusion.prepare(config, str(tmp_path), str(tmp_path))
  blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), describe.state_sizes(parts).params)
  state = init_state(lambda key: blank, parts.tx, jax.random.key(0), parts.mesh)
  rows = {"image": np.zeros((32, 8, 8, 1), np.float32), "label": np.zeros(32, np.int32)}
  step = make_step(config, parts, state)
  real = step.lower(state, mesh.put_batch(rows, parts.mesh))
  ours = planned.step.lower(planned.state, planned.batch)
  assert ours.as_text() == real.as_text()


def test_neither_data_nor_vae_need_be_here():
  gpus = memory.gpus("H100x8")
  planned = shapes.plan(read_stage(ae_i1k.get_config(NO_DATA).pretrain), gpus)
  assert planned.batch["image"].shape == (32, 64, 64, 3)
  assert planned.parts.model.num_classes == 0
  latent = f"{NO_DATA.replace('nano/8', 'nano/2')},latent_diffusion=True"
  planned = shapes.plan(read_stage(ae_i1k.get_config(latent).pretrain), gpus)
  assert planned.parts.model.image_size == (8, 8, 4)
  assert describe.count(planned.step.frozen) == 83_653_863  # Stable Diffusion's, as published
  config = ae_i1k.get_config(f"{latent},use_preprocessed_latents=True,latents_dir=absent").pretrain
  config = read_stage(config)
  with pytest.raises(ValueError, match=r"data.name='latents:absent' .* Give --image_size"):
    shapes.plan(config, gpus)
  planned = shapes.plan(config, gpus, side=64)
  assert planned.parts.model.image_size == (8, 8, 4)
  assert planned.batch["image"].shape == (32, 8, 8, 8)  # moments


def test_labels_are_counted_or_given():
  arguments = "dataset=folder:absent,train_split=all,test_split=all,use_labels=True"
  config = read_stage(ae_i1k.get_config(f"{NO_DATA},{arguments}").pretrain)
  with pytest.raises(ValueError, match=r"absent[\s\S]*Or give --num_classes"):
    shapes.plan(config, jax.devices())
  planned = shapes.plan(config, jax.devices(), num_classes=7)
  assert planned.state.params["label_embed"]["table"]["embedding"].shape[0] == 7 + 1


@pytest.mark.parametrize(
  "name, kind, number",
  [
    ("H100x8", "NVIDIA H100 80GB HBM3", 8),
    ("h200x1", "NVIDIA H200", 1),
    ("A100x2", "NVIDIA A100-SXM4-40GB", 2),
    ("A100-80GBx2", "NVIDIA A100-SXM4-80GB", 2),
    ("L4x16", "NVIDIA L4", 16),
    ("L40x3", "NVIDIA L40", 3),
  ],
)
def test_gpus_are_found_by_words_of_their_names(name, kind, number):
  found = memory.gpus(name)
  assert {d.device_kind for d in found} == {kind} and len({d.id for d in found}) == number


@pytest.mark.parametrize("name", ["H100", "H100x0", "x8", "9000x8", "H100xtwo", ""])
def test_other_gpus_are_an_error(name):
  with pytest.raises(ValueError, match="must be gpu:KINDxNUMBER"):
    memory.gpus(name)


def test_the_state_is_counted_as_it_is_placed():
  on_one = []
  for arguments in (SMALL, f"{SMALL},fsdp=8"):
    planned = shapes.plan(
      read_stage(quickstart.get_config(arguments).pretrain), memory.gpus("H100x8")
    )
    state, split = describe.state_sizes(planned.parts), "fsdp" in arguments
    on_one.append(memory.on_device(planned.state.params))
    kept = __main__._parts_of_state(planned)
    assert kept["parameters"] == kept["average"] == on_one[-1]
    whole = sum(kept.values())
    assert whole + 24 == describe.nbytes_of_device(state, planned.parts.mesh)  # step and guard
    told = memory.estimate(planned.state.params, memory.Residuals(0, 80, 16), 800, 8)
    assert told.gradients == memory.nbytes(state.params) and told.batch == 100
    assert told.gathered == (told.gradients if split else 0) and told.activations == 12
  assert on_one[1] < 0.5 * on_one[0]


ROWS, WIDTH, LAYERS = 48, 16, 5


def layers(kind):
  """A loss of five layers, each sin(x @ w), in one of the ways of writing them."""

  def layer(x, w):
    return jnp.sin(jnp.sin(x @ w)), None

  def loss(params, batch, key):
    x, step = batch["x"], jax.checkpoint(layer) if "again" in kind else layer
    if "loop" in kind:
      x = jax.lax.scan(step, x, params)[0]
    else:
      for i in range(LAYERS):
        x = step(x, params[i])[0]
    return x.sum(), {}

  return Function(loss)


@pytest.mark.parametrize(
  "kind, arrays",
  [
    ("unrolled", LAYERS),  # the products alone
    ("loop", 3 * LAYERS),  # of each layer its input, and both cosines
    ("loop again", LAYERS),  # the inputs
  ],
)
def test_what_is_kept_is_what_the_layers_need(kind, arrays):
  params = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
  batch = {"x": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)}
  found = memory.residuals(layers(kind), params, batch)
  one = ROWS * WIDTH * 4
  assert found.kept in (arrays * one, (arrays + 1) * one)  # The batch itself may be among them.
  assert found.working == 2 * one
  assert found.fixed >= LAYERS * WIDTH**2 * 4


def test_the_program_tells_and_its_status_is_the_verdict(alone, tmp_path, capsys):
  config = ["--config", f"configs/quickstart.py:{SMALL}"]
  file = tmp_path / "fit.json"
  gpu = ["--topology", "gpu:T4x2", "--largest_batch", "--json", str(file)]
  assert program(*config, *gpu) == 0
  told, found = capsys.readouterr().out, json.loads(file.read_text())
  assert list(found) == ["pretrain", "finetune"]
  for name, report in found.items():
    assert f"[{name}] nano/2 on 8 x 8 x 1, batch 32; 2 x Tesla T4, mesh" in told
    assert report["peak"] == sum(report["memory"].values()) <= report["capacity"] == 12e9
    assert f"largest batch that fits: {report['largest_batch']}" in told
    peak = lambda n, r=report: r["peak"] + (n - 32) * r["peak_per_image"]
    assert peak(report["largest_batch"]) <= 12e9 < peak(1.1 * report["largest_batch"])
  too_large = 2 * found["pretrain"]["largest_batch"]
  only = ["--stage", "pretrain", "--topology", "gpu:T4x2"]
  assert (
    program(*config, f"--config.pretrain.batch_size={too_large}", *only) == __main__.DOES_NOT_FIT
  )
  assert "does not fit: needs" in capsys.readouterr().out


def test_the_devices_here_are_compiled_for(alone, tmp_path, capsys):
  file, text = tmp_path / "fit.json", tmp_path / "step.hlo"
  config = f"configs/quickstart.py:{SMALL},method=mae,scan=True"
  arguments = ["--config", config, "--stage", "pretrain", "--json", str(file)]
  assert program(*arguments, "--save_hlo", str(text)) == 0
  report = json.loads(file.read_text())["pretrain"]
  number = report["memory"]["parameters"] / 4
  assert report["fits"] is None and set(report["collectives"]) == {"all-reduce"}
  assert 4 * number <= report["collectives"]["all-reduce"][1] <= 4.1 * number  # float32
  assert text.read_text().startswith("HloModule")
  assert "how much there is is not known" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_out_of_memory_is_a_verdict(alone, monkeypatch, capsys, whole):
  found = compile.OutOfMemory(40 * 2**30, 15 * 2**30, whole)
  monkeypatch.setattr(compile, "compile_step", lambda lowered: found)
  monkeypatch.setattr(Step, "lower", lambda *_: None)
  state = 2**28  # of a state that is made up
  monkeypatch.setattr(__main__, "_parts_of_state", lambda planned: {"parameters": state})
  config = ["--config", f"configs/quickstart.py:{SMALL}", "--stage", "pretrain"]
  assert program(*config) == __main__.DOES_NOT_FIT
  told = capsys.readouterr().out
  assert f"does not fit: needs {'40.00' if whole else '40.25'} of 15.00 GiB" in told


@pytest.mark.parametrize(
  "arguments, told",
  [
    (["--config", "configs/quickstart.py:variant=nano"], "model.variant='nano' must be SIZE/PATCH"),
    (["--config", "configs/quickstart.py:steps=x"], "steps='x' must be of type int"),
    (["--config", "configs/absent.py"], "absent.py"),
    (["--config", f"configs/quickstart.py:{SMALL}", "--config.pretrain.optim.lr=-1"], "optim.lr"),
    (["--config", f"configs/quickstart.py:{SMALL}", "--config.pretrain.lr=1"], "has no key 'lr'"),
    (["--config", f"configs/quickstart.py:{SMALL}", "--stage", "probe"], "no such stage"),
    (["--config", f"configs/quickstart.py:{SMALL}", "--topologi", "local"], "topologi"),
    (["--config", f"configs/quickstart.py:{SMALL},batch_size=30"], "batch_size=30 must be a pos"),
    (
      ["--config", f"configs/quickstart.py:{SMALL}", "--topology", "v5e:2x2"],
      "needs the TPU's compiler",
    ),
  ],
)
def test_what_is_wrong_is_told_in_one_line(alone, monkeypatch, capsys, arguments, told):
  monkeypatch.setattr(compile, "library", lambda: "")
  assert program(*arguments) == 1
  error = capsys.readouterr().err.splitlines()
  assert any(line.startswith("error: ") for line in error) and told in "\n".join(error)


def test_config_errors_are_those_of_training(tmp_path):
  found = []
  config = quickstart.get_config(SMALL)
  config.pretrain.update(batch_size=0, log_every=0)
  arguments = ["--config.pretrain.batch_size=0", "--config.pretrain.log_every=0"]
  with pytest.raises(ValueError) as raised:
    stages.run(config, str(tmp_path / "run"))
  found.append(str(raised.value))
  args = argparse.Namespace(config=f"configs/quickstart.py:{SMALL}", topology="local", stage="")
  with pytest.raises(ValueError) as raised:
    __main__.fit(args, arguments)
  assert str(raised.value) == found[0] and "2 problems" in found[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("how", [{}, dict(scan=True), dict(scan=True, remat="full")])
def test_the_arithmetic_is_within_a_factor_of_what_xla_plans(method, how):
  model = AutoEncoder("micro/2", (16, 16, 3), **how)
  streams = objectives.make_streams(methods.streams_of(method))
  objective = objectives.Objective(model, paths.make_path("cosine", 1000), streams, 64)
  loss = at_once(objective)
  params = param_shapes(model)
  batch = {"image": jax.ShapeDtypeStruct((64, 16, 16, 3), jnp.float32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  told = memory.residuals(objective, params, batch)
  lowered = jax.jit(jax.grad(lambda *a: loss(*a)[0])).lower(params, batch, key)
  compiled = lowered.compile({"xla_backend_optimization_level": 3})  # Others do not fuse.
  planned = compiled.memory_analysis().temp_size_in_bytes
  print(method, how, (told.kept + told.working) / planned)
  # Of unrolled layers the CPU keeps more: it fuses less than the accelerators.
  assert (0.5 if how else 0.25) < (told.kept + told.working) / planned < 2, (told, planned)


def test_every_gpu_has_a_capacity():
  assert all(chips.memory(kind) for kind in chips.GPUS)

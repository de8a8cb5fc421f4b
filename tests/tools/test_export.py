"""The exported folder: the same model, whatever becomes of the run; its card; what is refused."""

import json
import os
import shutil

import jax
import numpy as np
import pretrained_runs
import pytest
from pretrained_runs import NAMES

from tools import export
from umd import load
from umd.codecs import codec, vae_files
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.devices.mesh import make_mesh
from umd.runs import workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = pretrained_runs.make(tmp_path_factory.mktemp("run") / "run", pretrained_runs.config())
  metrics = {"generation/agreement": 0.98, "loss": 0.1, "generation/sampler": "ddim, 4 steps"}
  summary = {"name": "run", "step": 7, "metrics": metrics, "headline": ["generation/agreement"]}
  workdir.finish(path, summary)
  environment = workdir.read_json(os.path.join(path, "environment.json"))
  started = ["python", "/somewhere/train.py", "--config", "configs/quickstart.py:lr=1e-3"]
  environment["command"] = [*started, "--workdir", "runs/a b"]
  workdir.write_json(os.path.join(path, "environment.json"), environment)
  return path


def command(run, out, **given):
  given = {"workdir": run, "out": out} | given
  export.main([f"--{key}={value}" for key, value in given.items()])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  out = str(tmp_path_factory.mktemp("exported") / "digits")
  command(run, out)
  return out


def leaves(model):
  return [np.asarray(x) for x in jax.tree.leaves(model._weights.model)]


def test_an_exported_model_does_exactly_what_the_run_does(run, exported):
  assert sorted(os.listdir(exported)) == ["README.md", "config.json", "model.safetensors"]
  one, other = load(run), load(exported)
  assert (other.weights, other.step, other.class_names) == ("ema", 7, NAMES)
  assert (other.sampling, other.sha256) == (one.sampling, one.sha256)
  assert one.description == other.description
  np.testing.assert_array_equal(*(m.sample([3, 7], 4, seed=1) for m in (one, other)))


def test_the_file_is_safetensors_that_others_read(run, exported):
  from safetensors.numpy import load_file

  found = load_file(os.path.join(exported, "model.safetensors"))
  wanted = load(run)._weights.model
  np.testing.assert_array_equal(found["embed.kernel"], wanted["embed"]["kernel"])
  assert len(found) == len(jax.tree.leaves(wanted))


def test_raw_weights_of_an_earlier_step_in_half_the_bytes(run, exported, tmp_path):
  command(run, str(tmp_path / "raw"), weights="raw", step=3, dtype="bfloat16")
  size = lambda folder: os.path.getsize(os.path.join(folder, "model.safetensors"))
  assert size(tmp_path / "raw") < 0.6 * size(exported)
  found = load(str(tmp_path / "raw"))
  assert (found.weights, found.step) == ("raw", 3)
  for x, wanted in zip(leaves(found), leaves(load(run, weights="raw", step=3)), strict=True):
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, wanted, rtol=2**-8)
  with pytest.raises(ValueError, match=r"holds the raw weights of step 3 only"):
    load(str(tmp_path / "raw"), weights="ema")


def test_the_card_says_what_it_is(exported):
  with open(os.path.join(exported, "README.md"), encoding="utf-8") as file:
    card = file.read()
  _, header, text = card.split("---\n", 2)
  assert "license: other" in header and "library_name: umd" in header
  assert "| `generation/agreement` | 0.98 |" in text and "loss" not in text.split("## Training")[0]
  assert "python -m train --config configs/quickstart.py:lr=1e-3 --workdir 'runs/a b'\n" in text
  assert "Classes, in order: zero, one, two" in text
  usage = text.split("```python\n")[1].split("```")[0]
  compile(usage, "usage", "exec")
  assert usage.count("\n") <= 7 and 'model.sample(labels="all")' in usage
  settings = json.loads(text.split("```json\n")[1].split("```")[0])
  assert settings["optim"]["lr"] == 1e-3 and "wandb" not in settings


def test_a_damaged_file_is_not_loaded(exported, tmp_path):
  out = shutil.copytree(exported, tmp_path / "copy")
  file = out / "model.safetensors"
  contents = bytearray(file.read_bytes())
  contents[-5] ^= 1
  file.write_bytes(contents)
  with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was exported"):
    load(str(out))
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r"model\.safetensors: there is no such file"):
    load(str(out))
  about = workdir.read_json(str(out / "config.json"))
  workdir.write_json(str(out / "config.json"), about | {"umd_format": 99})
  with pytest.raises(ValueError, match=r"umd_format=99, but only 1 is known"):
    load(str(out))


@pytest.mark.parametrize(
  "case, told",
  [
    ("file", "is a file. Give the name of a folder"),
    ("thesis", "holds something else (thesis.tex)"),
    ("run", "holds something else"),
    ("other model", "holds another model, which differs in model.condition"),
    ("no run", "holds no run: no such folder"),
    ("exported", "was exported already"),
  ],
)
def test_what_is_not_to_be_overwritten_is_left(run, exported, tmp_path, capsys, case, told):
  out, source = tmp_path / "out", run
  if case == "file":
    out.write_text("mine")
  elif case == "thesis":
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
  elif case == "run":
    shutil.copytree(run, out)
  elif case == "other model":
    shutil.copytree(exported, out)
    about = workdir.read_json(str(out / "config.json"))
    about["model"]["condition"] = "token"
    workdir.write_json(str(out / "config.json"), about)
  else:
    source = exported if case == "exported" else str(tmp_path / "nothing")
  before = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(SystemExit) as ended:
    command(source, str(out))
  assert ended.value.code == 1 and told in capsys.readouterr().err
  assert before == {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_the_same_model_is_exported_again(run, exported, tmp_path):
  out = shutil.copytree(exported, tmp_path / "copy")
  command(run, str(out), step=3)
  assert load(str(out)).step == 3


def test_a_vae_without_a_public_name_goes_along(tmp_path):
  architecture = Architecture(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False
  )
  blank = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 4, 4, 4), np.float32)
  shapes = jax.eval_shape(KLAutoEncoder(architecture).init, jax.random.key(0), *blank)["params"]
  params = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), shapes)
  vae_files.save(str(tmp_path / "vae"), architecture, params)
  settings = pretrained_runs.config()
  settings.latents = dict(vae=str(tmp_path / "vae"), dtype="float32", chunk=8, tile=0)
  opened = codec.make(settings.latents.to_dict(), make_mesh())
  run = pretrained_runs.make(tmp_path / "run", settings, codec=opened, size=(16, 16, 3))
  command(run, str(tmp_path / "out"))
  shutil.rmtree(tmp_path / "vae")
  found = load(str(shutil.move(tmp_path / "out", tmp_path / "moved")))
  assert found.image_size == (16, 16, 3)
  assert found.description.latents["vae"] == str(tmp_path / "moved" / "vae")

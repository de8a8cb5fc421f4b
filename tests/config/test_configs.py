"""Configs and the command line: arguments, methods as the paper's rows, errors that help."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from configs import ae_i1k, common, images, methods, quickstart
from configs.common import Argument
from trainers import diffusion, optim
from trainers.config.check import read_stage
from umd.data import load
from umd.models.network import param_shapes

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEFAULTS = {"steps": 100, "lr": 0.1, "flag": False, "name": "x"}
ARGUMENTS = {name: Argument(default, "") for name, default in DEFAULTS.items()}


@pytest.mark.parametrize(
  "text, value",
  [("true", True), ("1", True), ("YES", True), ("False", False), ("0", False), ("no", False)],
)
@pytest.mark.parametrize("default", [True, False])
def test_bools_have_several_spellings(text, value, default):
  assert common.parse_arg(f"flag={text}", dict(flag=Argument(default, ""))).flag is value


def test_values_have_the_types_of_their_defaults_and_the_rest_stays():
  found = common.parse_arg("steps=7,lr=1,name=B/4=a", ARGUMENTS)
  assert isinstance(found, ConfigDict)
  given = ("steps", "lr", "name")
  assert found.to_dict() == dict(steps=7, lr=1.0, flag=False, name="B/4=a", given=given)
  assert [type(found[k]) for k in ("steps", "lr", "name")] == [int, float, str]
  assert common.parse_arg("lr=2e-3", ARGUMENTS).lr == 0.002


@pytest.mark.parametrize("arg", [None, ""])
def test_without_arguments_all_is_default(arg):
  assert common.parse_arg(arg, ARGUMENTS).to_dict() == {**DEFAULTS, "given": ()}


def test_a_variant_may_be_written_with_a_colon():
  for text in ("variant=B/4", "variant=:B/4"):
    assert common.parse_arg(text, common.ARGUMENTS).variant == "B/4"
  assert common.parse_arg("name=:x", ARGUMENTS).name == ":x"  # of other values it is a part


def test_a_method_is_not_given_by_its_name_but_its_toggles_may_be():
  assert common.parse_arg("method=mae", common.ARGUMENTS).given == ("method",)


@pytest.mark.parametrize("arg", ["stepz=3", "lr=1,stepz=3", "steps", "=3"])
def test_an_unknown_argument_is_an_error_that_lists_the_known(arg):
  with pytest.raises(ValueError) as error:
    common.parse_arg(arg, ARGUMENTS)
  for word in [repr(arg.split(",")[-1]), "steps=100", "lr=0.1", "flag=False", "name=x"]:
    assert word in str(error.value)
  assert ("Did you mean 'steps'?" in str(error.value)) == ("stepz" in arg)


@pytest.mark.parametrize(
  "arg, kind", [("steps=1.5", "int"), ("steps=", "int"), ("lr=fast", "float"), ("flag=2", "bool")]
)
def test_a_value_of_the_wrong_type_is_an_error_that_names_key_value_and_type(arg, kind):
  name, value = arg.split("=")
  with pytest.raises(ValueError, match=rf"{name}={value!r}.*\b{kind}\b"):
    common.parse_arg(arg, ARGUMENTS)


def test_an_unknown_choice_is_an_error_that_lists_the_known():
  with pytest.raises(ValueError, match=r"'ddpm'.*mae.*umd.*dit.*maskdit"):
    common.parse_arg("method=ddpm", quickstart.ARGUMENTS)


# (stream, rows, timesteps, mask ratio): (head, tokens scored, weight); as in the design's table.
CLEAN = {("x0", "masked", 1.0)}
HALVES = {("eps", "visible", 0.5), ("x0", "masked", 0.5)}
WHOLE = {("eps", "all", 0.5), ("x0", "all", 0.5)}
TABLE = {
  "mae": {("clean", (0.0, 1.0), "clean", 0.75): CLEAN},
  "umd": {
    ("clean", (0.0, 0.5), "clean", 0.75): CLEAN,
    ("noised", (0.5, 1.0), "uniform", 0.375): HALVES,
  },
  "dit": {("noised", (0.0, 1.0), "uniform", 0.0): WHOLE},
  "maskdit": {("noised", (0.0, 1.0), "uniform", 0.5): HALVES},
}


def table(streams):
  return {
    (name, s["rows"], s["timesteps"], s["mask_ratio"]): {
      (t["head"], t["where"], t["weight"]) for t in s["terms"].values()
    }
    for name, s in streams.items()
  }


@pytest.mark.parametrize("method", TABLE)
def test_methods_are_the_rows_of_the_design(method):
  config = quickstart.get_config(f"method={method}")
  assert table(config.pretrain.streams.to_dict()) == TABLE[method]
  assert set(methods.METHODS) == set(TABLE)


@pytest.mark.parametrize("order", [1, -1])
def test_toggles_override_the_row_of_the_method_wherever_they_stand(order):
  arguments = ["method=mae", "no_noise_prob=0.25", "mask_ratio=0.5", "adaln=true"]
  config = quickstart.get_config(",".join(arguments[::order])).pretrain
  assert table(config.streams.to_dict()) == {
    ("clean", (0.0, 0.25), "clean", 0.75): CLEAN,
    ("noised", (0.25, 1.0), "uniform", 0.5): HALVES,
  }
  assert config.model.condition == "adaln"


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_of_clean_images_outside_0_to_1_is_an_error(share):
  with pytest.raises(ValueError, match=f"no_noise_prob={share}"):
    methods.streams(share, 0.375, 0.75)


def stages(arg):
  config = quickstart.get_config(arg)
  return {name: config[name] for name in config.stages}


@pytest.mark.parametrize("method", TABLE)
def test_every_stage_of_every_method_can_be_built(tmp_path, method):
  for name, stage in stages(f"method={method}").items():
    parts = diffusion.prepare(read_stage(stage), str(tmp_path / name), str(tmp_path))
    assert {s.name for s in parts.evaluators} == set(stage.evals)
    assert parts.steps == stage.steps
    assert {metric.split("/")[0] for metric in stage.summary} <= {*stage.evals, "reconstruction"}
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("method", ["umd", "mae"])
def test_the_second_stage_starts_from_the_first_but_for_what_it_calls_fresh(method):
  shapes, config = {}, stages(f"method={method}")
  for name, stage in config.items():
    source, stage = load(**stage.data), read_stage(stage)
    model = diffusion.make_model(stage, source.image_size, source.num_classes)
    shapes[name] = param_shapes(model)
  first, second = shapes["pretrain"], shapes["finetune"]
  assert config["pretrain"].init_from == ""
  assert config["finetune"].init_from == "stage:pretrain"
  fresh = set(config["finetune"].init_fresh)
  assert set(second) - set(first) == fresh == {"label_embed"}
  assert {k: v for k, v in second.items() if k not in fresh} == first


@pytest.mark.parametrize(
  "steps, epochs, expected", [(7, 0, 7), (0, 2.0, 20), (0, 0.25, 2), (0, 1e-9, 1)]
)
def test_the_length_of_a_run_is_given_in_steps_or_in_epochs(steps, epochs, expected):
  config = SimpleNamespace(steps=steps, epochs=epochs, batch_size=100)
  assert optim.count_steps(config, 1000) == expected


@pytest.mark.parametrize(
  "arguments, told",
  [
    ("finetune=True", "finetune=True .* add use_labels=True"),
    ("use_preprocessed_latents=True", "use_preprocessed_latents=True needs latent_diffusion=True"),
    ("latents_dir=DIR", "latents_dir=DIR needs latent_diffusion=True"),
    ("vae=sd3", "vae=sd3 needs latent_diffusion=True"),
    ("cfg_channels=3", "cfg_channels=3 needs latent_diffusion=True"),
    ("latent_diffusion=True,use_preprocessed_latents=True", "name the folder"),
    ("latent_diffusion=True,latents_dir=DIR", "go together"),
    ("dataset=flowers", "dataset='flowers' .* give train_split= and test_split= too"),
    ("dataset=flowers,train_split=train", "train_split= and test_split= too"),
  ],
)
def test_arguments_that_contradict_each_other_are_errors(arguments, told):
  with pytest.raises(ValueError, match=told):
    ae_i1k.get_config(arguments)


@pytest.mark.parametrize("known", images.SPLITS)
def test_splits_that_are_named_take_the_place_of_those_that_are_known(known):
  a = common.parse_arg(f"dataset={known}", images.ARGUMENTS)
  assert images.splits(a) == images.SPLITS[known]
  a = common.parse_arg(f"dataset={known},train_split=a[:9],test_split=b", images.ARGUMENTS)
  assert images.splits(a) == {
    **dict.fromkeys(("train", "labelled", "reference"), "a[:9]"),
    **dict.fromkeys(("held_out", "test"), "b"),
  }


def test_without_checkpoints_none_is_written():
  assert ae_i1k.get_config("save_ckpt=False").pretrain.checkpoint.every == 0
  assert ae_i1k.get_config("").pretrain.checkpoint.every == 5000


def run(*command):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  return subprocess.run(
    [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
  )


def test_configs_load_without_jax():
  names = sorted(f[:-3] for f in os.listdir(os.path.join(ROOT, "configs")) if f.endswith(".py"))
  assert "quickstart" in names
  loads = [f"from configs import {n}" for n in names if n != "__init__"]
  shared = {"__init__", "common", "images", "methods"}  # They are no configs themselves.
  needs = {"folder": "'root=somewhere'"}
  loads += [f"{n}.get_config({needs.get(n, '')})" for n in names if n not in shared]
  done = run("-c", f"import sys; {'; '.join(loads)}; sys.exit('jax' in sys.modules)")
  assert done.returncode == 0, done.stderr


QUICK = "configs/quickstart.py"


@pytest.mark.parametrize(
  "arguments, told",
  [
    ([], ["--config", "--workdir"]),
    (["--config", QUICK], ["--workdir"]),
    (["--config", f"{QUICK}:stepz=3", "--workdir", "W"], ["stepz=3", "Did you mean 'steps'?"]),
    (["--config", f"{QUICK}:lr=fast", "--workdir", "W"], ["lr='fast'", "float"]),
    (["--config", QUICK, "--config.pretrain.stepz=3", "--workdir", "W"], ["stepz", "steps"]),
    (["--config", QUICK, "--config.pretrain.steps=abc", "--workdir", "W"], ["steps", "abc"]),
    (["--config", QUICK, "--workdirr", "W"], ["workdirr"]),
    (["--config", "configs/absent.py", "--workdir", "W"], ["configs/absent.py"]),
    # The only one that gets as far as JAX.
    (
      ["--config", QUICK, "--config.pretrain.optim.warmup=5.0", "--workdir", "W"],
      ["warmup=5.0", "share of the steps"],
    ),
  ],
  ids=[
    *("no flags", "no workdir", "unknown argument", "argument of wrong type", "unknown value"),
    *("value of wrong type", "unknown flag", "absent config", "impossible value"),
  ],
)
def test_a_wrong_command_ends_with_one_message_and_no_traceback(tmp_path, arguments, told):
  workdir = str(tmp_path / "run")
  done = run("-m", "train", *[workdir if a == "W" else a for a in arguments])
  assert done.returncode == 2
  for word in told:
    assert word in done.stderr
  assert "Traceback" not in done.stderr
  assert done.stderr.count("error:") == 1
  assert not os.path.exists(workdir)

"""Configs and the command line: arguments, methods as the paper's rows, errors that help."""

import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

import evaluators
from configs import common, quickstart
from trainers.autoencoder import make_streams
from umd import optim
from umd.data import load
from umd.models.autoencoder import AutoEncoder
from umd.objectives import check
from umd.paths import make_path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEFAULTS = {"steps": 100, "lr": 0.1, "flag": False, "name": "x"}


@pytest.mark.parametrize(
  "text, value",
  [("true", True), ("1", True), ("YES", True), ("False", False), ("0", False), ("no", False)],
)
@pytest.mark.parametrize("default", [True, False])
def test_bools_have_several_spellings(text, value, default):
  assert common.parse_arg(f"flag={text}", flag=default).flag is value


def test_values_have_the_types_of_their_defaults_and_the_rest_stays():
  found = common.parse_arg("steps=7,lr=1,name=B/4=a", **DEFAULTS)
  assert isinstance(found, ConfigDict)
  assert found.to_dict() == {"steps": 7, "lr": 1.0, "flag": False, "name": "B/4=a"}
  assert [type(found[k]) for k in ("steps", "lr", "name")] == [int, float, str]
  assert common.parse_arg("lr=2e-3", lr=1.0).lr == 0.002


@pytest.mark.parametrize("arg", [None, ""])
def test_without_arguments_all_is_default(arg):
  assert common.parse_arg(arg, **DEFAULTS).to_dict() == DEFAULTS


@pytest.mark.parametrize("arg", ["stepz=3", "lr=1,stepz=3", "steps", "=3"])
def test_an_unknown_argument_is_an_error_that_lists_the_known(arg):
  with pytest.raises(ValueError) as error:
    common.parse_arg(arg, **DEFAULTS)
  for word in [repr(arg.split(",")[-1]), "steps=100", "lr=0.1", "flag=False", "name=x"]:
    assert word in str(error.value)
  assert ("Did you mean 'steps'?" in str(error.value)) == ("stepz" in arg)


@pytest.mark.parametrize(
  "arg, kind", [("steps=1.5", "int"), ("steps=", "int"), ("lr=fast", "float"), ("flag=2", "bool")]
)
def test_a_value_of_the_wrong_type_is_an_error_that_names_key_value_and_type(arg, kind):
  name, value = arg.split("=")
  with pytest.raises(ValueError, match=rf"{name}={value!r}.*\b{kind}\b"):
    common.parse_arg(arg, **DEFAULTS)


def test_an_unknown_method_is_an_error_that_lists_the_known():
  with pytest.raises(ValueError, match=r"'ddpm'.*mae.*umd.*dit.*maskdit"):
    common.parse_arg("method=ddpm", **quickstart.ARGUMENTS)


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
  assert set(common.METHODS) == set(TABLE)


@pytest.mark.parametrize("order", [1, -1])
def test_toggles_override_the_row_of_the_method_wherever_they_stand(order):
  arguments = ["method=mae", "no_noise_prob=0.25", "mask_ratio=0.5", "adaln=true"]
  config = quickstart.get_config(",".join(arguments[::order])).pretrain
  assert table(config.streams.to_dict()) == {
    ("clean", (0.0, 0.25), "clean", 0.75): CLEAN,
    ("noised", (0.25, 1.0), "uniform", 0.5): HALVES,
  }
  assert config.model.adaln is True


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_of_clean_images_outside_0_to_1_is_an_error(share):
  with pytest.raises(ValueError, match=f"no_noise_prob={share}"):
    common.streams(share, 0.375, 0.75)


def stages(arg):
  config = quickstart.get_config(arg)
  return {name: config[name] for name in config.stages}


def build_model(stage):
  source = load(stage.data.name, stage.data.split)
  classes = source.num_classes if stage.use_labels else 0
  return AutoEncoder(image_size=source.image_size, num_classes=classes, **stage.model.to_dict())


@pytest.mark.parametrize("method", TABLE)
def test_every_stage_of_every_method_can_be_built(method):
  for stage in stages(f"method={method}").values():
    path = make_path(**stage.path.to_dict())
    check(make_streams(stage.streams), build_model(stage), path, stage.batch_size)
    settings = stage.optim.to_dict()
    schedule = optim.make_schedule(settings.pop("lr"), stage.steps, settings.pop("warmup_steps"))
    optim.make_optimizer(schedule, **settings)
    for name, settings in stage.evals.to_dict().items():
      assert settings["type"] in evaluators.known()
      module = __import__(f"evaluators.{settings['type']}", fromlist=["Evaluator"])
      given = {k: v for k, v in settings.items() if k not in ("type", "every")}
      inspect.signature(module.Evaluator).bind(None, **given)
      assert settings["every"] >= 1, name
    assert {metric.split("/")[0] for metric in stage.summary} <= {*stage.evals, "reconstruction"}


@pytest.mark.parametrize("method", ["umd", "mae"])
def test_the_second_stage_starts_from_the_first_but_for_what_it_calls_fresh(method):
  shapes = {}
  config = stages(f"method={method}")
  for name, stage in config.items():
    model = build_model(stage)
    blank = jnp.zeros((1, *model.image_size)), jnp.zeros(1, jnp.int32)
    shapes[name] = jax.eval_shape(model.init, jax.random.key(0), *blank)["params"]
  first, second = shapes["pretrain"], shapes["finetune"]
  assert config["finetune"].init_from == "pretrain"
  fresh = set(config["finetune"].init_fresh)
  assert set(second) - set(first) == fresh == {"label_embed"}
  assert {k: v for k, v in second.items() if k not in fresh} == first


def run(*command):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  return subprocess.run(
    [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
  )


def test_configs_load_without_jax():
  names = sorted(f[:-3] for f in os.listdir(os.path.join(ROOT, "configs")) if f.endswith(".py"))
  loads = "; ".join(
    f"import configs.{n} as m; getattr(m, 'get_config', dict)()" for n in names if n != "__init__"
  )
  done = run("-c", f"import sys; {loads}; sys.exit('jax' in sys.modules)")
  assert "quickstart" in names
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
      ["--config", QUICK, "--config.pretrain.optim.warmup_steps=99999", "--workdir", "W"],
      ["warmup_steps=99999"],
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
  assert done.returncode != 0
  for word in told:
    assert word in done.stderr
  assert "Traceback" not in done.stderr
  assert done.stderr.count("error:") == 1
  assert not os.path.exists(workdir)

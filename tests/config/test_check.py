"""Whatever a config may hold that makes no sense is told before anything is built."""

import dataclasses
import importlib
import math
import os
import pkgutil
import subprocess
import sys
import types
import typing
from collections.abc import Mapping, Sequence

import jax
import pytest
from ml_collections import ConfigDict, config_dict

import configs
import trainers
from configs import ae_i1k_lp, eval_ae_i1k, methods, quickstart, vae_tiny
from trainers import kl_vae, stages
from trainers.config import check, read, records
from umd.runs import workdir as folder
from umd.state import Guard

SHARED = {"common", "images", "methods"}  # They are no configs themselves.
NEEDED = {"folder": "root=somewhere"}
MORE = {
  "ae_i1k": ["finetune=True,use_labels=True", "use_labels=True,steps=9000", "save_ckpt=False"],
  "eval_ae_i1k": ["noised_pred=True,variant=B/4", "cfg_scale=2", "sample_fid=False"],
  "ae_i1k_lp": ["steps=9,use_noised_pred=False", "width=768,adaln=True"],
  "i1k_64": ["sample_fid=False,path=flow", "fid_reference=some.npz,fsdp=2"],
  "vae_tiny": [
    "dataset=digits,size=16,latent_channels=3",
    "dataset=tiny_imagenet,size=64,layers=2",
  ],
}


def shipped():
  """(config, arguments) of all that is in configs/."""
  for name in sorted({m.name for m in pkgutil.iter_modules(configs.__path__)} - SHARED):
    has_methods = importlib.import_module(f"configs.{name}").ARGUMENTS.get("method")
    texts = [f"method={m}" for m in methods.METHODS] if has_methods else [""]
    texts += MORE.get(name, [])
    for text in texts:
      yield name, ",".join(filter(None, (NEEDED.get(name), text)))


@pytest.mark.parametrize("name, arguments", list(shipped()))
def test_every_shipped_config_passes(tmp_path, name, arguments):
  config = importlib.import_module(f"configs.{name}").get_config(arguments)
  _, remarks = check.validate(config, str(tmp_path / "run"))
  # The probe of nine steps is shorter than its intervals.
  assert bool(remarks) == (
    arguments == "steps=9,use_noised_pred=False" or "steps=9000" in arguments
  )
  assert not os.listdir(tmp_path)


def test_it_takes_neither_tensorflow_nor_data(tmp_path):
  code = f"""
import sys
from configs import ae_i1k
from trainers.config import check as validate
config = ae_i1k.get_config("use_labels=True,data_dir=absent")
assert validate.validate(config, {str(tmp_path / "run")!r})[1] == []
sys.exit("tensorflow" in sys.modules)"""
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  assert subprocess.run([sys.executable, "-c", code], cwd=root, env=environment).returncode == 0


# One stage of each trainer, as dicts: nothing of ConfigDict keeps a test from breaking them.
STAGES = {
  "diffusion": quickstart.get_config().finetune.to_dict(),
  "pretrain": quickstart.get_config().pretrain.to_dict(),
  "evaluate": eval_ae_i1k.get_config("datasets=pets,variant=B/4").eval.to_dict(),
  "linear_probe": ae_i1k_lp.get_config("variant=B/4").linear_probe.to_dict(),
  "kl_vae": vae_tiny.get_config().to_dict(),
}
STAGES["diffusion"]["init_from"] = "runs/other"  # There is no other stage.
STAGES["evaluate"]["evals"]["generation"]["reference"] = "some.npz"


def problems(config, workdir="absent") -> str:
  """What is said about a config, "" if it passes."""
  try:
    check.validate(config, str(workdir))
  except ValueError as error:
    return str(error)
  return ""


def copied(tree):
  """A copy in which no section is another one, too."""
  return {k: copied(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def changed(name, /, **overrides) -> dict:
  """A stage with some values replaced, by dotted names; ... stands for removed."""
  stage = copied(STAGES[name])
  for key, value in overrides.items():
    *path, last = key.split(".")
    section = stage
    for part in path:
      section = section.setdefault(part, {})
    section.pop(last, None)
    if value is not ...:
      section[last] = value
  return stage


def leaves(tree, prefix=""):
  for key, value in tree.items():
    yield prefix + key, value
    if isinstance(value, dict):
      yield from leaves(value, f"{prefix}{key}.")


ALL = [(name, key, value) for name, stage in STAGES.items() for key, value in leaves(stage)]
WRONG = {
  bool: (1, 0.0, "true", None, {}),
  int: ("7", 1.5, True, None, (1,)),
  float: ("0.1", True, None, (0.1,), math.nan),
  str: (7, None, ("x", 5), {}),
  tuple: (5, None, {}, ((),), (None,)),
  dict: (5, "x", (), None, True),
}


def test_the_stages_are_sound_before_they_are_broken():
  for stage in STAGES.values():
    assert problems(stage) == ""
  assert len(ALL) > 200


def fields_of(name, key):
  """The fields of the record that a section becomes, by the section's name."""
  node = read.read(STAGES[name], records.STAGE, "", [])
  for part in filter(None, key.split(".")):
    node = node[part] if isinstance(node, Mapping) else getattr(node, part)
  return {f.name: f for f in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}


def test_every_value_of_a_wrong_type_is_told_by_its_key():
  silent = []
  for name, key, value in ALL:
    for wrong in WRONG[type(value)]:
      section, _, last = key.rpartition(".")
      field = fields_of(name, section).get(last)
      if wrong in (None, {}) and field and types.NoneType in typing.get_args(field.type):
        continue  # It stands for none of them.
      told = problems(changed(name, **{key: wrong}))
      if not any(line.startswith(f"  {key}") for line in told.splitlines()):
        silent.append((name, key, wrong, told))
  assert silent == []


# What no config may leave out, for code has no default for it.
NEEDED_KEYS = """
  seed summary wandb wandb.mode data data.name data.split optim optim.lr guard batch_size steps
  epochs checkpoint checkpoint.every model model.variant path path.name streams ema_decay init_from
  evals
"""


def test_every_key_that_is_missing_is_told_unless_code_has_a_default_for_it():
  told_of = set()
  for name, key, _ in ALL:
    section, _, last = key.rpartition(".")
    field = fields_of(name, section).get(last)
    told = problems(changed(name, **{key: ...}))
    missing = dataclasses.MISSING
    if field is None or (field.default, field.default_factory) != (missing, missing):
      assert told == "", (name, key, told)
    else:
      assert f"  {key} is missing" in told, (name, key, told)
      told_of.add(key)
  assert set(NEEDED_KEYS.split()) <= told_of


def test_every_unknown_key_is_told_with_the_nearest_known_one():
  for name, key, value in ALL:
    section, _, last = key.rpartition(".")
    if last not in fields_of(name, section):  # Any name will do there.
      continue
    told = problems(changed(name, **{f"{key}x": value}))
    assert f"  {key}x" in told and "there is no such key" in told, (name, key)
    assert f"Did you mean {last!r}?" in told or len(last) < 2, (name, key, told)


def test_a_key_in_the_wrong_section_is_told_where_it_belongs():
  told = problems(changed("pretrain", warmup=0.1, split="train"))
  assert "warmup=0.1: there is no such key. Did you mean 'optim.warmup'?" in told
  assert "Did you mean 'data.split'?" in told


INF, NAN = math.inf, math.nan
# (trainer, key): values refused, values taken, right beside them where there is a border.
RANGES = {
  ("diffusion", "ema_decay"): ([-1e-9, 1, 1.0, 1.5, NAN], [0, 0.0, 0.9999]),
  ("diffusion", "label_drop_prob"): ([-0.1, 1.1, NAN], [0, 0.0, 1.0]),
  ("diffusion", "seed"): ([-1, 2**32, 0.0], [0, 2**32 - 1]),
  ("evaluate", "seed"): ([-1], [3]),
  ("linear_probe", "seed"): ([-1], [3]),
  ("diffusion", "batch_size"): ([0, -8, 64.0], [1]),
  ("evaluate", "eval_batch_size"): ([0], [1]),
  ("diffusion", "log_every"): ([0, -1], [1]),
  ("linear_probe", "log_every"): ([0], [1]),
  ("linear_probe", "eval_every"): ([0], [1]),
  ("diffusion", "steps"): ([-1, 0, 5.0], [1]),
  ("linear_probe", "epochs"): ([-1.0, NAN, INF], [1, 0.01]),
  ("diffusion", "optim.lr"): ([0.0, -1e-3, NAN, INF], [1e-9]),
  ("diffusion", "optim.warmup"): ([-0.1, 1.0, 24.0, NAN], [0, 0.99]),
  ("linear_probe", "warmup"): ([-0.1, 1.0], [0.0]),
  ("diffusion", "optim.wd"): ([-0.1, NAN, INF], [0, 0.0, 0.3]),
  ("linear_probe", "wd"): ([-0.1], [0.0]),
  ("diffusion", "optim.beta1"): ([-0.1, 1.0], [0.0]),
  ("diffusion", "optim.beta2"): ([-0.1, 1.0, NAN], [0.0, 0.999]),
  ("diffusion", "optim.clip_norm"): ([0.0, -1.0, NAN], [1, 0.1, INF]),
  ("diffusion", "optim.mu_dtype"): (["float16", ""], [None, "float32", "bfloat16"]),
  ("diffusion", "checkpoint.keep"): ([0, -1], [1]),
  ("diffusion", "checkpoint.every"): ([-1], [0, 1]),
  ("linear_probe", "checkpoint.every"): ([-1, 0], [1]),
  ("diffusion", "checkpoint.keep_every"): ([-1, 1.0], [0, 500]),
  ("diffusion", "checkpoint.best"): (
    ["generation/agreement", "most:generation/agreement", "max:", "max:fewshot/class", 3],
    ["max:generation/agreement", "min:loss/noised/x0", "min:loss", ""],
  ),
  ("diffusion", "guard.max_skipped"): ([0, 1.0, True], [1]),
  ("diffusion", "guard.spike_sigma"): ([-1.0, NAN, INF], [0, 6.0]),
  ("diffusion", "wandb.mode"): (["onlin", "", None], ["online", "offline", "disabled"]),
  ("diffusion", "wandb.project"): ([""], ["mine"]),
  ("diffusion", "wandb.entity"): ([3], ["us"]),
  ("diffusion", "summary"): (["loss", (3,)], [(), ["loss"]]),
  ("diffusion", "init_weights"): (["best", ""], ["ema", "raw"]),
  ("diffusion", "init_fresh"): (["head"], [(), ["head"]]),
  ("diffusion", "model.heads"): ([(), ("x0", "x0"), "x0"], [("v",), ["x_t", "eps"]]),
  ("diffusion", "model.class_tokens"): ([0], [1]),
  ("diffusion", "model.dtype"): (["float16", "bf16"], ["float32", "bfloat16"]),
  ("diffusion", "streams.noised.rows"): ([(0.0,), (0, 1, 1), (-0.1, 1.0), (0.0, 1.1)], [[0, 1]]),
  ("diffusion", "streams.noised.terms.x0.weight"): ([-1.0, NAN, INF], [0.0, 2]),
  ("diffusion", "data.shuffle_buffer"): ([0, 1.0], [1]),
  ("diffusion", "data.name"): ([""], ["digits"]),
  ("diffusion", "latents"): (
    [{"dtype": "float32"}, {"vae": ""}, {"vae": "v", "chunk": 0}, {"vae": "v", "dtype": "half"}],
    [{}, {"vae": "v"}, {"vae": "v", "dtype": "float32", "chunk": 2, "tile": 64}],
  ),
  ("diffusion", "evals.generation.every"): ([-1, 1.0], [0, 1]),
  ("diffusion", "evals.generation.type"): (["", "fewshots"], ["generation"]),
  ("diffusion", "evals.generation.scale"): ([0], [1]),
  ("diffusion", "evals.generation.rows"): ([0], [1]),
  ("diffusion", "evals.generation.sampling.steps"): ([0], [1]),
  ("diffusion", "evals.generation.sampling.cfg_scale"): ([-1.0, NAN], [0, 4.0]),
  ("kl_vae", "objective.error"): (["lpips", ""], ["l1", "l2"]),
  ("kl_vae", "objective.kl_weight"): ([-1e-6, NAN, INF], [0, 1.0]),
  ("kl_vae", "model.dtype"): (["float16"], ["float32", "bfloat16"]),
  ("kl_vae", "model.architecture.block_out_channels"): (
    [(), (0,), (8, 12), "8+8", (8.0,)],
    [(8,), [16, 8]],
  ),
  ("kl_vae", "model.architecture.layers_per_block"): ([0, 1.0], [3]),
  ("kl_vae", "model.architecture.latent_channels"): ([0], [16]),
  ("kl_vae", "model.architecture.mid_block_add_attention"): ([1], [False]),
  ("kl_vae", "eval_every"): ([0, 1.0], [1]),
  ("kl_vae", "eval_num"): ([-1], [0, 1]),
  ("kl_vae", "scaling_num"): ([0], [1]),
  ("kl_vae", "checkpoint.every"): ([-1], [0, 1]),
  ("kl_vae", "init_from"): (["stage:other"], [""]),
  ("linear_probe", "lrs"): ([(), (0.0,), (NAN,), (0.1, 0.1), (0.1, 0.1 + 1e-9)], [(0.1, 0.2)]),
  ("linear_probe", "timesteps"): ([(), (-1,), (0, 0), (0.5,)], [(0, 50), [7]]),
  ("linear_probe", "init_from"): ([""], ["stage:pretrain", "runs/a"]),
  ("evaluate", "init_from"): ([""], ["stage:finetune"]),
  ("evaluate", "expected.size"): ([0], [64]),
}


@pytest.mark.parametrize("where", RANGES, ids=".".join)
def test_values_are_taken_within_their_range_only(where):
  (trainer, key), (refused, taken) = where, RANGES[where]
  for value in taken:
    assert problems(changed(trainer, **{key: value})) == "", value
  for value in refused:
    told = problems(changed(trainer, **{key: value}))
    lines = told.splitlines()[1:]
    assert lines and all(line.startswith(f"  {key}") for line in lines), (value, told)
    if key not in ("latents", "steps"):
      assert len(lines) == 1 and f"{key}={value!r}" in told, told


def test_all_problems_are_told_at_once_with_the_names_that_flags_have():
  config = quickstart.get_config().to_dict()
  config["pretrain"].update(ema_decay=1.5, log_every=0)
  config["finetune"]["optim"]["lr"] = math.nan
  del config["finetune"]["fsdp"]
  told = problems(config).splitlines()
  assert told[0] == "the config has 4 problems:"
  assert sorted(line.split(" ")[2] for line in told[1:]) == [
    *("finetune.fsdp", "finetune.optim.lr=nan", "pretrain.ema_decay=1.5", "pretrain.log_every=0"),
  ]
  assert "[0, 1)" in problems(config) and "(0, inf)" in problems(config)


def test_a_placeholder_that_was_left_open_is_told():
  config = quickstart.get_config()
  with config.unlocked():
    del config.pretrain.optim.lr
    config.pretrain.optim.lr = config_dict.required_placeholder(float)
  assert "pretrain.optim.lr=None must be a number" in problems(config)
  config.pretrain.optim.lr = 0.1
  assert problems(config) == ""


@pytest.mark.parametrize(
  "trainer, overrides, told",
  [
    ("diffusion", dict(steps=5, epochs=1.0), "steps=5 and epochs=1.0: give one"),
    ("linear_probe", dict(steps=5, epochs=1.0), "steps=5 and epochs=1.0: give one"),
    ("diffusion", dict(steps=0), "steps=0 and epochs=0.0: give one"),
    (
      "pretrain",
      {f"streams.{s}.weight": 0.0 for s in ("clean.terms.x0", "noised.terms.x0")}
      | {"streams.noised.terms.eps.weight": 0},
      "the weights of all terms are 0",
    ),
    ("pretrain", {"checkpoint.best": "max:fewshots/a"}, "Did you mean 'fewshot'?"),
    ("pretrain", {"trainer": "difusion"}, "Did you mean 'diffusion'?"),
    ("pretrain", {"trainer": ...}, "trainer is missing"),
    ("pretrain", {"trainer": "logs"}, "trainer='logs' must be one of"),
  ],
)
def test_contradictions_and_trainers_are_told(trainer, overrides, told):
  assert told in problems(changed(trainer, **overrides))


def two(**overrides) -> dict:
  """The two stages of the quick start, small, with some values replaced."""
  config = ConfigDict(quickstart.get_config("variant=nano/2").to_dict())
  config.update_from_flattened_dict(overrides)
  return config.to_dict()


@pytest.mark.parametrize(
  "names, told",
  [
    ((), "stages=() must be"),
    ("pretrain", "stages='pretrain' must be a tuple of strings"),
    ((3,), r"stages=(3,) must be"),
    (("pretrain", "pretrain"), "all different"),
    (
      ("pretrian",),
      "stages names 'pretrian', but the config has no such section. Did you mean 'pr",
    ),
    (("../pretrain",), "'../pretrain' cannot name a stage"),
    (("/abs",), "'/abs' cannot name a stage"),
    (("cache",), "'cache' cannot name a stage"),
    (("..",), "'..' cannot name a stage"),
    (("",), "'' cannot name a stage"),
  ],
)
def test_stages_must_be_named_once_and_be_there(names, told):
  config = two()
  config["stages"] = names
  config["/abs"] = config["cache"] = config["pretrain"]
  assert told in problems(config)


def test_what_is_no_stage_is_told_and_stages_may_be_left_out():
  assert "stged: there is no such key or stage" in problems({**two(), "stged": 3})
  assert problems({**two(), "stages": ("pretrain",)}) == ""
  misspelt = two()
  misspelt["stage"] = misspelt.pop("stages")
  assert "trainer is missing" in problems(misspelt)
  assert "Did you mean 'stages'?" in problems(misspelt)


@pytest.mark.parametrize(
  "overrides, told",
  [
    ({"finetune.init_from": "stage:finetune"}, "init_from='stage:finetune' is the stage itself"),
    ({"pretrain.init_from": "stage:finetune"}, "init_from='stage:finetune' is a later stage"),
    ({"pretrain.init_from": "W/finetune/"}, "is a later stage"),
    ({"finetune.init_from": "stage:../pretrain"}, "must be 'stage:NAME'"),
    ({"finetune.init_from": "stage:"}, "must be 'stage:NAME'"),
    ({"pretrain.checkpoint.every": 0}, "pretrain.checkpoint.every=0 saves nothing to start from"),
    ({"finetune.init_from": "stage:absent"}, ""),  # It may be in the workdir.
    ({"finetune.init_from": "somewhere/else"}, ""),
    ({"finetune.init_from": ""}, ""),
  ],
)
def test_stages_start_from_earlier_ones(overrides, told):
  found = problems(two(**overrides), "W")
  assert told in found and bool(told) == bool(found)
  if told:  # By the key of the stage that cannot start.
    starts = "finetune" if overrides.keys() != {"pretrain.init_from"} else "pretrain"
    assert found.splitlines()[1].startswith(f"  {starts}.init_from=")


@pytest.mark.parametrize(
  "overrides, told",
  [
    ({"finetune.model.variant": "nano/4"}, "embed/kernel: here"),
    ({"finetune.model.condition": "adaln"}, "head_adaln/kernel: here"),
    ({"finetune.init_fresh": ()}, "label_embed/"),
    ({"finetune.init_fresh": ("lable_embed",)}, "are no parts of a model"),
    ({"finetune.model.remat": "full", "finetune.model.dtype": "bfloat16"}, ""),
    (
      {
        "finetune.model.variant": "nano/4",
        "finetune.init_fresh": ("embed", "head", "label_embed"),
      },
      "",
    ),
  ],
)
def test_a_stage_that_does_not_fit_the_one_that_it_starts_from_is_told_before_any_trains(
  tmp_path, overrides, told
):
  config = two(**overrides)
  for name in config["stages"]:
    config[name]["evals"] = {}
  plan = stages.plan(ConfigDict(config), str(tmp_path))
  if told:
    with pytest.raises(ValueError, match=told):
      stages.build(plan, str(tmp_path))
  else:
    assert len(stages.build(plan, str(tmp_path))) == 2
  assert not os.listdir(tmp_path)


def test_a_stage_that_is_finished_may_have_stopped_saving(tmp_path):
  config = two(**{"pretrain.checkpoint.every": 0})
  assert "saves nothing" in problems(config, tmp_path)
  folder.finish(str(tmp_path / "pretrain"), {"step": 1})
  assert problems(config, tmp_path) == ""


def test_no_stage_starts_from_one_that_trains_no_model():
  config = two()
  probe = {**STAGES["linear_probe"], "init_from": "stage:pretrain"}
  config = {"pretrain": config["pretrain"], "probe": probe, "finetune": config["finetune"]}
  config["finetune"]["init_from"] = "stage:probe"
  config["stages"] = ("pretrain", "probe", "finetune")
  assert "probe.trainer='linear_probe' leaves no model" in problems(config)


@pytest.mark.parametrize(
  "overrides, told",
  [
    ({"evals.losses.every": 9}, "evals.losses.every=9 is more than steps=8"),
    ({"checkpoint.every": 9}, "checkpoint.every=9 is more than steps=8"),
    ({"checkpoint.keep_every": 3, "checkpoint.every": 2}, "is no multiple of checkpoint.every=2"),
    ({"label_drop_prob": 0.1}, "label_drop_prob=0.1 means nothing without use_labels=True"),
    ({}, ""),
    ({"checkpoint.keep_every": 4, "checkpoint.every": 2}, ""),
    ({"checkpoint.keep_every": 2, "checkpoint.every": 4}, ""),
    ({"evals.losses.every": 0, "checkpoint.every": 0}, ""),
    ({"steps": 0, "epochs": 1.0, "checkpoint.every": 10**9}, ""),  # So long may an epoch be.
  ],
)
def test_what_may_not_be_meant_is_remarked(overrides, told):
  short = {f"evals.{name}.every": 4 for name in STAGES["pretrain"]["evals"]}
  stage = changed("pretrain", **{"steps": 8, "checkpoint.every": 8, **short, **overrides})
  _, remarks = check.validate(ConfigDict(stage), "absent")
  assert len(remarks) == bool(told) and told in "".join(remarks)


def test_remarks_name_the_stage():
  _, (remark,) = check.validate(ConfigDict(two(**{"finetune.checkpoint.every": 501})), "absent")
  assert remark.startswith("finetune.checkpoint.every=501 ")


# What the records know by themselves, against the code that they are about.


def test_every_trainer_has_its_record():
  modules = [
    importlib.import_module(f"trainers.{m.name}") for m in pkgutil.iter_modules(trainers.__path__)
  ]
  named = {m.__name__.split(".")[1] for m in modules if hasattr(m, "run") and hasattr(m, "prepare")}
  assert named == set(records.STAGE.records)
  assert stages.trainer(check.read_stage(STAGES["evaluate"])) in modules


def test_errors_of_a_kl_auto_encoder_are_those_that_there_are():
  (error,) = (f for f in dataclasses.fields(records.VaeLoss) if f.name == "error")
  assert set(error.metadata["within"]) == set(kl_vae.ERRORS)


def test_seeds_are_those_that_jax_tells_apart():
  (seed,) = (f for f in dataclasses.fields(records.Stage) if f.name == "seed")
  last = 2**32 - 1
  assert read.inside(last, seed.metadata["within"])
  assert not read.inside(last + 1, seed.metadata["within"])
  assert jax.random.key(last + 1) == jax.random.key(0) != jax.random.key(last)


def test_records_hold_what_the_config_says_and_the_defaults():
  stage = changed("pretrain", summary=["loss"])
  del stage["data"]["cache"]
  record = check.read_stage(stage)
  assert record.summary == ("loss",) and record.data.cache is False and record.latents is None
  assert isinstance(record.guard, Guard) and record.guard.max_skipped == 10
  again = check.read_stage(records.to_dict(record) | {"latents": {}})
  assert again == record  # What a workdir keeps is a config, too.


VALUES = [0, 0.5, True, None, "a", (), (1,), (1, 2), (0.5, "a"), ("a",), (1, True), {}]
KINDS = {
  int: [0],
  float: [0, 0.5],
  bool: [True],
  str: ["a"],
  str | None: [None, "a"],
  int | None: [0, None],
  tuple[str, ...]: [(), ("a",)],
  tuple[int, ...]: [(), (1,), (1, 2)],
  tuple[float, float]: [(1, 2)],
  str | Sequence[float]: ["a", (), (1,), (1, 2)],
  Mapping: [{}],
  Mapping | None: [None, {}],
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_types_are_those_of_annotations(kind):
  fitting = [v for v in VALUES if read.fits(v, kind)]
  assert list(map(repr, fitting)) == list(map(repr, KINDS[kind]))
  for value in VALUES:
    if isinstance(value, tuple):
      assert read.fits(list(value), kind) == (value in fitting)


@pytest.mark.parametrize(
  "interval, within, outside",
  [
    ("[0, 1)", [0, 0.5, 1 - 1e-12], [-1e-12, 1, math.nan, math.inf]),
    ("(0, 1]", [1e-12, 1], [0, 1 + 1e-12]),
    ("(0, inf)", [1e300], [math.inf, 0]),
    ("(0, inf]", [math.inf], [-math.inf, math.nan]),
  ],
)
def test_intervals_are_read_as_they_are_written(interval, within, outside):
  assert all(read.inside(x, interval) for x in within)
  assert not any(read.inside(x, interval) for x in outside)

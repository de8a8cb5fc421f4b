"""The commands of the UMD paper's README, and ours beside them: each builds what it is to train.

Data stand in by what the TFDS catalogue says of them, so that nothing is read or computed.
"""

import dataclasses
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

import evaluators.context
from trainers import diffusion, evaluate, linear_probe, stages
from trainers.config.check import read_stage
from umd import data
from umd.codecs.codec import Pixels
from umd.data.records import Records, select
from umd.models.network import num_tokens, param_shapes
from umd.objectives import Stream, Term
from umd.runs import workdir as folder
from umd.trained import saved

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# As the TFDS catalogue lists them: classes, and the images of every split that is labelled.
CATALOGUE = {
  "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
  "imagenet_resized/64x64": (1000, {"train": 1_281_167, "validation": 50_000}),
  "imagenet_v2": (1000, {"test": 10_000}),
  "cifar10": (10, {"train": 50_000, "test": 10_000}),
  "cifar100": (100, {"train": 50_000, "test": 10_000}),
  "stl10": (10, {"train": 5_000, "test": 8_000}),
  "dtd": (47, {"train": 1_880, "validation": 1_880, "test": 1_880}),
  "oxford_iiit_pet": (37, {"train": 3_680, "test": 3_669}),
  "oxford_flowers102": (102, {"train": 1_020, "validation": 1_020, "test": 6_149}),
  "food101": (101, {"train": 75_750, "validation": 25_250}),
  "stanford_dogs": (120, {"train": 12_000, "test": 8_580}),
  "uc_merced": (21, {"train": 2_100}),
  "tiny_imagenet": (200, {"train": 100_000, "validation": 10_000}),  # as docs/data.md prepares it
}


class Listed(Records):
  """Encoded images of unknown size, of which nothing but the number is known."""

  def __init__(self, name: str, split: str):
    classes, sizes = CATALOGUE[name.removeprefix("tfds:")]
    super().__init__(f"{name}:{split}", "string", (None, None, 3), classes)
    parts = select(split, sizes, name)
    self.ids = {(of, int(i)) for of, ids in parts for i in (ids[0], ids[-1])}
    self._count = sum(len(ids) for _, ids in parts)

  def __len__(self):
    return self._count


@pytest.fixture
def opened(monkeypatch, small_inception):
  """{(name, split): source} of what is asked of the data loader, which knows CATALOGUE alone.

  Inception's weights count as found.
  """
  found = {}

  def load(name, split, pp="", *, data_dir="", cache=False, shuffle_buffer=0, max_bad=-1.0):
    found[name.removeprefix("tfds:"), split] = source = data.Source(Listed(name, split), pp)
    return source

  monkeypatch.setattr(data, "load", load)
  monkeypatch.setattr(evaluators.context, "load", load)
  return found


def parse(config: str):
  """What --config makes of `file.py:arguments`."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
  values(["train", "--config", os.path.join(ROOT, config.removeprefix("big_vision/"))])
  return values.config


def only_stage(config: str, name: str):
  found = parse(config)
  assert found.stages == (name,)
  return found[name]


def millions(model) -> float:
  shapes = param_shapes(model)
  return round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 1)


def clean(share, mask_ratio=0.75):
  terms = {"x0": Term("x0", "masked", 1.0)}
  return Stream("clean", terms, (0.0, share), "clean", mask_ratio, labels=False)


def noised(start, mask_ratio):
  seen, unseen = ("visible", "masked") if mask_ratio else ("all", "all")
  terms = {"eps": Term("eps", seen, 0.5), "x0": Term("x0", unseen, 0.5)}
  return Stream("noised", terms, (start, 1.0), "uniform", mask_ratio, labels=True)


UMD, MAE = (clean(0.5), noised(0.5, 0.375)), (clean(1.0),)
DIT, MASKDIT = (noised(0.0, 0.0),), (noised(0.0, 0.5),)
FINETUNE = (clean(0.05), noised(0.05, 0.0))


@dataclasses.dataclass(frozen=True)
class Row:
  """A command of the README, and what it means.

  Attributes:
    config: what follows --config there, as it is printed.
    streams: the method that it trains.
    params: published number of parameters, millions.
    batch: images per step.
    steps: `epochs` times the 1,268,355 images of 99 % of ImageNet, divided by the batch.
    tuned: fine-tuning, or the same settings from scratch: other AdamW, larger crops, labels.
  """

  config: str
  streams: tuple
  params: float
  batch: int
  steps: int
  tuned: bool = False

  @property
  def is_latent(self):
    return "latent_diffusion=True" in self.config

  @property
  def stage(self):
    return "finetune" if "finetune=True" in self.config else "pretrain"

  @property
  def side(self):
    return 256 if ",size=256" in self.config else 64


AE = "big_vision/configs/ae_i1k.py:"
TUNED = "use_labels=True,epochs=50,area_min=95,wd=0.0,finetune=True"
ROWS = {
  "UMD-B/4": Row(AE + "variant=:B/4,size=64", UMD, 174.2, 1024, 990_902),
  # Printed as MAE's, but without no_noise_prob=1.0: it trains UMD.
  "MAE-B/4": Row(
    AE + "variant=:B/4,size=64,batch_size=4096,adaln=False", UMD, 116.3, 4096, 247_726
  ),
  "DiT-B/4": Row(
    AE + "variant=:B/4,size=64,no_noise_prob=0.0,mask_ratio=0.0", DIT, 174.2, 1024, 990_902
  ),
  "MaskDiT-B/4": Row(
    AE + "variant=:B/4,size=64,no_noise_prob=0.0,mask_ratio=0.5", MASKDIT, 174.2, 1024, 990_902
  ),
  "Latent-UMD-L/2": Row(
    AE + "variant=:L/2,latent_diffusion=True,size=256", UMD, 611.5, 1024, 990_902
  ),
  # As above: UMD in pixels.
  "MAE-L/16": Row(AE + "variant=:L/16,size=256", UMD, 613.8, 1024, 990_902),
  "UMD-B/4 tuned": Row(
    AE
    + f"variant=:B/4,size=64,batch_size=256,beta2=0.999,mask_ratio=0.0,no_noise_prob=0.05,{TUNED}",
    *(FINETUNE, 177.3, 256, 247_726, True),
  ),
  "MAE-B/4 tuned": Row(
    AE + "variant=:B/4,size=64,adaln=False,batch_size=256,beta2=0.999,mask_ratio=0.0,"
    f"no_noise_prob=0.05,{TUNED}",
    *(FINETUNE, 119.4, 256, 247_726, True),
  ),
  "DiT-B/4 tuned": Row(
    AE
    + f"variant=:B/4,size=64,batch_size=256,beta2=0.999,mask_ratio=0.0,no_noise_prob=0.00,{TUNED}",
    *(DIT, 177.3, 256, 247_726, True),
  ),
  "MaskDiT-B/4 tuned": Row(
    AE
    + f"variant=:B/4,size=64,batch_size=256,beta2=0.999,mask_ratio=0.0,no_noise_prob=0.00,{TUNED}",
    *(DIT, 177.3, 256, 247_726, True),
  ),
  "Latent-UMD-L/2 tuned": Row(
    AE + "variant=:L/2,latent_diffusion=True,size=256,batch_size=256,beta2=0.999,mask_ratio=0.0,"
    f"no_noise_prob=0.05,{TUNED}",
    *(FINETUNE, 616.7, 256, 247_726, True),
  ),
  "Latent-DiT-L/2 from scratch": Row(
    AE + "variant=:L/2,latent_diffusion=True,size=256,batch_size=256,beta2=0.999,mask_ratio=0.0,"
    "no_noise_prob=0.0,use_labels=True,epochs=400,area_min=95,wd=0.0",
    *(DIT, 616.7, 256, 1_981_805, True),
  ),
}
rows = lambda only=lambda row: True: pytest.mark.parametrize(
  "row", [pytest.param(row, id=name) for name, row in ROWS.items() if only(row)]
)


@rows()
def test_every_command_names_its_model_batch_and_optimizer(row):
  config = only_stage(row.config, row.stage)
  seen = (32, 32, 4) if row.is_latent else (row.side, row.side, 3)
  model = diffusion.make_model(read_stage(config), seen, 1000)
  assert num_tokens(model) == 256  # of every model of the paper
  assert model.num_classes == (1000 if row.tuned else 0)
  assert millions(model) == row.params
  assert config.batch_size == row.batch
  assert config.optim.to_dict() == dict(
    lr=1.5e-4 * row.batch / 256,
    warmup=0.05,
    wd=0.0 if row.tuned else 0.05,
    beta1=0.9,
    beta2=0.999 if row.tuned else 0.95,
    clip_norm=1.0,
    mu_dtype="bfloat16",
  )
  assert 1 - config.ema_decay == pytest.approx(1e-4 * row.batch / 256)
  assert config.label_drop_prob == (0.1 if row.tuned else 0.0)
  path = "linear" if row.is_latent else "cosine"
  assert config.path.to_dict() == dict(name=path, timesteps=1000)
  assert f"area_min={95 if row.tuned else 80})" in config.data.pp
  starts = row.stage == "finetune"
  assert config.init_from == ("stage:pretrain" if starts else "")
  assert config.init_fresh == (("label_embed",) if row.tuned else ())


@rows()
def test_every_command_builds_its_run(opened, small_vae, tmp_path, row):
  config = only_stage(row.config, row.stage)
  parts = diffusion.prepare(read_stage(config), str(tmp_path), str(tmp_path))
  assert parts.model.image_size == ((32, 32, 4) if row.is_latent else (row.side, row.side, 3))
  assert parts.codec.pixel_size(parts.model.image_size) == (row.side, row.side, 3)
  assert parts.streams == row.streams
  assert parts.steps == row.steps
  assert len(parts.source) == 1_268_355
  warm, peak = int(0.05 * row.steps), 1.5e-4 * row.batch / 256
  rates = [float(parts.schedule(s)) for s in (0, warm // 2, warm, (warm + row.steps) // 2)]
  assert rates == pytest.approx([0, peak / 2, peak, peak / 2], rel=1e-3)
  assert float(parts.schedule(row.steps)) == pytest.approx(0, abs=1e-9)
  state = jax.eval_shape(parts.tx.init, {"kernel": jnp.zeros((2, 2))})
  types = [x.dtype for x in jax.tree.leaves(state) if x.shape == (2, 2)]
  assert types == [jnp.bfloat16, jnp.float32]  # first and second moment
  assert not os.listdir(tmp_path)

  every = {s.name: s.every for s in parts.evaluators}
  expected = {"losses": 25_000}
  expected |= {"reconstruction": 25_000} if row.streams[0].name == "clean" else {}
  samples = {"generation": 25_000, "final_generation": 0}  # 0: after the last step only
  expected |= samples if row.tuned else {}
  expected |= {"fewshot": 10_000} if row.stage == "pretrain" else {}
  assert every == expected
  assert {name for name, _ in opened} == {"imagenet2012"}
  assert all(s.image_size == (row.side, row.side, 3) for s in opened.values())
  # Trained on, held out; then what samples are compared with, or what probes are fed and tested on.
  sizes = {split: len(source) for (_, split), source in opened.items()}
  expected = {"train[:99%]": 1_268_355, "train[99%:]": 12_812}
  probed = {"train[:100000]": 100_000, "validation": 50_000}
  expected |= {"train": 1_281_167} if row.tuned else {}
  assert sizes == expected | (probed if row.stage == "pretrain" else {})
  if row.tuned:
    asked = [(config.evals[name].num, config.evals[name].features) for name in samples]
    assert asked == [(10_000, "inception"), (50_000, "inception")]


@pytest.mark.parametrize("name", ["MAE-B/4", "MAE-L/16"])
def test_mae_is_trained_by_naming_the_method(opened, tmp_path, name):
  row = ROWS[name]
  config = only_stage(row.config + ",method=mae", "pretrain")
  assert diffusion.prepare(read_stage(config), str(tmp_path), str(tmp_path)).streams == MAE
  spelt_out = only_stage(row.config + ",no_noise_prob=1.0,mask_ratio=0.0", "pretrain")
  assert spelt_out.to_dict() == config.to_dict()


EVAL = "big_vision/configs/eval_ae_i1k.py:variant={},size={},adaln={},latent_diffusion={},"
EVAL += "finetune={},sampling_timesteps={},samples={},probe={}"


@pytest.mark.parametrize(
  "ours, theirs",
  [
    ("configs/ae_i1k.py:variant=B/4,size=64", ROWS["UMD-B/4"].config),
    ("configs/ae_i1k.py:variant=L/16,size=256", ROWS["MAE-L/16"].config),
    (
      "configs/eval_ae_i1k.py:variant=B/4,sample=False",
      "big_vision/configs/eval_ae_i1k.py:variant=:B/4,samples=False",
    ),
  ],
)
def test_both_spellings_mean_the_same(ours, theirs):
  assert parse(ours).to_dict() == parse(theirs).to_dict()


def write_run(path: str, row: Row):
  """What a run of that command leaves, but for the weights."""
  config = only_stage(row.config, row.stage)
  model = diffusion.make_model(read_stage(config), (row.side, row.side, 3), 1000)
  folder.start(path, config.to_dict())
  folder.write_json(os.path.join(path, "model.json"), saved.describe_model(model, Pixels()))
  os.makedirs(os.path.join(path, "checkpoints", "1"))


TRANSFER = {
  "imagenet": ("imagenet2012", 100_000, 50_000),
  "imagenet_v2": ("imagenet_v2", 100_000, 10_000),
  "cifar100": ("cifar100", 50_000, 10_000),
  "stl10": ("stl10", 5_000, 8_000),
  "dtd": ("dtd", 1_880, 1_880),
  "pets": ("oxford_iiit_pet", 3_680, 3_669),
  "flowers": ("oxford_flowers102", 1_020, 6_149),
  "food101": ("food101", 75_750, 25_250),
  "dogs": ("stanford_dogs", 12_000, 8_580),
  "uc_merced": ("uc_merced", 1_000, 1_100),
}


@pytest.mark.parametrize(
  "name, arguments",
  [
    ("UMD-B/4", (":B/4", 64, True, False, False, 62, True, True)),
    ("UMD-B/4 tuned", (":B/4", 64, True, False, True, 125, True, False)),
    ("MAE-B/4 tuned", (":B/4", 64, False, False, True, 250, True, False)),
    ("MAE-L/16", (":L/16", 256, True, False, False, 125, True, True)),
    ("MAE-L/16", (":L/16", 256, True, False, False, 125, False, True)),
  ],
)
def test_evaluation_commands_build_probes_and_samples(opened, tmp_path, name, arguments):
  row, (*_, steps, sample, probe) = ROWS[name], arguments
  write_run(str(tmp_path / row.stage), row)
  config = only_stage(EVAL.format(*arguments), "eval")
  source = saved.locate(config.init_from, str(tmp_path))
  run, scheduled = evaluate.prepare(
    read_stage(config), str(tmp_path / "eval"), str(tmp_path), source
  )
  assert run.folder == str(tmp_path / row.stage)
  assert run.streams == row.streams
  built = {s.name for s in scheduled}
  assert ("generation" in built) == sample
  assert {n for n in built if n in TRANSFER} == (set(TRANSFER) if probe else set())
  assert all(source.image_size == (row.side, row.side, 3) for source in opened.values())
  if sample:
    settings = config.evals.generation
    assert (settings.num, settings.sampling.steps) == (50_000, steps)
    assert settings.sampling.cfg_scale == 1.5
  for name in TRANSFER if probe else ():
    settings = config.evals[name]
    assert (tuple(settings.protocol), tuple(settings.shots)) == (("umd",), (10, 100))
    pair = [opened[s.name.removeprefix("tfds:"), s.split] for s in (settings.train, settings.test)]
    assert pair[1].name.startswith(f"tfds:{TRANSFER[name][0]}:")
    assert tuple(map(len, pair)) == TRANSFER[name][1:]
  # Where both are cut from one split, no image is in both.
  if probe:
    ends = [opened["uc_merced", s].records.ids for s in ("train[:1000]", "train[1000:]")]
    assert ends == [{("train", 0), ("train", 999)}, {("train", 1000), ("train", 2099)}]


@pytest.mark.parametrize(
  "arguments, told",
  [
    ((":L/2", 64, True, False, False), ["variant='L/2', there 'B/4'"]),
    ((":B/4", 256, True, False, False), ["size=256, there 64"]),
    ((":B/4", 64, False, False, False), ["adaln='false', there 'true'"]),
    ((":B/4", 64, True, True, False), ["latent_diffusion=True, there False"]),
    ((":L/16", 256, True, False, False), ["variant='L/16', there 'B/4'", "size=256, there 64"]),
  ],
)
def test_an_evaluation_that_describes_another_model_is_refused(opened, tmp_path, arguments, told):
  write_run(str(tmp_path / "pretrain"), ROWS["UMD-B/4"])
  config = only_stage(EVAL.format(*arguments, 125, True, True), "eval")
  source = saved.locate(config.init_from, str(tmp_path))
  with pytest.raises(ValueError) as error:
    evaluate.prepare(read_stage(config), str(tmp_path / "eval"), str(tmp_path), source)
  assert all(words in str(error.value) for words in told)
  assert str(error.value).count(", there ") == len(told)


def test_guidance_is_refused_without_labels_only_if_it_was_asked_for(opened, tmp_path):
  write_run(str(tmp_path), ROWS["UMD-B/4"])
  config = EVAL.format(":B/4", 64, True, False, False, 125, True, False)
  evaluate.prepare(
    read_stage(only_stage(config, "eval")), str(tmp_path / "eval"), "", str(tmp_path)
  )
  asked = only_stage(config + ",cfg_scale=1.5", "eval")
  with pytest.raises(ValueError, match=r"evals.generation: cfg_scale=1\.5 guides by labels"):
    evaluate.prepare(read_stage(asked), str(tmp_path / "eval"), "", str(tmp_path))


def test_an_evaluation_of_nothing_is_refused():
  with pytest.raises(flags.IllegalFlagValueError, match="leave nothing to evaluate"):
    only_stage(EVAL.format(":B/4", 64, True, False, False, 125, False, False), "eval")


def test_the_full_linear_probe_of_the_paper_is_built(opened, tmp_path):
  write_run(str(tmp_path / "pretrain"), ROWS["UMD-B/4"])
  config = only_stage("configs/ae_i1k_lp.py:variant=B/4,size=64,width=768", "linear_probe")
  source = saved.locate(config.init_from, str(tmp_path))
  parts = linear_probe.prepare(read_stage(config), str(tmp_path / "lp"), str(tmp_path), source)
  # 100 epochs of 4,096, the learning rates for 256 images, decay 5e-5: MAE's protocol.
  assert (config.batch_size, config.wd, parts.steps) == (4096, 5e-5, round(100 * 1_268_355 / 4096))
  assert [round(lr * 256 / 4096, 6) for lr in config.lrs] == [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
  assert tuple(config.timesteps) == (0, 50)
  assert "area_min=8)" in config.data.pp and "inception_crop(64," in config.data.pp
  sizes = len(parts.train), len(parts.held_out["select"]), len(parts.held_out["test"])
  assert sizes == (1_268_355, 12_812, 50_000)
  assert {s.image_size for s in opened.values()} == {(64, 64, 3)}


@pytest.mark.parametrize(
  "config",
  [
    "configs/i1k_64.py",
    "configs/i1k_64.py:method=dit,dataset=imagenet2012",
    "configs/cifar10.py",
    "configs/cifar10.py:method=mae,adaln=true",
    "configs/tiny_imagenet.py:method=maskdit",
  ],
)
def test_configs_of_other_data_sets_are_built(opened, tmp_path, config):
  found = parse(config)
  for name in found.stages:
    parts = diffusion.prepare(read_stage(found[name]), str(tmp_path), str(tmp_path))
    assert parts.evaluators
    measured = {metric.split("/")[0] for metric in found[name].summary}
    assert measured - {"fewshot", "reconstruction", "generation", "final_generation"} == set()


@pytest.mark.parametrize("labels", [True, False])
def test_the_config_of_a_folder_is_built(tmp_path, labels):
  import tensorflow as tf

  root = tmp_path / "images"
  for i in range(40):
    png = tf.io.encode_png(tf.fill((20, 24, 3), tf.cast(i, tf.uint8))).numpy()
    place = root / ("cat", "dog")[i % 2] if labels else root
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{i}.png").write_bytes(png)
  found = parse(f"configs/folder.py:root={root},size=16,use_labels={labels},num_samples=20")
  assert found.stages == (("pretrain", "finetune") if labels else ("pretrain",))
  for name in found.stages:
    parts = diffusion.prepare(read_stage(found[name]), str(tmp_path), str(tmp_path))
    assert (len(parts.source), parts.source.image_size) == (36, (16, 16, 3))
    assert parts.model.num_classes == (2 if name == "finetune" else 0)


def test_a_folder_must_be_named():
  with pytest.raises(flags.IllegalFlagValueError, match=r"root='' must be a folder of images"):
    parse("configs/folder.py")


WRITTEN = sorted(
  {
    found
    for file in ("README.md", "docs/*.md", "configs/*.py", "train.py", "*.sh")
    for path in Path(ROOT).glob(file)
    for found in re.findall(r"--config (configs/[^\s`\"']+)", path.read_text(encoding="utf-8"))
  }
)


MISTAKES = {"configs/quickstart.py:stepz=3"}  # Printed with their errors.
PLACEHOLDERS = {w for w in WRITTEN if "name=value" in w}


def test_commands_are_found_in_the_documents():
  assert "configs/ae_i1k.py:variant=B/4,size=64" in WRITTEN and len(WRITTEN) > 10


@pytest.mark.parametrize("config", MISTAKES)
def test_mistakes_in_the_documents_are_errors(config):
  assert config in WRITTEN
  with pytest.raises(flags.IllegalFlagValueError):
    parse(config)


@pytest.mark.parametrize("config", sorted({*WRITTEN} - MISTAKES - PLACEHOLDERS))
def test_every_command_in_the_documents_is_a_config(config):
  assert all(stage.config.trainer for stage in stages.plan(parse(config), "runs"))

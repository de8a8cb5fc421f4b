"""The tool that stores latents: what it writes, going on where it was stopped, its errors."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import images as image_configs
from tools import encode_latents
from tools.encode_latents import Views
from umd.codecs import codec, latent_files, vae_files
from umd.codecs.vae import Architecture, KLAutoEncoder
from umd.data import Source, eval_batches, load
from umd.data.host import tensorflow
from umd.data.preprocess import Preprocess
from umd.devices.mesh import make_mesh
from umd.runs import sharded, workdir

ARCHITECTURE = Architecture(
  block_out_channels=(8, 16),
  norm_num_groups=4,
  layers_per_block=1,
  mid_block_add_attention=False,
  shift_factor=0.1,
)
SIZE, N, M = 8, 21, 5  # px; images in split "train" and "validation"
SHAPE = (4, SIZE // 2, SIZE // 2, 8)
SHARDS = 2


def write_png(file, image):
  tf = tensorflow()
  os.makedirs(os.path.dirname(file), exist_ok=True)
  tf.io.write_file(str(file), tf.io.encode_png(image))


def random_image(rng, height, width):
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A folder of images of three classes and of several sizes."""
  root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
  for split, count in (("train", N), ("validation", M)):
    for i in range(count):
      write_png(root / split / "abc"[i % 3] / f"{i}.png", random_image(rng, 9 + i % 4, 10))
  return str(root)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  """A folder with a small VAE of random weights."""
  model = KLAutoEncoder(ARCHITECTURE)
  zeros = np.zeros((1, SIZE, SIZE, 3), np.float32), np.zeros((1, *SHAPE[1:3], 4), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *zeros)["params"]
  rng = np.random.default_rng(0)

  def draw(path, x):
    if x.ndim == 1:
      return rng.normal(path[-1].key == "scale", 0.1, x.shape).astype(np.float32)
    return rng.normal(0, (x.size / x.shape[-1]) ** -0.5, x.shape).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  folder = str(tmp_path_factory.mktemp("vae"))
  vae_files.save(folder, ARCHITECTURE, params)
  return folder


@pytest.fixture(scope="module", autouse=True)
def one_codec():
  """Runs with the same VAE and devices share what is compiled."""
  made = {}

  def latents(weights, mesh, *settings):
    key = weights.sha256, mesh, settings
    return made.setdefault(key, codec.Latents(weights, mesh, *settings))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(encode_latents, "Latents", latents)
    yield


@pytest.fixture(scope="module")
def run(images, vae):
  """`run(out, part, **flags)` encodes a split of the images."""

  def encode(out, part="train", **flags):
    flags = {"data": f"folder:{images}:{part}", "vae": vae, "size": SIZE, "out": out} | flags
    flags = {"shards": SHARDS, "vae_dtype": "float32", "batch_size": 8} | flags
    encode_latents.main([f"--{key}={value}" for key, value in flags.items()])

  return encode


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
  """A folder with both splits."""
  out = str(tmp_path_factory.mktemp("latents") / "out")
  run(out)
  run(out, "validation", shards=1)
  return out


def stored(out, split="train"):
  """Records as TFDS reads them, apart from this project."""
  tensorflow()
  import tensorflow_datasets as tfds

  return list(tfds.builder_from_directory(out).as_data_source(split))


def contents(out):
  """{name: hash} of the files of a folder; the records' only."""
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(Path(out).glob("*.array_record*"))
  }


def test_tfds_reads_what_is_written(whole, images):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(whole)
  assert builder.info.splits["train"].num_examples == N
  assert builder.info.splits["validation"].num_examples == M
  assert builder.info.features["label"].names == ["a", "b", "c"]
  assert len(builder.info.splits["train"].shard_lengths) == SHARDS
  for split in ("train", "validation"):
    records, source = (
      stored(whole, split),
      load(f"folder:{images}", split, "decode|resize(2)|value_range(0, 1)"),
    )
    assert [int(r["index"]) for r in records] == list(range(len(source)))
    assert [int(r["label"]) for r in records] == list(source.labels)
    for r in records:
      assert r["moments"].shape == SHAPE
      assert r["moments"].dtype == np.float16


def test_views_are_the_moments_of_the_images_that_a_config_would_give(whole, images, vae):
  weights = vae_files.load(vae)
  network = functools.partial(
    KLAutoEncoder(ARCHITECTURE).apply, {"params": weights.params}, method="encode"
  )
  moments = jax.jit(lambda x: jnp.concatenate(network(x), -1))
  batch = next(eval_batches(load(f"folder:{images}", "train", image_configs.test_pp(SIZE)), N))
  found = np.stack([r["moments"] for r in stored(whole)]).astype(np.float32)
  middle = batch["image"][np.argsort(batch["index"])]
  np.testing.assert_allclose(found[:, 0], moments(middle), atol=2e-3, rtol=2e-3)
  np.testing.assert_allclose(found[:, 1], moments(middle[:, :, ::-1]), atol=2e-3, rtol=2e-3)
  records = load(f"folder:{images}", "train", image_configs.test_pp(SIZE)).records
  crop = Preprocess(image_configs.train_pp(SIZE, 80), records.dtype, records.shape, records.name)
  view, seed = 2, 0
  for row in range(3):
    example = records.parse({k: v[0] for k, v in records.fetch(np.array([row])).items()})
    image = crop(example, seed * 256 + view, row)["image"].numpy()
    np.testing.assert_allclose(found[row, view], moments(image[None])[0], atol=2e-3, rtol=2e-3)
  spread = found.std(axis=(1, 2, 3)).mean()  # The comparison above says something.
  assert np.abs(found[:, 0] - found[:, 1]).max() > 0.02 < spread


def test_the_metadata_say_what_a_reader_needs(whole, images, vae):
  import tensorflow_datasets as tfds

  about = tfds.builder_from_directory(whole).info.metadata
  encoding = about["encoding"]
  file = Path(vae) / "diffusion_pytorch_model.safetensors"
  assert encoding["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
  assert (encoding["scaling"], encoding["shift"], encoding["factor"]) == (0.18215, 0.1, 2)
  assert encoding["pixel_size"] == [SIZE, SIZE, 3]
  assert len(encoding["views"]) == SHAPE[0] == encoding["shape"][0]
  for split in ("train", "validation"):
    part = about["splits"][split]
    source = load(f"folder:{images}", split, "decode|resize(2)|value_range(0, 1)")
    assert part["fingerprint"] == source.records.fingerprint()
    moments = np.stack([r["moments"] for r in stored(whole, split)]).astype(np.float64)
    mean, logvar = moments[..., :4].reshape(-1, 4), moments[..., 4:].reshape(-1, 4)
    np.testing.assert_allclose(part["mean"], 0.18215 * (mean.mean(0) - 0.1), rtol=1e-9)
    # Of a sample: the variance of the means, and the mean of the variances.
    std = 0.18215 * np.sqrt(mean.var(0) + np.exp(logvar).mean(0))
    np.testing.assert_allclose(part["std"], std, rtol=1e-9)
    assert part["bytes"] == sum(f.stat().st_size for f in Path(whole).glob(f"*-{split}.*"))


def test_a_stopped_run_goes_on_to_the_same_bytes(run, whole, tmp_path, monkeypatch):
  out, write, written = str(tmp_path / "out"), latent_files.write_shard, []

  def killed(plan, shard, records, report):
    if shard == 1:
      Path(out, "progress", os.path.basename(plan.file(1)) + ".tmp").write_bytes(b"half of it")
      raise KeyboardInterrupt
    write(plan, shard, records, report)

  def counted(plan, shard, records, report):
    written.append(shard)
    write(plan, shard, records, report)

  monkeypatch.setattr(latent_files, "write_shard", killed)
  with pytest.raises(SystemExit) as ended:
    run(out)
  assert ended.value.code == 130
  assert not os.path.exists(os.path.join(out, "dataset_info.json"))
  with pytest.raises(ValueError, match=r"not finished, 1 of 2 shards.*--shards=2"):
    load(f"latents:{out}", "train", "view(0)")
  monkeypatch.setattr(latent_files, "write_shard", counted)
  # Batches of another size on one device instead of four.
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
  run(out, batch_size=3)
  assert written == [1]
  assert contents(out) == {k: v for k, v in contents(whole).items() if "-train" in k}
  assert not list(Path(out).rglob("*.tmp"))
  of = lambda folder: workdir.read_json(f"{folder}/metadata.json")["splits"]["train"]
  for key in ("mean", "std", "bytes", "count", "fingerprint"):
    assert of(out)[key] == of(whole)[key]


def test_a_damaged_shard_is_made_again_and_whole_ones_are_left(run, whole, tmp_path, capsys):
  out = str(tmp_path / "out")
  shutil.copytree(whole, out)
  before = contents(out)
  file = Path(out) / "latents-train.array_record-00001-of-00002"
  file.write_bytes(file.read_bytes()[:-100])
  stat = os.stat(Path(out) / "latents-train.array_record-00000-of-00002")
  run(out)
  assert contents(out) == before
  again = os.stat(Path(out) / "latents-train.array_record-00000-of-00002")
  assert (again.st_mtime_ns, again.st_ino) == (stat.st_mtime_ns, stat.st_ino)
  assert "1 of 2 shards are there" in capsys.readouterr().out
  assert set(workdir.read_json(f"{out}/metadata.json")["splits"]) == {"train", "validation"}


def test_two_processes_write_what_one_writes(images, vae, whole, tmp_path):
  out = str(tmp_path / "out")
  flags = [f"--data=folder:{images}:train", f"--vae={vae}", f"--size={SIZE}", f"--out={out}"]
  args = encode_latents.parse([*flags, "--shards=2", "--vae_dtype=float32"])
  weights = vae_files.load(vae)
  records = load(f"folder:{images}", "train", "decode|resize(2)|value_range(0, 1)").records
  source = Source(records, Views(records, SIZE, 4))
  plan, mesh = encode_latents.make_plan(args, source, weights), make_mesh(jax.local_devices())
  latent_files.begin(plan)
  network = encode_latents.Latents(weights, mesh, "float32", encode_latents.CHUNK)
  for process, shards in ((1, {1}), (0, {0, 1})):
    encode_latents.encode(network, source, plan, 8, mesh, (process, 2))
    assert set(sharded.done(plan)) == shards
  sharded.wait(plan, print)
  latent_files.finish(plan, encode_latents.summarize)
  assert contents(out) == {k: v for k, v in contents(whole).items() if "-train" in k}


def test_processes_wait_for_one_another(tmp_path, monkeypatch):
  settings = {"shards": 2, "encoding": {}}
  plan = latent_files.LatentPlan(str(tmp_path), settings, "", "train")
  monkeypatch.setattr(sharded, "VISIBLE_SECONDS", 0.0)
  with pytest.raises(ValueError, match="not seen by all processes"):
    latent_files.begin(plan, is_main=False)
  latent_files.begin(plan)
  latent_files.begin(plan, is_main=False)
  lines = []

  def write_one(seconds):
    sharded.write_shard(plan, len(lines) - 1, lambda path: Path(path).write_bytes(b"some"))

  monkeypatch.setattr(sharded.time, "sleep", write_one)
  sharded.wait(plan, lines.append)
  assert [line.split(",")[0] for line in lines] == [
    "waiting for 2 of 2 shards",
    "waiting for 1 of 2 shards",
  ]


def views_of(folder, count, seed=0, area_min=80):
  records = load(f"folder:{folder}", "all", "decode|resize(2)|value_range(0, 1)").records
  views = Views(records, SIZE, count, area_min, seed)
  example = lambda i: records.parse({k: v[0] for k, v in records.fetch(np.array([i])).items()})
  return np.stack([views(example(i), 0, i)["image"].numpy() for i in range(len(records))])


def test_crops_depend_on_seed_view_and_place_alone(tmp_path):
  rng = np.random.default_rng(1)
  image = random_image(rng, 48, 64)
  for i in range(6):
    write_png(tmp_path / f"{i}.png", image)  # The same, so that only the draws differ.
  see = functools.partial(views_of, tmp_path, area_min=10)
  four, other = see(4), see(4, seed=1)
  np.testing.assert_array_equal(see(3), four[:, :3])
  np.testing.assert_array_equal(see(1), four[:, :1])
  np.testing.assert_array_equal(other[:, :2], four[:, :2])
  np.testing.assert_array_equal(four[:, 1], four[:, 0, :, ::-1])
  drawn = np.concatenate([four[:, 2], four[:, 3], other[:, 2], other[:, 3]])
  assert len(np.unique(drawn, axis=0)) == 24


def test_crops_of_whole_squares_are_the_first_views(tmp_path):
  rng = np.random.default_rng(2)
  for i in range(8):
    write_png(tmp_path / f"{i}.png", random_image(rng, 12, 12))
  found = views_of(tmp_path, 4, area_min=100)
  same = lambda a, b: np.allclose(a, b, atol=1e-4)
  mirrored = [
    [same(image[v], image[1]) for v in (2, 3)]
    for image in found
    if all(same(image[v], image[0]) or same(image[v], image[1]) for v in (2, 3))
  ]
  assert len(mirrored) == 8
  assert 2 <= np.sum(mirrored) <= 14


def fails(capsys, run, *args, **flags):
  """The one line of error of a run that must not encode anything."""
  with pytest.raises(SystemExit) as ended:
    run(*args, **flags)
  assert ended.value.code in (1, 2)
  captured = capsys.readouterr()
  assert "Traceback" not in captured.err
  return captured.err


@pytest.mark.parametrize(
  "flags, message",
  [
    ({"views": 0}, "--views: 0 is less than 1"),
    ({"views": 257}, "views=257 must be in 1..256"),
    ({"seed": 2**45}, "seed=35184372088832"),
    ({"size": 9}, "--size=9 must be a multiple of 2"),
    ({"vae": "/nowhere"}, "/nowhere"),
    ({"data": "folder:/nowhere:train"}, "/nowhere"),
    ({"area_min": 0}, "area_min=0"),
    ({"split": "all"}, "--split='all'"),
    ({"split": "a b"}, "--split='a b'"),
    ({"seed": 1}, r"encoding.seed: there 0, now 1"),
    ({"dtype": "float32"}, r"encoding.dtype: there 'float16', now 'float32'"),
    ({"shards": 3}, r"shards: there 2, now 3"),
    ({"area_min": 50}, "area_min=50"),
  ],
)
def test_bad_input_is_one_error_before_anything_is_encoded(
  run, whole, capsys, monkeypatch, flags, message
):
  monkeypatch.setattr(encode_latents, "encode", None)
  before = contents(whole)
  assert message in fails(capsys, run, whole, **flags)
  assert contents(whole) == before


def test_settings_of_another_split_must_agree(run, whole, capsys, monkeypatch):
  monkeypatch.setattr(encode_latents, "encode", None)
  error = fails(capsys, run, whole, "validation", split="test", views=2)
  assert "holds 'train' with other settings" in error
  assert "encoding.shape: there [4, 4, 4, 8], now [2, 4, 4, 8]" in error
  assert "--shards=2" in error  # The command that made it.


def test_splits_that_are_joined_need_a_name(run, tmp_path, capsys, images):
  data = f"folder:{images}:train+validation"
  assert "--split NAME" in fails(capsys, run, str(tmp_path), data=data)
  assert encode_latents.split_name(data, "both") == "both"
  assert encode_latents.split_name("tfds:x:train[:10]", "") == "train"
  assert encode_latents.split_name(f"folder:{images}", "") == "train"


def test_out_must_be_a_folder_that_can_be_written(run, tmp_path, capsys, monkeypatch):
  (tmp_path / "file").touch()
  assert "cannot be written" in fails(capsys, run, str(tmp_path / "file"))
  assert "cannot be written" in fails(capsys, run, str(tmp_path / "file" / "below"))
  full = shutil.disk_usage("/")._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
  error = fails(capsys, run, str(tmp_path / "out"))
  assert "21 images need 2.15e-05 GB, and 1e-06 GB are free" in error


def test_images_must_have_the_channels_of_the_vae(run, tmp_path, capsys):
  np.savez(tmp_path / "gray.npz", images=np.zeros((3, SIZE, SIZE, 1), np.uint8))
  error = fails(capsys, run, str(tmp_path / "out"), data=f"npz:{tmp_path}/gray.npz")
  assert "images of 1 channels" in error


def test_an_unreadable_image_is_named_or_left_out(run, tmp_path, capsys):
  rng, folder = np.random.default_rng(3), tmp_path / "images"
  for i in range(4):
    write_png(folder / f"{i}.png", random_image(rng, 9, 9))
  (folder / "2.png").write_bytes(b"no image")
  data = {"data": f"folder:{folder}", "shards": 1}
  assert "2.png" in fails(capsys, run, str(tmp_path / "out"), **data)
  run(str(tmp_path / "out"), **data, max_bad=1)
  printed = capsys.readouterr().out
  assert "1 images were left out" in printed
  assert "2.png" in printed
  records = stored(str(tmp_path / "out"))
  paths = load(f"folder:{folder}", "all", "decode|resize(2)|value_range(0, 1)").records
  names = [paths.describe(int(r["index"])) for r in records]
  assert len(names) == 3
  assert "label" not in records[0]  # There are no classes.
  assert not any("2.png" in name for name in names)


def test_records_are_in_the_order_of_the_source_however_they_came(whole, tmp_path, images):
  """TFRecord files are read side by side, so their images come mixed."""
  settings = json.loads(Path(whole, "progress", "train.json").read_text())["settings"]
  plan = latent_files.LatentPlan(str(tmp_path), settings, "", "train", ("a", "b", "c"))
  source = load(f"folder:{images}", "train", "decode|resize(2)|value_range(0, 1)")
  plan = dataclasses.replace(plan, settings=settings | {"shards": 1})
  index, parts = np.random.default_rng(0).permutation(N + 3), []
  for i in np.split(index, 4):
    moments = np.broadcast_to(i[:, None, None, None, None], (6, *SHAPE)).astype(np.float16)
    real = (i < N).astype(np.float32)
    parts.append({"moments": moments, "_mask": real, "index": i, "label": i % 3})
  latent_files.begin(plan)
  encode_latents.write(plan, 0, parts, source)
  latent_files.finish(plan, encode_latents.summarize)
  records = stored(str(tmp_path))
  assert [int(r["index"]) for r in records] == list(range(N))
  for i, r in enumerate(records):
    assert r["label"] == i % 3
    np.testing.assert_array_equal(r["moments"], np.full(SHAPE, i))


def test_moments_that_are_not_finite_are_no_latents(run, whole, tmp_path, images, monkeypatch):
  settings = json.loads(Path(whole, "progress", "train.json").read_text())["settings"]
  plan = latent_files.LatentPlan(str(tmp_path), settings, "", "train", ("a", "b", "c"))
  records = load(f"folder:{images}", "train", "decode|resize(2)|value_range(0, 1)").records
  part = {
    "moments": np.full((1, *SHAPE), np.inf, np.float16),
    "_mask": np.ones(1),
    "index": np.array([4]),
    "label": np.array([0]),
  }
  source = Source(records, Views(records, SIZE, 4))
  with pytest.raises(ValueError, match=rf"{records.describe(4)}.*not finite in float16"):
    encode_latents.write(plan, 0, [part], source)
  part["moments"][:] = 0
  with pytest.raises(ValueError, match="was not read, nor 8 others"):
    encode_latents.write(plan, 0, [part], source)

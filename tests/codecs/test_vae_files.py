"""Weights of auto-encoders: folders, configs, damaged files, and a hub that may not answer."""

import hashlib
import http.server
import importlib.util
import json
import os
import re
import socket
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from huggingface_hub import constants

from umd.codecs import vae_files
from umd.codecs.vae import Architecture, KLAutoEncoder, to_diffusers
from umd.weights import download

TINY = Architecture(
  block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
)
CONFIG, TENSORS = "config.json", "diffusion_pytorch_model.safetensors"

# The config of sd-vae-ft-mse, as published: no scaling_factor, no quant_conv, no shift.
PUBLISHED = {
  "_class_name": "AutoencoderKL",
  "_diffusers_version": "0.4.2",
  "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "sample_size": 256,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def random_params(seed=0):
  rng, model = np.random.default_rng(seed), KLAutoEncoder(TINY)
  images, noise = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 1, 1, 4))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images, noise)["params"]
  return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def equal(a, b):
  a, b = flatten_dict(a), flatten_dict(b)
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def params():
  return random_params()


@pytest.fixture
def folder(tmp_path, params):
  vae_files.save(str(tmp_path / "vae"), TINY, params)
  return tmp_path / "vae"


def rewrite(folder, **changes):
  """Changes values of config.json; None removes a key, ... is null."""
  config = {**json.loads((folder / CONFIG).read_text()), **changes}
  config = {k: None if v is ... else v for k, v in config.items() if v is not None}
  (folder / CONFIG).write_text(json.dumps(config))


def rewrite_tensors(folder, change):
  tensors = safetensors.numpy.load_file(folder / TENSORS)
  safetensors.numpy.save_file(change(tensors), folder / TENSORS)


def test_what_was_saved_is_read(folder, params):
  weights = vae_files.read(str(folder))
  assert weights.architecture == TINY
  assert equal(weights.params, params)
  assert weights.sha256 == hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
  assert weights.sha256 == vae_files.save(str(folder), TINY, params)
  assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
  with pytest.raises(ValueError, match="read-only"):
    weights.params["quant_conv"]["bias"][0] = 1


HAS_DIFFUSERS = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


@pytest.mark.skipif(not HAS_DIFFUSERS, reason="needs PyTorch and diffusers")
def test_diffusers_loads_what_was_saved_and_decodes_the_same(folder, params, tmp_path):
  import torch
  from diffusers import AutoencoderKL

  model, report = AutoencoderKL.from_pretrained(str(folder), output_loading_info=True)
  assert not any(report.values())
  assert model.config.scaling_factor == 0.5
  latents = np.random.default_rng(0).standard_normal((2, 4, 5, 4)).astype(np.float32)
  with torch.no_grad():
    theirs = model.eval().decode(torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())).sample
  ours = jax.jit(lambda p, x: KLAutoEncoder(TINY).apply({"params": p}, x, method="decode"))
  theirs = theirs.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(ours(params, latents), theirs, atol=1e-4 * np.abs(theirs).max())
  model.save_pretrained(tmp_path / "theirs")
  weights = vae_files.read(str(tmp_path / "theirs"))
  assert weights.architecture == TINY and equal(weights.params, params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_read_into_float32(folder, params, dtype):
  rounded = {k: v.astype(dtype) for k, v in to_diffusers(params, TINY).items()}
  (folder / TENSORS).write_bytes(safetensors.numpy.save(rounded))
  got = vae_files.read(str(folder)).params
  assert {x.dtype for x in flatten_dict(got).values()} == {np.dtype("float32")}
  expected = jax.tree.map(lambda x: np.asarray(x.astype(dtype), np.float32), params)
  assert equal(got, expected)


def test_the_config_of_sd_vae_ft_mse_means_the_defaults(tmp_path):
  (tmp_path / CONFIG).write_text(json.dumps(PUBLISHED))
  path = str(tmp_path / CONFIG)
  read = lambda: vae_files._parse_config(path, (tmp_path / CONFIG).read_bytes())
  assert read() == Architecture()
  rewrite(tmp_path, scaling_factor=1, shift_factor=..., latents_mean=..., force_upcast=False)
  assert read() == Architecture(scaling_factor=1)
  rewrite(tmp_path, shift_factor=0.0609, use_quant_conv=False, mid_block_add_attention=False)
  expected = dict(use_quant_conv=False, mid_block_add_attention=False, shift_factor=0.0609)
  assert read() == Architecture(scaling_factor=1, **expected)
  rewrite(tmp_path, layers_per_block=None, latent_channels=None)  # diffusers' defaults: 1 and 4
  assert read() == Architecture(scaling_factor=1, layers_per_block=1, **expected)


@pytest.mark.parametrize(
  "key, value",
  [
    ("_class_name", "AutoencoderTiny"),
    ("act_fn", "gelu"),
    ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    ("up_block_types", ["UpDecoderBlock2D"]),
    ("block_out_channels", [8, 16.5]),
    ("block_out_channels", 8),
    ("layers_per_block", 0),
    ("layers_per_block", True),
    ("latent_channels", "4"),
    ("use_quant_conv", 1),
    ("scaling_factor", "0.5"),
    ("latents_mean", [0.1, 0.2, 0.3, 0.4]),  # latents that are shifted otherwise
    ("rotation", "hadamard"),
  ],
)
def test_configs_of_other_networks_are_refused(folder, key, value):
  rewrite(folder, **{key: value})
  message = rf"config\.json: {key}={re.escape(repr(value))}, but only .* is known"
  with pytest.raises(ValueError, match=message):
    vae_files.read(str(folder))


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", r"config\.json is damaged"),
    ("[1]", "holds a list"),
    ('{"block_out_channels": [8]}', "multiples of norm_num_groups=32"),
  ],
)
def test_damaged_configs_are_refused(folder, text, message):
  (folder / CONFIG).write_text(text)
  with pytest.raises(ValueError, match=message):
    vae_files.read(str(folder))


NAME = "decoder.mid_block.attentions.0.to_q.weight"


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: {k: v for k, v in t.items() if k != NAME}, f"{NAME} is missing"),
    (lambda t: {**t, "logvar": np.zeros(1)}, "logvar is unexpected"),
    (lambda t: {**t, NAME: np.zeros((16, 8))}, rf"{NAME} has shape \(16, 8\), not \(16, 16\)"),
    (lambda t: {**t, NAME: np.zeros((16, 16), np.int8)}, f"{NAME} has dtype I8"),
    (lambda t: {**t, NAME: np.full((16, 16), np.nan)}, f"{NAME} holds values that are not finite"),
  ],
)
def test_wrong_tensors_are_named_with_the_file_and_the_remedy(folder, change, message):
  rewrite_tensors(folder, change)
  with pytest.raises(ValueError, match=rf"{TENSORS} .*{message}.* Download it again"):
    vae_files.read(str(folder))


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda x: x[:-1], "damaged, truncated"),
    (lambda x: x[:100], "damaged, truncated"),
    (lambda x: b"", "damaged, truncated"),
    (lambda x: b"\x80\x02" + x, "damaged, truncated"),
    (lambda x: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
  ],
  ids=["last byte", "header", "empty", "pickle", "pointer"],
)
def test_damaged_files_of_tensors_are_refused(folder, damage, message):
  path = folder / TENSORS
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=rf"{TENSORS} cannot be used: .*{message}"):
    vae_files.read(str(folder))


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, params):
  bad = {**params, "quant_conv": {**params["quant_conv"], "bias": np.full(8, np.inf, np.float32)}}
  with pytest.raises(ValueError, match=r"quant_conv.bias is not finite"):
    vae_files.save(str(tmp_path / "vae"), TINY, bad)
  assert not os.path.exists(tmp_path / "vae")


@pytest.mark.parametrize("at", [CONFIG, TENSORS])
def test_a_save_that_is_killed_leaves_no_mixture(folder, params, at, monkeypatch):
  write = vae_files.workdir.write_bytes

  def killed(path, contents):
    if os.path.basename(path) == at:
      raise KeyboardInterrupt
    write(path, contents)

  monkeypatch.setattr(vae_files.workdir, "write_bytes", killed)
  with pytest.raises(KeyboardInterrupt):
    vae_files.save(str(folder), TINY, random_params(1))
  with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
    vae_files.load(str(folder))


def test_a_folder_is_found_by_any_of_its_names(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder.parent))
  monkeypatch.chdir(folder.parent)
  for name in (str(folder), "vae", "./vae/", "~/vae"):
    assert vae_files.find(name) == str(folder)
    assert vae_files.load(name).name == name


def test_weights_are_read_once_unless_the_files_change(folder, params):
  first, second = vae_files.load(str(folder)), vae_files.load(str(folder))
  assert first.params is second.params
  sha256 = vae_files.save(str(folder), TINY, random_params(1))
  third = vae_files.load(str(folder))
  assert third.sha256 == sha256 != first.sha256 and not equal(third.params, params)


def test_what_is_no_folder_of_weights_says_what_is_missing(folder):
  with pytest.raises(FileNotFoundError, match=r"subfolder vae has one: give .*vae'"):
    vae_files.find(str(folder.parent))
  with pytest.raises(FileNotFoundError, match=r"does not exist.*sd-vae-ft-mse.*hf:ORG/REPO"):
    vae_files.find("sd-vae-ft-msee")
  os.remove(folder / TENSORS)
  with pytest.raises(FileNotFoundError, match=f"lacks {TENSORS}"):
    vae_files.find(str(folder))
  with pytest.raises(FileNotFoundError, match=TENSORS):
    vae_files.read(str(folder))


@pytest.mark.parametrize("address", ["hf:repo", "hf:org/", "hf:org/repo@", "hf:org//vae", "hf:"])
def test_malformed_addresses_are_refused(address):
  with pytest.raises(ValueError, match=r"write hf:ORG/REPO\[/SUBFOLDER\]\[@REVISION\]"):
    vae_files.find(address)


def test_addresses_name_repository_folder_and_revision():
  assert download.parse("hf:org/repo") == ("org/repo", "", "")
  assert download.parse("hf:org/repo/a/b@refs/pr/1") == ("org/repo", "a/b", "refs/pr/1")
  assert all(download.parse(a) for a in vae_files.PUBLISHED.values() if a.startswith("hf:"))


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
  """`endpoint(port)` puts the hub there and empties its cache, as $HF_ENDPOINT and $HF_HOME do."""
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)

  def put(port):
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + path)

  return put


@pytest.fixture
def server(folder, endpoint):
  """A hub with org/repo (the weights in vae/), org/gated and org/empty; lists what it was asked."""
  asked = []
  commit = "0123456789abcdef0123456789abcdef01234567"

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
      asked.append((self.command, self.path))
      org, repo, _, revision, path = self.path.lstrip("/").split("/", 4)
      error, file = "", folder.parent / path
      if f"{org}/{repo}" not in ("org/repo", "org/gated", "org/empty"):
        status, error = 404, "RepoNotFound"
      elif repo == "gated":
        status, error = 403, "GatedRepo"
      elif revision not in ("main", "v1", commit):
        status, error = 404, "RevisionNotFound"
      elif repo == "empty" or not file.is_file():
        status, error = 404, "EntryNotFound"
      else:
        status = 200
      contents = b"" if error else file.read_bytes()
      self.send_response(status)
      headers = {"X-Repo-Commit": commit, "ETag": f'"{path.replace("/", "-")}"'}
      headers |= {"X-Error-Code": error} if error else {}
      for key, value in {**headers, "Content-Length": str(len(contents))}.items():
        self.send_header(key, value)
      self.end_headers()
      if self.command == "GET":
        self.wfile.write(contents)

    do_GET = do_HEAD

    def log_message(self, *args):
      pass

  served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
  endpoint(served.server_port)
  yield asked
  served.shutdown()
  served.server_close()


def test_the_hub_is_asked_once_and_then_its_cache(server, endpoint, params, monkeypatch):
  monkeypatch.setitem(vae_files.PUBLISHED, "ours", "hf:org/repo/vae")
  weights = vae_files.load("ours")
  assert weights.name == "ours" and equal(weights.params, params)
  assert any(path.endswith(f"/vae/{TENSORS}") for _, path in server)
  server.clear()
  assert equal(vae_files.load("hf:org/repo/vae").params, params)
  assert not server
  assert equal(vae_files.load("hf:org/repo/vae@v1").params, params)
  assert all("/resolve/" in path for _, path in server) and server
  endpoint(9)
  assert equal(vae_files.load("ours").params, params)


@pytest.mark.parametrize(
  "address, message",
  [
    ("hf:org/gated/vae", r"gated: accept its licence at http.*/org/gated and log in"),
    ("hf:org/none/vae", "shows no repository 'org/none'"),
    ("hf:org/repo/vae@v2", "no revision 'v2'"),
    ("hf:org/repo", rf"lacks {CONFIG} and {TENSORS} in its top folder"),
    ("hf:org/empty/vae", rf"lacks {CONFIG} and {TENSORS} in the folder 'vae'"),
  ],
)
def test_a_hub_that_refuses_says_why(server, address, message):
  with pytest.raises(FileNotFoundError, match=message):
    vae_files.find(address)


@pytest.mark.parametrize("silent", [False, True], ids=["no server", "no answer"])
def test_a_hub_out_of_reach_is_told_soon_with_both_remedies(silent, endpoint, monkeypatch):
  monkeypatch.setattr(download, "TIMEOUT", 0.5)
  with socket.create_server(("127.0.0.1", 0)) as listener:
    endpoint(listener.getsockname()[1] if silent else 9)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"give its path; .*HF_HOME") as caught:
      vae_files.find("sd-vae-ft-mse")
    assert time.monotonic() - start < 5
  assert "hf:stabilityai/sd-vae-ft-mse" in str(caught.value)
  assert ("Timeout" if silent else "Connect") in str(caught.value)

"""The training benchmark: its plain variant computes the same numbers, and it compares fairly."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from stand_ins import at_once

from benchmarks import harness, train_step
from benchmarks.plain import Plain
from configs import methods
from umd import objectives
from umd.devices import flops
from umd.models.autoencoder import AutoEncoder
from umd.models.network import num_tokens
from umd.objectives import Objective
from umd.paths import make_path

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def losses(method, **settings):
  """{class: its loss}, parameters, and a batch of eight."""
  settings = dict(condition="token" if method == "mae" else "adaln", **settings)
  streams = objectives.make_streams(methods.streams_of(method))
  models = [kind("nano/4", (16, 16, 3), **settings) for kind in (AutoEncoder, Plain)]
  made = [at_once(Objective(m, make_path("cosine", 1000), streams, 8)) for m in models]
  images = np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
  batch = {"image": jnp.asarray(images), "label": jnp.arange(8) % 3}
  return made, random_params(models[0]), batch


@pytest.mark.parametrize("method", [pytest.param("umd", marks=pytest.mark.slow), "mae"])
def test_the_plain_variant_has_our_losses_and_gradients(method):
  made, params, batch = losses(method)
  key = jax.random.key(1)
  grads = [jax.jit(jax.value_and_grad(loss, has_aux=True)) for loss in made]
  (ours, terms), ours_grad = grads[0](params, batch, key)
  (plain, plain_terms), plain_grad = grads[1](params, batch, key)
  np.testing.assert_allclose(plain, ours, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain_terms, terms)
  norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(ours_grad))))
  for path, leaf in jax.tree_util.tree_leaves_with_path(ours_grad):
    other = plain_grad
    for part in path:
      other = other[part.key]
    np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=1e-5 * norm, err_msg=str(path))


@pytest.mark.parametrize("method", ["umd", "dit", "maskdit"])
def test_so_it_has_of_the_other_methods(method):
  made, params, batch = losses(method, num_classes=3)
  ours, plain = (jax.jit(loss)(params, batch, jax.random.key(2)) for loss in made)
  np.testing.assert_allclose(plain[0], ours[0], rtol=1e-5)


def test_the_plain_variant_embeds_every_patch_and_computes_the_layers_twice():
  made, params, batch = losses("maskdit")
  given = params, batch, jax.random.key(0)
  ours, plain = (flops.count(loss, *given) for loss in made)
  model = AutoEncoder("nano/4", (16, 16, 3))
  masked_patches, pixels = 8 * num_tokens(model) // 2, 4 * 4 * 3
  assert plain - ours == 2 * masked_patches * pixels * model.shape.width > 0
  ours_step, plain_step = (
    flops.count(jax.value_and_grad(loss, has_aux=True), *given) for loss in made
  )
  # All but the embedding, the head and the time embedding is computed once more.
  assert plain_step - ours_step > 0.9 * ours


def fake(variant):
  row = dict(variant=variant, dtype="float32", gflop_per_step=8.0)
  return train_step.Candidate(None, None, {"label": np.zeros(6)}, row)


def test_candidates_take_turns_and_are_compared_round_by_round():
  order = []
  calls = {name: functools.partial(order.append, name) for name in ("ours", "plain")}
  times = harness.in_turns(calls, repeats=2, inner=3, warm_up=0)
  assert order == (["ours"] * 3 + ["plain"] * 3) * 2
  assert [(len(t.wall), len(t.cores)) for t in times.values()] == [(2, 2), (2, 2)]
  # The machine slows down after the first round: the ratios hardly see it.
  times = [([1.0, 10.0, 2.0], [1.0, 1.0, 1.0]), ([2.0, 30.0, 5.0], [1.5, 1.5, 1.5])]
  both = [fake("ours"), fake("plain")]
  ours, plain = train_step.summarise(both, [harness.Times(*t) for t in times])
  assert ours["times_plain_cores"] == 1.5
  assert (ours["times_plain"], ours["times_plain_range"]) == (2.5, [2.0, 3.0])
  assert plain["times_plain"] == 1.0 and ours["images_per_second"] == 3.0
  assert ours["gflops_per_second"] == pytest.approx(8.0 / 2.0 / jax.device_count())
  assert ours["mfu"] is None


def test_without_the_plain_variant_there_is_no_ratio():
  (row,) = train_step.summarise([fake("ours")], [harness.Times([2.0], [2.0])])
  assert "times_plain" not in row


def test_the_command_prints_a_table_and_appends_json_lines(tmp_path, capsys):
  out = tmp_path / "rows.jsonl"
  flags = ["--cases", "nano_16", "--methods", "mae", "--repeats", "2", "--out", str(out)]
  train_step.main(flags)
  ours, plain = (json.loads(line) for line in out.read_text().splitlines())
  assert (ours["variant"], plain["variant"]) == ("ours", "plain") and plain["times_plain"] == 1
  assert ours["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)
  assert ours["gflop_per_step"] == plain["gflop_per_step"] > 0
  assert len(ours["seconds"]) == 2 and min(ours["seconds"]) > 0
  assert ours["temporaries_mib"] > 0 and ours["compile_seconds"] > 0 and ours["load"] >= 0
  head, *rows = capsys.readouterr().out.splitlines()
  assert "x plain" in head and len(rows) == 2


@pytest.mark.parametrize(
  "flags", [["--cases", "huge"], ["--repeats", "0"], ["--variants", "fast"], ["--dtypes", "fp8"]]
)
def test_bad_flags_are_told_before_anything_is_compiled(flags, capsys):
  with pytest.raises(SystemExit) as ended:
    train_step.main(flags)
  assert ended.value.code == 2 and flags[0] in capsys.readouterr().err


def test_the_cases_are_those_that_the_public_code_was_measured_on():
  shapes = {"ti4_32": (192, 12, 4, 3, 64), "s4_64": (384, 12, 4, 6, 256)}
  for case, (width, depth, decoder_depth, heads, tokens) in shapes.items():
    variant, side, batch = train_step.CASES[case]
    model = AutoEncoder(variant, (side, side, 3))
    s = model.shape
    assert (s.width, s.depth, s.decoder_depth, s.heads, num_tokens(model)) == (
      width,
      depth,
      decoder_depth,
      heads,
      tokens,
    )
    assert batch * num_tokens(model) == 4096


def test_it_runs_where_tensorflow_is_not_installed():
  code = (
    "import sys\n"
    "class Absent:\n"
    "  def find_spec(self, name, *_):\n"
    "    if name.split('.')[0] == 'tensorflow': raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, Absent())\n"
    "from benchmarks import train_step\n"
    "train_step.parts('nano_16', 'mae', 'float32', 'plain')\n"
  )
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr

"""The benchmark of samplers: what it compares is the same, and it says what it cannot measure."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_runs
import pytest

from benchmarks import sampler, sampler_quality
from umd import samplers
from umd.paths import make_path
from umd.samplers.keys import example_keys
from umd.trained.inference import Inference


@pytest.mark.parametrize("name, cfg_scale", [("ddim", 1.0), ("dpmpp_2m", 2.5)])
def test_the_plain_way_draws_the_same_images(nano, name, cfg_scale):
  model, params = nano(num_classes=10)
  inference = Inference(model, make_path("cosine", 20))
  sampling = samplers.Sampling(sampler=name, steps=3, cfg_scale=cfg_scale)
  given = params, example_keys(0, jnp.arange(2)), jnp.array([3, 7])
  ours = jax.jit(lambda *given: inference.sample(*given, sampling))(*given)
  np.testing.assert_allclose(sampler.plain(inference, sampling)(*given), ours, atol=1e-3)
  assert np.std(ours) > 0.1


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_no_sampler_is_given_more_evaluations_than_are_on_its_row(name):
  for wanted in (1, 2, 5, 10, 125):
    steps = sampler_quality.steps_for(name, wanted)
    evaluations = samplers.SOLVERS[name].evaluations
    assert evaluations(steps) <= wanted < evaluations(steps + 1)


def test_samplers_to_compare_are_named_with_their_spacing():
  assert list(sampler_quality.parse(["ddim", "ab2:karras"])) == [
    *(("ddim", "uniform"), ("ab2", "karras"))
  ]
  assert ("dpmpp_2m", "logsnr") in list(sampler_quality.parse(None))
  for wrong in ("euler", "ddim:log"):
    with pytest.raises(ValueError, match=f"--samplers='{wrong}' must be SAMPLER or"):
      list(sampler_quality.parse([wrong]))


@pytest.mark.slow
def test_both_benchmarks_write_a_row_for_each_line_they_print(tmp_path, capsys):
  out = str(tmp_path / "rows.jsonl")
  small = "--variant nano/4 --size 8 --batch_size 2 --steps 2 --repeats 1 --cfg_scale 1 2"
  sampler.main([*small.split(), "--out", out])
  run = pretrained_runs.make(tmp_path / "run", pretrained_runs.config(), steps=(7,))
  few = "--num 20 --repeats 1 --seeds 2 --evaluations 2 5 --reference 20 "
  few += "--samplers ddim dpmpp_2m:logsnr"
  sampler_quality.main(["--workdir", run, *few.split(), "--out", out])
  with open(out, encoding="utf-8") as f:
    rows = [json.loads(line) for line in f]
  speed, quality = rows[:4], rows[4:]
  assert [(r["way"], r["cfg_scale"]) for r in speed] == [
    *(("umd", 1), ("plain", 1), ("umd", 2), ("plain", 2))
  ]
  assert all(r["times_as_fast"] == 1 for r in speed if r["way"] == "plain")
  assert len(quality) == 2 * 2 * 2 and os.path.exists(out)  # Guidance, samplers, numbers.
  assert all(len(r["frechet"]) == 2 and np.isfinite(r["error"]) for r in quality)
  by = {(r["cfg_scale"], r["sampler"], r["evaluations"]): r["error"] for r in quality}
  assert all(by[scale, "ddim", 5] < by[scale, "ddim", 2] for scale in (1, 2))
  assert len(capsys.readouterr().out.splitlines()) == 5 + 9

"""What a compiler says of a program, read right; and what it says of our step for a TPU."""

import json
import math
import os
import random
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tools.fit import compile as aot
from tools.fit import compile as hlo
from umd.devices import chips

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GIB = 2**30

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %copy.1 = f32[8,4]{1,0} copy(%p), backend_config={"estimated_cycles":"999"}
}

%inner.cond (c: (s32[])) -> pred[] {
  %c = (s32[]{:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%inner.body (d: (s32[])) -> (s32[]) {
  %d = (s32[]{:T(128)}) parameter(0)
  %g = bf16[2,8,4]{2,1,0:T(8,128)(2,1)S(1)} fusion(%d), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"10","iteration_bounds":["1"]}}
  %all-reduce.1 = (bf16[10]{0}, /*index=1*/f32[6,2]{1,0}) all-reduce(%g, %g), channel_id=1, \
replica_groups=mesh['x'=4] {'x'}, to_apply=%add, metadata={op_name="jit(step)/while(body)"}
  ROOT %t = (s32[]) tuple(%d)
}

%outer.cond (e: (s32[])) -> pred[] {
  %e = (s32[]) parameter(0)
  ROOT %any = pred[] custom-call(%e), custom_call_target="who_knows"
}

%outer.body (f: (s32[])) -> (s32[]) {
  %f = (s32[]) parameter(0)
  %w = (s32[]) while(%f), condition=%inner.cond, body=%inner.body
  ROOT %u = (s32[]) tuple(%w)
}

%all-reduce-scatter (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  %ar = f32[8]{0} all-reduce(%q), to_apply=%add
  ROOT %cut = f32[2]{0} slice(%ar), slice={[0:2]}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %outer = (s32[]) while(%x), condition=%outer.cond, body=%outer.body, \
backend_config={"known_trip_count":{"n":"5"},"known_induction_variable":{"tuple_index":"0"}}
  %endless = (s32[]) while(%x), condition=%outer.cond, body=%outer.body
  %fusion.9 = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %rs = f32[2]{0} reduce-scatter(%x), dimensions={0}, to_apply=%add
  %start = (f32[8]{0}, f32[32]{0}, u32[]) all-gather-start(%x), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %out = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"1000"}
}
"""


@pytest.fixture(scope="module")
def program():
  return hlo.parse(TEXT)


def test_loops_count_as_often_as_they_run(program):
  # 5 runs of a loop of 3, and one of it in a loop of unknown length.
  assert program.cycles() == 1000 + (5 + 1) * 3 * 10
  assert program.unknown_loops == 1
  assert program.kernels() == 1


def test_collectives_are_counted_with_the_bytes_of_the_whole(program):
  assert program.collectives() == {
    "all-reduce": (18, 18 * (10 * 2 + 12 * 4)),
    "reduce-scatter": (2, 2 * 8 * 4),
    "all-gather": (1, 32 * 4),
  }


def test_arrays_are_those_of_all_results(program):
  assert {("bf16", (2, 8, 4)), ("f32", (6, 2)), ("s32", ()), ("pred", ())} <= program.arrays()


@pytest.mark.parametrize("dtype, bits", [("pred", 8), ("s4", 4), ("bf16", 16), ("f8e4m3fn", 8)])
def test_types_have_their_sizes(dtype, bits):
  assert hlo.bits(dtype) == bits


def test_other_text_is_an_error():
  with pytest.raises(ValueError, match="not the text of a compiled XLA module"):
    hlo.parse("module @jit_step {\n}")


def test_a_compiled_loop_of_this_backend_is_read(program):
  def step(x):
    return jax.lax.scan(lambda x, _: (jnp.sin(x) @ x, None), x, None, 7)[0]

  mesh = jax.sharding.Mesh(jax.devices(), "d")
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
  x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=rows)
  found = aot.compile_step(jax.jit(step, out_shardings=rows).lower(x))
  assert found.arguments == 16 * 16 * 4 / 4 and found.peak > 2 * found.arguments
  assert found.program.unknown_loops == 0 and found.program.cycles() is None
  # Each turn needs all rows of x once.
  assert found.program.collectives() == {"all-gather": (7, 7 * 16 * 16 * 4)}


OUT = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
  "required for HLO temporaries (54.28G) exceeds available HBM (15.75G). HLO module: jit_step."
)
USED = (
  "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
  "Used 49.71G of 15.75G hbm. Exceeded hbm capacity by 33.96G."
)


@pytest.mark.parametrize("message, needed, whole", [(OUT, 54.28, False), (USED, 49.71, True)])
def test_what_does_not_fit_is_told_in_bytes(message, needed, whole):
  found = aot.out_of_memory(message)
  assert found == aot.OutOfMemory(int(needed * GIB), int(15.75 * GIB), whole)
  assert aot.out_of_memory(message.replace("RESOURCE_EXHAUSTED", "INTERNAL")) is None
  assert aot.out_of_memory("RESOURCE_EXHAUSTED: too many open files") is None


def test_only_what_is_about_memory_is_an_answer():
  class Failing:
    def __init__(self, message):
      self.message = message

    def compile(self):
      raise jax.errors.JaxRuntimeError(self.message)

  assert aot.compile_step(Failing(OUT)).capacity == int(15.75 * GIB)
  with pytest.raises(jax.errors.JaxRuntimeError, match="no such op"):
    aot.compile_step(Failing("INTERNAL: no such op"))


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_batch_fits_and_little_more_would(seed):
  draw = random.Random(seed)
  fixed, slope, unit = draw.uniform(0, 8), draw.uniform(0.001, 0.5), draw.choice([1, 4, 16])
  calls = []

  def peak(batch):
    assert batch > 0 and batch % unit == 0
    calls.append(batch)
    return int((fixed + slope * batch + 0.3 * math.sin(batch)) * GIB)  # Nearly a line.

  found = aot.largest(peak, 16 * GIB, draw.choice([1, 5, 64]) * unit, unit, tries=12)
  assert len(calls) == len(set(calls)) <= 12
  if not found:
    assert peak(unit) > 16 * GIB
  else:
    assert found in calls and peak(found) <= 16 * GIB
    more = found + max(unit, found // 8) + math.ceil(0.6 / slope / unit) * unit
    assert fixed + slope * more > 15.7


def test_a_batch_that_never_fits_is_none():
  assert aot.largest(lambda batch: GIB, GIB - 1, 64, 8) == 0


def test_the_range_of_the_speed_is_arithmetic(program):
  best = program.cycles() / 1.5e9
  sent = 2 * 18 * 68 + 2 * 32 + 128
  found = aot.speed(program, "TPU v5 lite", 4, 1e6, "bfloat16")
  assert found.seconds[1] == pytest.approx(best)
  assert found.seconds[0] == pytest.approx(2 * best + sent / 200e9)
  assert found.mfu[1] == pytest.approx(1e6 / (best * 4 * 197e12))
  assert found.mfu[0] < found.mfu[1] / 2
  assert aot.speed(program, "NVIDIA L4", 4, 1e6, "bfloat16") is None


def test_every_clock_is_of_a_known_chip_whose_peak_it_explains():
  for kind, clock in aot.CLOCKS.items():
    # Multiplications and additions of 128 x 128 units: how many units makes a power of two.
    units = chips.peak_flops(kind, "bfloat16") / (2 * 128**2 * clock.rate)
    assert units == pytest.approx(2 ** round(math.log2(units)), rel=0.05), kind


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(aot, "library", lambda: "")
  with pytest.raises(ValueError, match=r"'v5e:2x2' needs the TPU's compiler.*bash run.sh fit"):
    aot.tpu_devices("v5e:2x2")


# Rows of the clean and of the noised stream: of a chip, of all eight. No product of those of a chip
# with a number of tokens (3, 4, 7, 10, 14, 16, 17) is one of all.
CHIPS, BATCH, CLEAN, NOISED = 8, 160, (5, 40), (15, 120)
CONFIG = (
  f"configs/quickstart.py:variant=nano/2,batch_size={BATCH},adaln=true,dtype=bfloat16,"
  "no_noise_prob=0.25,mask_ratio_no_noise=0.8125,scan=true,remat=full"
)
needs_libtpu = pytest.mark.skipif(
  not aot.library(), reason="libtpu is not installed: bash run.sh fit --help"
)


def step_for_tpu(folder, arguments):
  """(report, program) of the trainer's step for eight TPU chips, by the program a user starts."""
  files = ["--json", str(folder / "fit.json"), "--save_hlo", str(folder / "step.hlo")]
  config = ["--config", CONFIG + arguments, "--stage", "pretrain"]
  command = [sys.executable, "-m", "tools.fit", *config, "--topology", "v5e:2x4", *files]
  environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  report = json.loads((folder / "fit.json").read_text())["pretrain"]
  return report, hlo.parse((folder / "step.hlo").read_text())


@pytest.fixture(scope="module")
def tpu_step(tmp_path_factory):
  """With parameters on every chip."""
  return step_for_tpu(tmp_path_factory.mktemp("tpu"), "")


@pytest.fixture(scope="module")
def tpu_step_in_parts(tmp_path_factory):
  """With parameters that all chips share."""
  return step_for_tpu(tmp_path_factory.mktemp("tpu"), ",fsdp=0")


@needs_libtpu
def test_the_step_for_a_tpu_is_bounded_in_memory(tpu_step):
  report, _ = tpu_step
  memory = report["memory"]
  assert report["device_kind"] == "TPU v5 lite" and report["devices"] == CHIPS
  assert report["fits"] and report["capacity"] == 16 * GIB * 63 // 64
  assert (
    memory["average"] == memory["parameters"] and memory["batch"] == BATCH * (64 + 1) * 4 // CHIPS
  )
  # What is kept is padded to tiles: a small model's vectors grow a few times.
  kept = sum(v for k, v in memory.items() if k not in ("temporaries", "batch"))
  assert kept <= report["peak"] - memory["temporaries"] <= 8 * kept
  assert memory["temporaries"] < 32 * 2**20


@needs_libtpu
def test_no_chip_holds_the_whole_batch_or_a_whole_stream(tpu_step):
  _, program = tpu_step
  assert [a for a in program.arrays() if a[1] and a[1][0] in (BATCH, CLEAN[1], NOISED[1])] == []
  # They are there in a chip's share: else the test looks for the wrong thing.
  for rows, _ in (CLEAN, NOISED):
    assert any(a[1][:1] == (rows,) and len(a[1]) == 3 for a in program.arrays())


@needs_libtpu
def test_chips_exchange_gradients_and_scalars_only(tpu_step):
  report, _ = tpu_step
  assert set(report["collectives"]) == {"all-reduce"}
  number = report["memory"]["parameters"] / 4
  size = report["collectives"]["all-reduce"][1]
  # Both streams' summed first; in bfloat16, those of norms and outside of layers in float32.
  assert 2 * number <= size <= 2.75 * number


@needs_libtpu
def test_shared_parameters_are_gathered_and_no_activation_is(tpu_step, tpu_step_in_parts):
  (whole, _), (report, program) = tpu_step, tpu_step_in_parts
  # Gradients are scattered by permutes, in a ring; small leaves' are reduced as before.
  kinds = {"all-gather", "collective-permute", "reduce-scatter", "all-reduce"}
  assert "all-gather" in report["collectives"] and set(report["collectives"]) <= kinds
  number = whole["memory"]["parameters"] / 4
  # In bfloat16 and both ways; the compiler spreads some of them over several of its fusions.
  assert report["collectives"]["all-gather"][1] <= 6 * 4 * number
  assert report["memory"]["parameters"] < 0.6 * whole["memory"]["parameters"]
  assert [a for a in program.arrays() if a[1] and a[1][0] in (BATCH, CLEAN[1], NOISED[1])] == []


@needs_libtpu
def test_loops_and_estimates_are_found(tpu_step):
  report, program = tpu_step
  assert report["unknown_loops"] == 0 and report["kernels"] == 0
  loops = [i for i, _, _ in program.walk() if i.opcode == "while"]
  assert {program.trips(i) for i in loops} == {(2, True)}  # nano has two layers
  fast, slow = report["seconds"][1], report["seconds"][0]
  assert 2 * fast < slow and report["cycles"] == pytest.approx(fast * 1.5e9)
  assert re.search("[1-9]", str(report["flops"]))

"""A run that is killed again and again ends with the numbers of one that never was."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from xla_flags import QUICK

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
PATIENCE = 600  # Seconds for a start, on a machine that has much else to do.
# Evaluations every 8 steps, by two evaluators; logs every 3, so that steps between two of them are
# under way when a checkpoint is not due.
TINY = f"""
from configs import quickstart

def get_config(arg=None):
  config = quickstart.get_config("variant=nano/2,steps={STEPS},batch_size=32")
  once = config.pretrain.evals.reconstruction.copy_and_resolve_references()
  once.every, once.data.split = 8, "test[:64]"
  config.pretrain.evals = {{"one": once, "two": once}}
  config.pretrain.summary, config.pretrain.log_every = (), 3
  config.pretrain.checkpoint.every = 4
  config.pretrain.wandb.mode = arg or "disabled"
  config.stages = ("pretrain",)
  return config
"""
EVALUATED = 8


class Run:
  """Starts of one run in one workdir."""

  def __init__(self, home: Path, name: str):
    self.home, self.workdir, self.folder = home, home / name, home / name / "pretrain"
    self.starts = 0
    (home / "tiny.py").write_text(TINY)

  def start(self, wandb: str = "") -> "Start":
    self.starts += 1
    # One device, and as many threads as the machine has cores: conftest's settings are for four.
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"}
    environment |= {
      "XLA_FLAGS": QUICK,
      "JAX_COMPILATION_CACHE_DIR": str(self.home / "compiled"),  # for all starts
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "WANDB_SILENT": "true",
    }
    config = str(self.home / "tiny.py") + (f":{wandb}" if wandb else "")
    command = [sys.executable, "-m", "train", "--config", config, "--workdir", str(self.workdir)]
    output = self.home / f"{self.workdir.name}_{self.starts}.txt"
    with output.open("w") as out:
      process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    return Start(self, process, output)

  def records(self) -> list[dict]:
    """Lines of the log, all of them whole, without what the clock makes of them."""
    text = (self.folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.splitlines()]
    clocks = ("goodput/", "input_wait")
    timed = lambda name: name.endswith("_per_second") or name.startswith(clocks)
    return [{k: v for k, v in line.items() if not timed(k)} for line in lines]

  def state(self) -> dict:
    """{leaf: array} of everything that the last checkpoint holds."""
    with ocp.PyTreeCheckpointer() as checkpointer:
      state = checkpointer.restore(self.folder / "checkpoints" / str(STEPS) / "state")
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in paths}

  def pictures(self) -> dict[str, bytes]:
    return {
      str(f.relative_to(self.folder)): f.read_bytes() for f in self.folder.glob("images/**/*.png")
    }

  def is_finished(self) -> bool:
    return (self.folder / "summary.json").exists()


class Start:
  """One of them, a process."""

  def __init__(self, run: Run, process: subprocess.Popen, output: Path):
    self.run, self.process, self.output = run, process, output

  def told(self) -> str:
    return self.output.read_text()

  def steps(self) -> list[int]:
    """Those told so far, each at a log or an evaluation."""
    return [int(step) for step in re.findall(r"\] step (\d+)/", self.told())]

  def saving(self) -> bool:
    names = os.listdir(self.run.folder / "checkpoints") if self.steps() else []
    return any("tmp" in name for name in names)

  def evaluating(self) -> bool:
    steps = [step for step in self.steps() if step % EVALUATED == 0]
    return bool(steps) and f"step {steps[-1]}  two" not in self.told()

  def stop(self, number: int, when) -> int:
    """Sends the signal as soon as `when()` is true; the exit status."""
    until = time.monotonic() + PATIENCE
    while not when() and self.process.poll() is None and time.monotonic() < until:
      time.sleep(0.003)
    self.process.send_signal(number)
    return self.end()

  def end(self) -> int:
    try:
      return self.process.wait(PATIENCE)
    finally:
      self.process.kill()


def assert_same(whole: Run, broken: Run, story: str):
  """Parameters, averages, optimiser, metrics and pictures, bit by bit."""
  want, got = whole.state(), broken.state()
  assert want.keys() == got.keys()
  assert any("opt_state" in leaf for leaf in want) and any("ema" in leaf for leaf in want)
  for leaf in want:
    assert np.array_equal(want[leaf], got[leaf]), f"{leaf}\n{story}"
  assert whole.records() == broken.records(), story
  assert whole.pictures() == broken.pictures(), story
  assert not list(broken.workdir.glob(".lock_*")), story


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
  """A run that nobody disturbs."""
  run = Run(tmp_path_factory.mktemp("kills"), "whole")
  start = run.start()
  assert start.end() == 0, start.told()
  return run


def test_a_run_killed_in_every_kind_of_moment_continues_bitwise(whole):
  run = Run(whole.home, "broken")
  first = run.start("offline")
  assert first.stop(signal.SIGKILL, lambda: any(s > 4 for s in first.steps())) == -signal.SIGKILL
  asked = run.start()
  # Not a step at which a checkpoint or a log is due, as long as the signal comes in time.
  assert asked.stop(signal.SIGTERM, lambda: any(s > 8 for s in asked.steps())) == 75, asked.told()
  told = re.search(r"stopped at step (\d+)/24 by SIGTERM, saved", asked.told())
  assert told and (run.folder / "checkpoints" / told[1]).is_dir(), asked.told()
  assert not run.is_finished()
  saving = run.start()
  assert f"resumed at step {told[1]}" in wait_for(saving, "resumed")
  assert saving.stop(signal.SIGKILL, saving.saving) == -signal.SIGKILL
  evaluating = run.start()
  assert evaluating.stop(signal.SIGKILL, evaluating.evaluating) == -signal.SIGKILL
  assert not run.is_finished(), "killed too late to tell"
  last = run.start("offline")
  assert last.end() == 0, last.told()
  assert_same(whole, run, "".join(f.read_text() for f in sorted(whole.home.glob("broken_*.txt"))))
  # Both starts with Weights & Biases belong to one run of theirs.
  runs = [f.name.rsplit("-", 1)[1] for f in (run.folder / "wandb").glob("offline-run-*")]
  assert len(runs) == 2 and set(runs) == {(run.folder / "wandb_id").read_text()}


def wait_for(start: Start, word: str) -> str:
  until = time.monotonic() + PATIENCE
  while word not in start.told() and time.monotonic() < until and start.process.poll() is None:
    time.sleep(0.02)
  return start.told()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_stopped_twenty_times_continues_bitwise(whole, seed):
  """Twenty signals in sum that hit, one of three SIGTERM, at any moment of a start; 6 minutes."""
  rng, run, hits = random.Random(seed), Run(whole.home, f"broken{seed}"), 0
  story = []
  while hits < 10:
    start = run.start()
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    kind, after = rng.choice(["any", "step", "saving", "evaluating"]), rng.random()
    began = time.monotonic()
    moments = {
      "any": lambda after=after, began=began: time.monotonic() - began > 15 * after,
      "step": lambda after=after, start=start: len(start.steps()) > 3 * after,
      "saving": start.saving,
      "evaluating": start.evaluating,
    }
    status = start.stop(number, moments[kind])
    story.append(f"{signal.Signals(number).name} ({kind}) -> {status}\n{start.told()}")
    # Before its handlers are there and after they are gone, a SIGTERM ends Python as usual.
    assert status in (0, -number, *[75] * (number == signal.SIGTERM)), story[-1]
    hits += status != 0
    if run.is_finished():  # It got to the end: another one begins, and is judged as well.
      assert_same(whole, run, "".join(story))
      run = Run(whole.home, f"broken{seed}_{hits}")
  if not run.is_finished():
    start = run.start()
    assert start.end() == 0, start.told()
  assert_same(whole, run, "".join(story))

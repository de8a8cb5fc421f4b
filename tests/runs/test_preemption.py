"""Signals: what ends at once, what is saved first, and that several processes stop at one step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from stand_ins import free_port

from trainers import logs, loop
from umd.runs import preemption

ROOT = Path(__file__).resolve().parents[2]
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
PROGRAM = """
import os, sys, time
from umd.runs import preemption

preemption.install()

def ready(text):
  print(text, flush=True)

def start():
  ready("ready")
  time.sleep(60)

def loop(steps=10**6):
  with preemption.protect():
    for step in range(steps):
      if preemption.requested():
        ready("saving")
        time.sleep(0.5)
        ready("saved")
        raise preemption.preempted()
      if not step:
        ready("ready")
      time.sleep(0.001)

def after():
  loop(5)
  time.sleep(60)

try:
  globals()[sys.argv[1]]()
finally:
  os.write(1, b"released\\n")
"""


class Program:
  """PROGRAM, which runs the function of that name and has said "ready"."""

  def __init__(self, function: str):
    command = [sys.executable, "-c", PROGRAM, function]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    self.process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert self.process.stdout.readline() == "ready\n"
    time.sleep(0.1)

  def send(self, number):
    self.process.send_signal(number)

  def wait_for(self, line):
    assert self.process.stdout.readline() == line + "\n"

  def end(self) -> tuple[int, str, str]:
    """(status, the rest of the output, errors)."""
    try:
      out, err = self.process.communicate(timeout=30)
      return self.process.returncode, out, err
    finally:
      self.process.kill()


@pytest.mark.parametrize(
  ("function", "number", "status"),
  [("start", TERM, 75), ("start", USR1, 75), ("start", INT, 130), ("after", TERM, 75)],
)
def test_where_nothing_can_be_lost_a_signal_ends_the_run_at_once(function, number, status):
  program = Program(function)
  program.send(number)
  code, out, err = program.end()
  assert (code, out) == (status, "released\n")
  assert err == f"{signal.Signals(number).name}: the run ends; nothing is lost\n"


@pytest.mark.parametrize(("number", "status"), [(TERM, 75), (USR1, 75), (INT, 130)])
def test_in_its_loop_a_run_saves_first(number, status):
  program = Program("loop")
  program.send(number)
  assert program.end()[:2] == (status, "saving\nsaved\nreleased\n")


def test_the_second_ctrl_c_ends_the_run_at_once():
  program = Program("loop")
  program.send(INT)
  program.wait_for("saving")
  program.send(INT)
  assert program.end()[:2] == (-INT, "")


@pytest.mark.parametrize("again", [TERM, INT])
def test_other_signals_do_not_break_the_save_off(again):
  program = Program("loop")
  program.send(TERM)
  program.wait_for("saving")
  program.send(again)
  assert program.end()[:2] == (75, "saved\nreleased\n")


def test_signals_are_given_back_and_without_them_nothing_is_requested():
  before = [signal.getsignal(s) for s in preemption.SIGNALS]
  preemption.install()
  assert [signal.getsignal(s) for s in preemption.SIGNALS] != before
  preemption.uninstall()
  assert [signal.getsignal(s) for s in preemption.SIGNALS] == before
  with preemption.protect():
    assert not preemption.requested()
  preemption.check()


PEER = """
import sys, time
from umd.devices import distributed; from umd.runs import preemption

preemption.install()
rank = int(sys.argv[2])
distributed.start(sys.argv[1], 2, rank, stop_together=True)
with preemption.protect():
  for step in range(10**6):
    if preemption.requested():
      assert preemption.requested()  # It may be asked again, e.g. between two stages.
      print("stopped", step, flush=True)
      raise preemption.preempted()
    if step == 3:
      print("ready", flush=True)
    time.sleep(0.001 * (1 + rank))
"""


@pytest.mark.parametrize(("number", "status"), [(TERM, 75), (INT, 130)])
def test_two_processes_stop_at_the_same_step_though_one_has_got_the_signal(number, status):
  address = f"127.0.0.1:{free_port()}"
  start = lambda rank: subprocess.Popen(
    [sys.executable, "-c", PEER, address, str(rank)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "XLA_FLAGS": ""},
  )
  peers = [start(rank) for rank in range(2)]
  try:
    for peer in peers:
      while peer.stdout.readline() not in ("ready\n", ""):
        pass
    peers[1].send_signal(number)
    outs = [peer.communicate(timeout=60) for peer in peers]
  finally:
    for peer in peers:
      peer.kill()
  assert [peer.returncode for peer in peers] == [75, status], outs
  assert outs[0][0] == outs[1][0] and outs[0][0].startswith("stopped")


def test_the_metrics_between_two_logs_survive_bit_by_bit():
  rng, whole, broken = np.random.default_rng(0), logs.StepMetrics(), logs.StepMetrics()
  for step in range(1, 6):
    values = {"loss": np.float32(rng.standard_normal()), "lr": np.float32(rng.random())}
    whole.add(step, values)
    broken.add(step, values)
    if step == 3:
      kept = broken.to_json()
      broken = logs.StepMetrics()
      broken.from_json(kept)
  assert whole.drain() == broken.drain()


def test_what_an_earlier_start_has_evaluated_is_not_evaluated_again(tmp_path):
  lines = ['{"step": 8, "loss": 1.0}', '{"step": 4, "b/x": 1.0}', '{"step": 8, "a/x": 1.0}']
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "c/x"')
  assert loop.unevaluated(["a", "b", "c"], str(tmp_path), 8) == ["b", "c"]
  assert loop.unevaluated([], str(tmp_path), 8) == []

"""Signals: what ends at once, what is saved first, and that several processes stop at one step."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from trainers import logs, loop
from umd.runs import preemption

ROOT = Path(__file__).resolve().parents[2]
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
PROGRAM = """
import asyncio, hashlib, os, sys, time
from umd.runs import preemption

preemption.install()

def ready(text):
  print(text, flush=True)

def start():
  ready("ready")
  time.sleep(60)

def held_up():  # As by a compilation: Python does not get to run for minutes.
  ready("ready")
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

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

def borrowed():  # Orbax's event loop takes the place to which C writes signals.
  import uvloop
  async def later():
    os.kill(os.getpid(), 15)
    await asyncio.sleep(0.1)
  with preemption.protect():
    preemption.requested()
    ready("ready")
    uvloop.new_event_loop().run_until_complete(later())
    time.sleep(0.1)
    if preemption.requested():
      ready("saved")
      raise preemption.preempted()

with preemption.cleanup(lambda: os.write(1, b"released\\n")):
  globals()[sys.argv[1]]()
"""


class Program:
  """PROGRAM, told which function to run; it has said "ready"."""

  def __init__(self, function: str, word="ready"):
    command = [sys.executable, "-c", PROGRAM, function]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    self.process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert self.process.stdout.readline() == "ready\n"

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


@pytest.mark.parametrize("function", ["start", "held_up", "after"])
@pytest.mark.parametrize(("number", "status"), [(TERM, 75), (USR1, 75), (INT, 130)])
def test_where_nothing_can_be_lost_a_signal_ends_the_run_at_once(function, number, status):
  program = Program(function)
  time.sleep(0.1 if function == "after" else 0.0)
  program.send(number)
  code, out, err = program.end()
  assert (code, out) == (status, "released\n")
  assert err == f"{signal.Signals(number).name}: the run ends; nothing is lost\n"


@pytest.mark.parametrize(("number", "status"), [(TERM, 75), (USR1, 75), (INT, 130)])
def test_in_its_loop_a_run_saves_first(number, status):
  program = Program("loop")
  time.sleep(0.05)
  program.send(number)
  assert program.end()[:2] == (status, "saving\nsaved\nreleased\n")


def test_the_second_ctrl_c_ends_the_run_at_once():
  program = Program("loop")
  time.sleep(0.05)
  program.send(INT)
  program.wait_for("saving")
  program.send(INT)
  assert program.end()[:2] == (130, "released\n")


@pytest.mark.parametrize("again", [TERM, INT])
def test_other_signals_do_not_break_the_save_off(again):
  program = Program("loop")
  time.sleep(0.05)
  program.send(TERM)
  program.wait_for("saving")
  program.send(again)
  assert program.end()[:2] == (75, "saved\nreleased\n")


def test_no_signal_is_lost_while_an_event_loop_runs():
  pytest.importorskip("uvloop")
  assert Program("borrowed").end()[:2] == (75, "saved\nreleased\n")


def test_without_signals_taken_nothing_is_requested():
  with preemption.protect():
    assert not preemption.requested() and preemption.reason() == ""
  preemption.check()


def test_signals_are_given_back():
  before = [signal.getsignal(s) for s in preemption.SIGNALS]
  preemption.install()
  assert [signal.getsignal(s) for s in preemption.SIGNALS] != before
  preemption.uninstall()
  assert [signal.getsignal(s) for s in preemption.SIGNALS] == before
  assert signal.set_wakeup_fd(-1) == -1


class Memory:
  """What JAX's store does, for processes that are threads."""

  def __init__(self, values, rank, size):
    self.values, self.rank, self.size = values, rank, size

  def get(self, key):
    return self.values.get(key)

  def put_once(self, key, value):
    self.values.setdefault(key, value)

  def wait(self, key, seconds):
    until = time.monotonic() + seconds
    while key not in self.values:
      if time.monotonic() > until:
        raise RuntimeError("DEADLINE_EXCEEDED")
      time.sleep(0.001)
    return self.values[key]

  def last_out(self, key, seconds):
    pass


class Left(BaseException):
  """In place of the end of a process."""


class Watch(preemption.Watch):
  left = None

  def leave(self, code):
    self.left = code
    raise Left

  def _run(self):
    with contextlib.suppress(Left):
      super()._run()


def processes(monkeypatch, size):
  """Watches that share a store."""
  monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
  monkeypatch.setattr(preemption, "PATIENCE_SECONDS", 10)
  values, watches = {}, [Watch() for _ in range(size)]
  for rank, watch in enumerate(watches):
    watch.start()
    watch.join(Memory(values, rank, size))
  return watches


@pytest.mark.parametrize("seed", range(8))
def test_all_processes_stop_at_the_same_step(monkeypatch, seed):
  """Wherever the signals come, and however far one runs ahead of another."""
  rng = random.Random(seed)
  watches, stopped = processes(monkeypatch, 3), {}
  steps = [0] * len(watches)

  def train(rank):
    pace = random.Random((seed, rank).__repr__())
    with watches[rank].protect():
      for step in range(1, 100_000):
        steps[rank] = step
        if watches[rank].requested():
          stopped[rank] = step
          return
        # On the devices, a step waits for that of all others; the hosts run up to 20 ahead.
        while step - min(steps) >= 20 and not stopped:
          time.sleep(0)
        time.sleep(pace.random() * 0.002)

  threads = [threading.Thread(target=train, args=(rank,)) for rank in range(len(watches))]
  for thread in threads:
    thread.start()
  time.sleep(0.02 + 0.1 * rng.random())
  for rank in rng.sample(range(3), rng.choice([1, 1, 3])):
    watches[rank].handle(rng.choice([TERM, USR1]))
  for thread in threads:
    thread.join(20)
  for watch in watches:
    watch.stop()
  assert len(stopped) == 3 and len(set(stopped.values())) == 1, (stopped, steps)
  assert 1 < stopped[0] < 10_000
  assert len({watch.signal for watch in watches}) == 1


def test_all_leave_at_once_if_one_has_not_begun(monkeypatch):
  watches = processes(monkeypatch, 3)
  with watches[0].protect(), watches[1].protect():
    for watch in watches[:2]:
      assert not watch.requested()
    watches[0].handle(INT)
    until = time.monotonic() + 20
    while any(watch.left is None for watch in watches) and time.monotonic() < until:
      time.sleep(0.01)
  assert [watch.left for watch in watches] == [130] * 3


PEER = """
import sys, time
from umd.devices import distributed; from umd.runs import preemption

preemption.install()
rank = int(sys.argv[2])
distributed.start(sys.argv[1], 2, rank)
preemption.join()
with preemption.protect():
  for step in range(10**6):
    if preemption.requested():
      print("stopped", step, flush=True)
      raise preemption.preempted()
    if step == 3:
      print("ready", flush=True)
    time.sleep(0.001 * (1 + rank))
"""


def test_two_real_processes_stop_at_the_same_step_though_one_has_got_the_signal():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
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
    peers[1].send_signal(TERM)
    outs = [peer.communicate(timeout=60) for peer in peers]
  finally:
    for peer in peers:
      peer.kill()
  assert [peer.returncode for peer in peers] == [75, 75], outs
  assert outs[0][0] == outs[1][0] and outs[0][0].startswith("stopped")
  assert "SIGTERM (another process): the run saves" in outs[0][1]


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

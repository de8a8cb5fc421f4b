"""Several processes: how they find each other, that they train what one does, how they end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from stand_ins import free_port
from xla_flags import QUICK

from trainers import stages
from umd.devices import distributed
from umd.devices.distributed import ProcessGroup, find
from umd.runs.checkpoint import load_params
from umd.runs.writers import read_jsonl

ROOT = Path(__file__).resolve().parents[2]

SBATCH = {  # what a batch script, or a shell in an allocation, sees
  "SLURM_JOB_ID": "5000",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "0",
  "SLURM_LOCALID": "0",
  "SLURM_NODEID": "0",
  "SLURM_JOB_NODELIST": "n[07-08]",
}
SRUN = {  # task 3 of srun -n 4 on the nodes n08 and n09
  **SBATCH,
  "SLURM_STEP_ID": "2",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_NODELIST": "n[08-09]",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
  "SLURM_NODEID": "1",
}
# Under mpirun, its daemons were started by srun, one a node, and their variables are inherited.
DAEMONS = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OPEN_MPI = {
  "OMPI_COMM_WORLD_RANK": "5",
  "OMPI_COMM_WORLD_SIZE": "8",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
INTEL = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
MVAPICH = {
  "MV2_COMM_WORLD_RANK": "1",
  "MV2_COMM_WORLD_SIZE": "6",
  "MV2_COMM_WORLD_LOCAL_RANK": "1",
  "MV2_COMM_WORLD_LOCAL_SIZE": "3",
}
HERE = {"UMD_COORDINATOR": "boss:99"}
JOB_PORT, STEP_PORT = 61440 + 5000 % 4096, 61440 + (5000 + 2 * 131) % 4096


def found(environ, *flags, workers=1):
  return find(environ, *flags, workers=lambda environ: workers)


@pytest.mark.parametrize(
  "environ, expected",
  [
    ({}, None),
    (SBATCH, None),
    ({**SBATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),
    (HERE, None),
    (SRUN, ProcessGroup("srun", f"n08:{STEP_PORT}", 4, 3, (1,))),
    ({**SRUN, **HERE}, ProcessGroup("srun", "boss:99", 4, 3, (1,))),
    ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, ProcessGroup("srun", f"n08:{STEP_PORT}", 4, 3)),
    # srun --mpi=pmi2 says it twice.
    (
      {**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"},
      ProcessGroup("srun", f"n08:{STEP_PORT}", 4, 3, (1,)),
    ),
    ({**DAEMONS, **OPEN_MPI}, ProcessGroup("Open MPI", f"n07:{JOB_PORT}", 8, 5, (1,))),
    ({**SBATCH, **OPEN_MPI}, ProcessGroup("Open MPI", f"n07:{JOB_PORT}", 8, 5, (1,))),
    ({**OPEN_MPI, **HERE}, ProcessGroup("Open MPI", "boss:99", 8, 5, (1,))),
    ({**SBATCH, **INTEL}, ProcessGroup("MPICH or Intel MPI", f"n07:{JOB_PORT}", 2, 1)),
    ({**SBATCH, **MVAPICH}, ProcessGroup("MVAPICH", f"n07:{JOB_PORT}", 6, 1, (1,))),
    # One process under MPI is alone, whatever its daemons inherited.
    ({**DAEMONS, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
  ],
)
def test_the_place_among_several_follows_from_what_launchers_set(environ, expected):
  assert found(environ) == expected


@pytest.mark.parametrize(
  "visible, devices",
  [(None, (1,)), ("0", None), ("0,1", (1,)), ("0,1,2,3", (2, 3)), ("4,5,6", (1,))],
)
def test_processes_on_one_machine_share_its_gpus(visible, devices):
  environ = SRUN if visible is None else {**SRUN, "CUDA_VISIBLE_DEVICES": visible}
  assert found(environ).local_device_ids == devices


def test_flags_come_first_and_are_checked():
  flags = ("10.0.0.1:5", 3, 2)
  assert found(SRUN, *flags, workers=4) == ProcessGroup("the flags", "10.0.0.1:5", 3, 2)
  assert found({}, "a:1", 1, 0) is None
  assert found(OPEN_MPI, "a:1").coordinator == "a:1"
  for partial in (("a:1", None, None), ("a:1", 2, None), (None, 2, 0), (None, None, 0)):
    with pytest.raises(ValueError, match="all three"):
      found({}, *partial)
  for process_id in (-1, 3):
    with pytest.raises(ValueError, match=r"--process_id=.*0\.\.2"):
      found({}, "a:1", 3, process_id)
  for address in ("a", "a:", ":1", "a:b"):
    with pytest.raises(ValueError, match="HOST:PORT"):
      found({}, address, 2, 0)


def test_a_launcher_without_a_coordinator_is_an_error_that_says_what_to_set():
  with pytest.raises(ValueError, match=r"Open MPI started 8.*UMD_COORDINATOR.*HOST:PORT"):
    found(OPEN_MPI)


def test_workers_of_a_tpu_leave_the_rest_to_jax():
  assert found({}, workers=4) == ProcessGroup("the TPU")
  assert found({}, workers=1) is None
  assert found(SRUN, workers=4).launcher == "srun"


def test_hosts_of_a_tpu_are_counted_unless_the_cpu_is_asked_for(monkeypatch):
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu")
  monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
  hosts = {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4"}
  assert distributed.tpu_workers({}) == 1
  assert distributed.tpu_workers({"TPU_WORKER_HOSTNAMES": "localhost"}) == 1
  assert distributed.tpu_workers(hosts) == 4
  assert distributed.tpu_workers({**hosts, "JAX_PLATFORMS": "cpu"}) == 1
  assert distributed.tpu_workers({**hosts, "JAX_PLATFORMS": "tpu,cpu"}) == 4


@pytest.mark.parametrize(
  "nodelist, first",
  [
    ("n1", "n1"),
    ("n1,n2", "n1"),
    ("a[01-03,7],b2", "a01"),
    ("c197-[042,051]", "c197-042"),
    ("rack[2-3]n[4-5].x,b[1-2]", "rack2n4.x"),
    ("b2,a[1-3]", "b2"),
  ],
)
def test_the_first_host_of_a_node_list(nodelist, first):
  assert distributed.first_host(nodelist) == first


TINY = """
from configs import quickstart

def get_config(arg=None):
  config = quickstart.get_config(
    "variant=nano/2,steps=2,finetune_steps=24,batch_size=32,num_samples=20,sampling_steps=2"
  )
  config.finetune.evals.fewshot = config.pretrain.evals.fewshot
  config.finetune.evals.generation.train.split = "train[:10%]"  # to be judged by a quick learner
  config.pretrain.evals = {}
  config.finetune.log_every = 1
  config.finetune.checkpoint.every = 3
  config.finetune.eval_batch_size = 512
  return config
"""


class Launch:
  """`python -m train` on the tiny config, as two processes of one device."""

  def __init__(self, workdir: Path, cache: Path, name: str):
    config = cache / "tiny.py"
    config.write_text(TINY)
    environ = {
      **os.environ,
      "XLA_FLAGS": QUICK,
      "JAX_COMPILATION_CACHE_DIR": str(cache),  # for the second launch
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "train", "--config", str(config), "--workdir", str(workdir)]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", "2"]
    command += ["--heartbeat_seconds", "10"]
    self.outputs = [cache / f"{name}_{i}.txt" for i in range(2)]
    self.processes = []
    for i, path in enumerate(self.outputs):
      place = ["--process_id", str(i)]
      with path.open("w") as out:
        self.processes.append(
          subprocess.Popen([*command, *place], cwd=ROOT, env=environ, stdout=out, stderr=out)
        )

  def wait(self, seconds: float) -> list[int]:
    """Exit statuses; nothing is left running."""
    try:
      until = time.monotonic() + seconds
      return [p.wait(max(0.0, until - time.monotonic())) for p in self.processes]
    finally:
      for p in self.processes:
        p.kill()

  def told(self, process: int) -> str:
    return self.outputs[process].read_text()


class Pair(NamedTuple):
  """What two processes made of the second stage: one was killed, both were started again."""

  workdir: Path
  killed: list[int]  # exit statuses
  again: Launch


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
  """Workdir of one process, this one, with four devices."""
  workdir, names = tmp_path_factory.mktemp("one"), {}
  exec(TINY, names)
  stages.run(names["get_config"](), str(workdir))
  return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory, one) -> Pair:
  folder = tmp_path_factory.mktemp("two")
  workdir = folder / "run"
  # The first stage, and the judge of samples, are taken over for time's sake.
  for done in ("pretrain", "cache"):
    shutil.copytree(one / done, workdir / done)
  launch = Launch(workdir, folder, "killed")
  log = str(workdir / "finetune" / "metrics.jsonl")
  while len(read_jsonl(log)) < 8 and launch.processes[0].poll() is None:
    time.sleep(0.02)
  launch.processes[1].send_signal(signal.SIGKILL)
  statuses = launch.wait(180)
  summary = workdir / "finetune" / "summary.json"
  assert not summary.exists(), f"killed too late to tell: {launch.told(0)}"
  again = Launch(workdir, folder, "again")
  assert again.wait(600) == [0, 0], again.told(0) + again.told(1)
  return Pair(workdir, statuses, again)


def test_a_killed_process_ends_the_other_with_an_error_in_bounded_time(two):
  """The bound is the fixture's `wait`: 180 s, of which the heartbeat takes ten."""
  assert two.killed[1] == -signal.SIGKILL
  assert two.killed[0] != 0


def test_two_processes_that_were_killed_and_resumed_train_what_one_process_does(one, two):
  a, b = (read_jsonl(str(run / "finetune" / "metrics.jsonl")) for run in (one, two.workdir))
  assert [r["step"] for r in a] == [r["step"] for r in b]
  assert {name.split("/")[0] for r in a for name in r} >= {"loss", "fewshot", "generation"}
  for expected, found in zip(a, b, strict=True):
    assert expected.keys() == found.keys()
    words = {name for name, value in expected.items() if isinstance(value, str)}
    assert all(found[name] == expected[name] for name in words)
    clocks = ("goodput/", "input_wait")
    timed = {name for name in expected if name.startswith(clocks) or name.endswith("_per_second")}
    for name in expected.keys() - words - timed:
      np.testing.assert_allclose(found[name], expected[name], 1e-3, 1e-4, err_msg=name)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_two_processes_save_the_parameters_that_one_process_does(one, two, weights):
  (a, step), (b, same) = (load_params(str(run / "finetune"), weights) for run in (one, two.workdir))
  start, _ = load_params(str(one / "pretrain"), weights)
  assert step == same == 24
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for expected, found in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(found, expected, 1e-3, 1e-4)
  # The bound is far below what training has changed.
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), start["encoder"], a["encoder"])
  assert min(jax.tree.leaves(moved)) > 1e-3


def test_only_process_0_prints_and_logs(two):
  said, silent = two.again.told(0), two.again.told(1)
  assert "2 processes, 2 devices (cpu)" in said
  assert "[finetune] resumed at step" in said and "generation/agreement" in said
  assert "finetune" not in silent and "generation" not in silent
  environment = json.loads((two.workdir / "finetune" / "environment.json").read_text())
  assert environment["processes"] == 2
  assert environment["command"][-2:] == ["--process_id", "0"]
  # One file of events for each start.
  assert len(list((two.workdir / "finetune" / "tensorboard").iterdir())) == 2


def test_a_peer_that_does_not_come_is_an_error_that_says_where_and_how_many():
  port = free_port()
  start = f"distributed.start('127.0.0.1:{port}', 3, 1, timeout_seconds=1)"
  code = f"from umd.devices import distributed\n{start}"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 2
  assert f"127.0.0.1:{port}" in done.stderr and "process 1 of 3" in done.stderr
  assert "Traceback" not in done.stderr

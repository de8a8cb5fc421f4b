"""Several processes as one run: finds out whether there are others, joins them, and leaves them.

JAX connects the processes and ends all of them when one dies. What is decided here is who they are:
JAX would take a shell inside a SLURM allocation for a task of srun, would give a task only one of
several GPUs that are its own, and does not know all kinds of MPI.
"""

import dataclasses
import glob
import importlib.util
import os
import re
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

import jax


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
  """The place of this process among several; all but the launcher is None if JAX asks the TPU.

  Attributes:
    launcher: who started the processes, for messages.
    coordinator: host:port at which process 0 gathers the others.
    num_processes: how many there are.
    process_id: the number of this one, from 0.
    local_device_ids: the GPUs of this machine that are this process's; None for all.
  """

  launcher: str
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None


class Variables(NamedTuple):
  """Names of the environment variables by which a launcher tells a process its place."""

  rank: str
  size: str
  local_rank: str
  local_size: str


def _by_prefix(prefix: str) -> Variables:
  return Variables(*(f"{prefix}_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))


SLURM = Variables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
MPI = {
  "Open MPI": _by_prefix("OMPI_COMM_WORLD"),
  "MVAPICH": _by_prefix("MV2_COMM_WORLD"),
  "MPICH or Intel MPI": Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def first_host(nodelist: str) -> str:
  """Returns the first host of a SLURM node list: "a01" of "a[01-03,7],b2"."""
  first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist).group()
  return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _tasks_on_this_node(environ: Mapping[str, str]) -> int:
  """Reads SLURM's "4(x2),3": four tasks on each of two nodes, three on the next."""
  counts = []
  for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
    tasks, _, times = part.partition("(x")
    counts += [int(tasks)] * int(times.rstrip(")") or 1)
  return counts[min(int(environ.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _launcher(environ: Mapping[str, str]) -> tuple[str, Variables] | None:
  """Returns who started this process as one of several; None if nobody did.

  MPI comes first: under SLURM, its daemons are tasks of srun, and the processes that they start
  inherit their numbers. SLURM_NTASKS is no sign of srun, since a shell in an allocation has it too.
  """
  for name, mpi in MPI.items():
    if mpi.rank in environ and mpi.size in environ:
      place = (environ[mpi.rank], environ[mpi.size])
      # srun sets the variables of PMI as well, to its own numbers.
      if place != (environ.get(SLURM.rank), environ.get(SLURM.size)):
        return (name, mpi) if int(environ[mpi.size]) > 1 else None
  several = int(environ.get(SLURM.size, 1)) > 1 and SLURM.rank in environ
  return ("srun", SLURM) if several else None


def _devices(environ: Mapping[str, str], local_rank: int, local_size: int) -> tuple | None:
  """Returns this process's share of its machine's GPUs; None for all that it sees."""
  visible = environ.get("CUDA_VISIBLE_DEVICES")
  count = len(visible.split(",")) if visible else 0
  if local_size == 1 or count == 1:  # With one visible, the launcher has dealt them out already.
    return None
  share = max(1, count // local_size)
  return tuple(range(local_rank * share, (local_rank + 1) * share))


def tpu_workers(environ: Mapping[str, str]) -> int:
  """Returns how many machines the TPU of this one has; 1 if there is no TPU or nobody knows."""
  platforms = environ.get("JAX_PLATFORMS", "")
  if (platforms and "tpu" not in platforms) or not importlib.util.find_spec("libtpu"):
    return 1
  if "MEGASCALE_COORDINATOR_ADDRESS" in environ:
    return 2  # Several slices: at least two.
  if hosts := environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES"):
    return len(hosts.split(","))
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  if "TPU_SKIP_MDS_QUERY" in environ or not chips:
    return 1
  request = urllib.request.Request(
    METADATA + "worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
  )
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with direct.open(request, timeout=5) as reply:
      return len(reply.read().decode().split(","))
  except OSError:
    return 1  # Not on Google Cloud: a TPU without such a service has one machine.


def _check_address(coordinator: str) -> str:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ValueError(
      f"coordinator={coordinator!r} must be HOST:PORT of process 0, e.g. node1:12345."
    )
  return coordinator


def _from_flags(coordinator, num_processes, process_id) -> ProcessGroup | None:
  if None in (coordinator, num_processes, process_id):
    raise ValueError(
      f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: "
      "give all three to every process, or none where srun, mpirun, ibrun or a TPU tells."
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id={process_id} must be in 0..{num_processes - 1} (--num_processes - 1)."
    )
  if num_processes == 1:
    return None
  return ProcessGroup("the flags", _check_address(coordinator), num_processes, process_id)


def find(
  environ: Mapping[str, str],
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  workers: Callable[[Mapping[str, str]], int] = tpu_workers,
) -> ProcessGroup | None:
  """Returns this process's place among several, None if it is alone.

  The three flags come first, then MPI (mpirun, ibrun), then srun, then the TPU. A launcher's
  coordinator is `coordinator`, else UMD_COORDINATOR, else the first node of the SLURM job with a
  port that follows from its number.

  Args:
    environ: environment variables.
    coordinator, num_processes, process_id: the flags, None where they are not given.
    workers: returns the number of machines of the TPU.

  Raises:
    ValueError: flags that do not fit together, or a launcher without a coordinator.
  """
  launched = _launcher(environ)
  if num_processes is not None or process_id is not None or (coordinator and not launched):
    return _from_flags(coordinator, num_processes, process_id)
  if not launched:
    return ProcessGroup("the TPU") if workers(environ) > 1 else None
  name, names = launched
  by_slurm = names is SLURM
  size = int(environ[names.size])
  coordinator = coordinator or environ.get("UMD_COORDINATOR")
  nodes = (by_slurm and environ.get("SLURM_STEP_NODELIST")) or environ.get("SLURM_JOB_NODELIST")
  if not coordinator and nodes and "SLURM_JOB_ID" in environ:
    step = int(environ.get("SLURM_STEP_ID", 0)) if by_slurm else 0
    # Above the ports that Linux gives out by itself, and the same in all processes of a step.
    port = 61440 + (int(environ["SLURM_JOB_ID"]) + 131 * step) % 4096
    coordinator = f"{first_host(nodes)}:{port}"
  if not coordinator:
    raise ValueError(
      f"{name} started {size} processes, but nothing says where process 0 is. Set UMD_COORDINATOR "
      "(or --coordinator) to HOST:PORT of its machine, the same for all."
    )
  here = _tasks_on_this_node(environ) if by_slurm else int(environ.get(names.local_size, 1))
  devices = _devices(environ, int(environ.get(names.local_rank, 0)), here)
  return ProcessGroup(name, _check_address(coordinator), size, int(environ[names.rank]), devices)


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  environ: Mapping[str, str] = os.environ,
  *,
  timeout_seconds: int = 300,
  heartbeat_seconds: int = 60,
  stop_together: bool = False,
) -> None:
  """Joins the other processes if there are any; to be called before JAX is used.

  Args:
    coordinator, num_processes, process_id, environ: see `find`.
    timeout_seconds: how long to wait for the others.
    heartbeat_seconds: JAX ends all processes when one has been silent for so long.
    stop_together: SIGTERM to one process asks all to stop, see `umd.runs.preemption`; otherwise it
      ends that process at once.

  Raises:
    ValueError: see `find`; or the port is taken. If the others do not come, the process ends with
      a message that names the coordinator and how many were expected.
  """
  settings = find(environ, coordinator, num_processes, process_id)
  if settings is None:
    return
  jax.config.update("jax_enable_preemption_service", stop_together)
  place = f"process {settings.process_id} of {settings.num_processes}, as {settings.launcher} said"

  def give_up():
    print(
      f"error: after {timeout_seconds} s not all processes have met at {settings.coordinator} "
      f"(this is {place}). Are all of them running, is that the machine of process 0, and can the "
      "others reach it?",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)

  # JAX's own timeout kills the process with a stack trace of C++, so ours comes first.
  watch = threading.Timer(timeout_seconds, give_up)
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
      settings.coordinator,
      settings.num_processes,
      settings.process_id,
      settings.local_device_ids,
      cluster_detection_method="deactivate" if settings.coordinator else None,
      initialization_timeout=timeout_seconds + 60,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"{place}: cannot start at {settings.coordinator}: {reason}") from error
  finally:
    watch.cancel()
  if jax.process_index() == 0:
    kind = jax.devices()[0].device_kind
    print(f"{jax.process_count()} processes, {jax.device_count()} devices ({kind})", flush=True)


def is_main() -> bool:
  """Returns whether this is the process that prints and writes logs."""
  return jax.process_index() == 0


def leave(code: int) -> NoReturn:
  """Ends this process after an error, with exit status `code`.

  With others around it ends at once: the ordinary way out waits for them, and they wait for this
  one. Their next exchange with it fails, or its heartbeat is missed, which ends them too.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.distributed.is_initialized():
    os._exit(code)
  sys.exit(code)

"""Compiles for accelerators that are not here, and tells what the compiler says of the program.

libtpu holds the whole compiler of every TPU, and a topology stands for the chips of a slice, so a
step compiles as it would there: memory, collectives, order of instructions. Nothing is run.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from jax.experimental import topologies

from umd.devices import chips

COLLECTIVES = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
  *("collective-permute", "collective-broadcast"),
)
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|called_computations|branch_computations|true_computation|"
  r"false_computation)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_ENTERED = ("while", "call", "conditional", "fusion", "async-start")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without the %.
    opcode: e.g. "fusion" or "all-reduce-start".
    arrays: ((dtype, shape), ...) of the result, several of a tuple.
    text: operands and attributes.
  """

  name: str
  opcode: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  text: str

  @property
  def nbytes(self) -> int:
    """Bytes of the result, without padding."""
    return sum(math.prod(shape) * bits(dtype) for dtype, shape in self.arrays) // 8

  @property
  def operands(self) -> list[str]:
    """Names of the operands."""
    inside = self.text[: _matching(self.text)]
    return re.findall(r"%([\w.\-]+)", inside)

  def called(self) -> list[str]:
    """Names of the computations that it runs, without the condition of a loop."""
    names = (name for group in _CALLED.findall(self.text) for name in group.split(","))
    return [name.strip().removeprefix("%") for name in names]


def bits(dtype: str) -> int:
  """Of an element, from the type's name: "s32" is 32, "f8e4m3fn" is 8."""
  return BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])


def _matching(text: str) -> int:
  """Position behind the bracket that closes the one with which the text begins."""
  depth = 0
  for found in re.finditer(r"[()]", text):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.end()
  return len(text)


def _parse_line(line: str) -> Instruction | None:
  found = _LINE.match(line)
  if not found:
    return None
  name, rest = found.groups()
  end = _matching(rest) if rest.startswith("(") else rest.find(" ")
  opcode, _, text = rest[end:].strip().partition("(")
  arrays = tuple(
    (dtype, tuple(int(n) for n in sides.split(",") if n))
    for dtype, sides in _ARRAY.findall(rest[:end])
  )
  return Instruction(name, opcode, arrays, "(" + text)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    computations: {name: its instructions}.
    entry: the name of the one that is run.
  """

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str

  def walk(self) -> Iterator[tuple[Instruction, int, str]]:
    """Each (instruction that is run, how often, computation); what fusions are made of included."""
    yield from self._walk(self.entry, 1)

  def _walk(self, name: str, times: int) -> Iterator[tuple[Instruction, int, str]]:
    for i in self.computations.get(name, {}).values():
      yield i, times, name
      if i.opcode in _ENTERED:
        often = times * self.trips(i)[0] if i.opcode == "while" else times
        for called in i.called():
          yield from self._walk(called, often)

  def trips(self, loop: Instruction) -> tuple[int, bool]:
    """(how often a loop runs, whether that is known; it counts once if it is not).

    Where the compiler does not say so, it follows from the condition: a counter from 0 that is
    compared with one constant, as of every scan.
    """
    if found := _TRIPS.search(loop.text):
      return int(found[1]), True
    condition = self.computations.get(_CONDITION.search(loop.text)[1], {})
    limits = {
      int(found[1])
      for i in condition.values()
      if i.opcode == "constant" and (found := re.match(r"\((\d+)\)", i.text))
    }
    return (limits.pop(), True) if len(limits) == 1 else (1, False)

  @property
  def unknown_loops(self) -> int:
    """Number of loops of which nobody knows how often they run."""
    return sum(i.opcode == "while" and not self.trips(i)[1] for i, _, _ in self.walk())

  def collectives(self) -> dict[str, tuple[int, int]]:
    """{kind: (how many a device starts, their bytes)}.

    The bytes are those of the whole that is reduced, gathered, scattered or sent, as one device
    sees it: what goes over its links differs by a factor, e.g. up to 2 for an all-reduce.
    """
    found = {}
    for i, times, where in self.walk():
      kind = i.opcode.removesuffix("-done")  # Of "-start" the result holds operands, too.
      if kind not in COLLECTIVES:
        continue
      size = i.nbytes
      if kind == "reduce-scatter":
        operands = self._inputs(i, where)
        size = sum(x.nbytes for x in operands) or size
      elif "all-reduce-scatter" in where:  # A TPU's way to write it: a fusion with a slice.
        kind = "reduce-scatter"
      count, total = found.get(kind, (0, 0))
      found[kind] = (count + times, total + size * times)
    return found

  def _inputs(self, i: Instruction, where: str) -> list[Instruction]:
    """What an instruction reads; what its own start reads, of one that ends another."""
    within = self.computations[where]
    read = [within[name] for name in i.operands if name in within]
    if i.opcode.endswith("-done") and len(read) == 1:
      return [within[name] for name in read[0].operands if name in within]
    return read

  def cycles(self) -> int | None:
    """Sum of the compiler's estimates, a TPU's only; None if it makes none.

    A fusion's estimate is of all within it. Collectives and kernels of one's own have none.
    """
    fused = {name for i, _, _ in self.walk() if i.opcode == "fusion" for name in i.called()}
    found = [
      int(cycles[1]) * times
      for i, times, where in self.walk()
      if where not in fused and (cycles := _CYCLES.search(i.text))
    ]
    return sum(found) if found else None

  def kernels(self) -> int:
    """How many kernels of one's own (Pallas) it runs: their time is in no estimate."""
    mine = lambda i: (
      i.opcode == "custom-call" and (_TARGET.search(i.text) or [0, ""])[1] == "tpu_custom_call"
    )
    return sum(times for i, times, _ in self.walk() if mine(i))

  def arrays(self) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array that any instruction makes or is given."""
    return {a for c in self.computations.values() for i in c.values() for a in i.arrays}


def parse(text: str) -> Program:
  """Reads the text of a module.

  Raises:
    ValueError: it is not XLA's text of a compiled module.
  """
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if not line.startswith(" "):
      if head := _HEAD.match(line):
        current = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
    elif current is not None and (found := _parse_line(line)):
      current[found.name] = found
  if not entry:
    raise ValueError("no entry computation: this is not the text of a compiled XLA module.")
  return Program(computations, entry)


GIB = 2**30
EXAMPLES = "v5e:4x4, v6e:2x4, v4:2x2x1, v5p:4x4x4"
# Chips of two cores that JAX is to see as one device.
MEGACORE = ("v4",)


class ChipRates(NamedTuple):
  """Hz of a TPU core, and bytes/s over all links of a device, in one direction."""

  rate: float
  links: float


# Clocks of v2, v3: Jouppi et al. 2020 (CACM 63:7), table 3; of v4: Jouppi et al. 2023
# (arXiv:2304.01433), table 4; of later ones: peak / (matrix units x 2 x their multipliers). Links:
# the same papers, and half of the bidirectional bandwidth on Google Cloud's page of each version.
CLOCKS = {
  "TPU v2": ChipRates(0.70e9, 124e9),
  "TPU v3": ChipRates(0.94e9, 164e9),
  "TPU v4": ChipRates(1.05e9, 300e9),
  "TPU v5 lite": ChipRates(1.50e9, 200e9),
  "TPU v5": ChipRates(1.75e9, 600e9),
  "TPU v6 lite": ChipRates(1.75e9, 400e9),
}


def library() -> str:
  """The file of libtpu, the TPU's compiler: of $TPU_LIBRARY_PATH, of an installed package, or where
  `bash run.sh fit` puts it, beside the packages, so that nothing else loads it; "" if none.
  """
  found = importlib.util.find_spec("libtpu")
  installed = list(found.submodule_search_locations) if found else []
  own = os.path.join(sys.prefix, "libtpu", "libtpu")
  paths = [os.path.join(folder, "libtpu.so") for folder in (*installed, own)]
  paths = [os.environ.get("TPU_LIBRARY_PATH", ""), *paths]
  return next((path for path in paths if os.path.isfile(path)), "")


def prepare() -> None:
  """Sets what libtpu and JAX must find before JAX looks for devices: to be called first.

  Programs for TPUs compile on the CPU, and a TPU of this machine is left alone.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  if path := library():
    os.environ["TPU_LIBRARY_PATH"] = path
  jax.config.update("jax_platforms", "cpu")


def tpu_devices(topology: str) -> list:
  """The devices of a slice such as "v5e:4x4", none of which is here; see `prepare`.

  Raises:
    ValueError: libtpu is missing or there is no such slice.
  """
  if not library():
    raise ValueError(
      f"topology {topology!r} needs the TPU's compiler, which is not installed. Start the program "
      "with bash run.sh fit, or pip install libtpu."
    )
  version = topology.partition(":")[0]
  options = {"chip_config_name": "megacore"} if version in MEGACORE else {}
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  except RuntimeError as error:
    first = str(error).splitlines()[0]
    raise ValueError(
      f"topology {topology!r} is no TPU slice: {first} Examples: {EXAMPLES}."
    ) from None
  return list(found.devices)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a program that fits; bytes are of one device.

  Attributes:
    arguments: what it is given: state, batch, frozen parameters.
    outputs: what it returns and does not write over its arguments.
    temporaries: the most that it needs in between.
    program: its instructions; None where the compiler does not print them.
    text: of them.
  """

  arguments: int
  outputs: int
  temporaries: int
  program: Program | None
  text: str

  @property
  def peak(self) -> int:
    return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
  """What the compiler says of a program that does not fit; bytes are of one device.

  Attributes:
    peak: what it needs, and
    capacity: what there is.
    whole: whether the peak includes what the program is given.
  """

  peak: int
  capacity: int
  whole: bool


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# Two ways of saying it: of everything, and of temporaries only.
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")


def out_of_memory(message: str) -> OutOfMemory | None:
  """What a compiler's error says of memory; None if it is about something else."""
  whole = _USED.search(message)
  found = whole or _TEMPORARIES.search(message)
  if "RESOURCE_EXHAUSTED" not in message or not found:
    return None
  needed, needed_unit, capacity, unit = found.groups()
  size = lambda number, unit: int(float(number) * UNITS[unit])
  return OutOfMemory(size(needed, needed_unit), size(capacity, unit), bool(whole))


def compile_step(lowered: jax.stages.Lowered) -> Compiled | OutOfMemory:
  """Compiles a lowered step; what does not fit is an answer, not an error."""
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if found := out_of_memory(str(error)):
      return found
    raise
  told = compiled.memory_analysis()
  try:
    text = compiled.as_text()
  except (jax.errors.JaxRuntimeError, NotImplementedError):
    text = ""  # Of some programs for v6e and TPU7x it is not to be had.
  outputs = max(0, told.output_size_in_bytes - told.alias_size_in_bytes)
  program = parse(text) if text else None
  return Compiled(
    told.argument_size_in_bytes, outputs, told.temp_size_in_bytes, program, text or ""
  )


class Speed(NamedTuple):
  """Seconds of a step, and the share of the devices' peak (MFU) that follows: from worst to best.

  Best: the compiler's cycles at the chip's clock, collectives hidden behind them. An instruction's
  cycles are the larger of its arithmetic and its memory traffic, roughly. Worst: these two take
  turns everywhere, so at most twice the cycles, and the collectives come on top.
  """

  seconds: tuple[float, float]
  mfu: tuple[float, float]


def speed(
  program: Program, device_kind: str, devices: int, flops: float, dtype: str
) -> Speed | None:
  """How fast the compiler thinks that a program is; None where it does not say.

  Args:
    program: of one device.
    device_kind: as JAX names it.
    devices: that run it.
    flops: of the whole step, over all of them; see `umd.devices.flops`.
    dtype: of the computation.
  """
  cycles, clock = program.cycles(), CLOCKS.get(device_kind)
  peak = chips.peak_flops(device_kind, dtype)
  if not cycles or not clock or not peak:
    return None
  passes = {"all-reduce": 2}  # A reduce-scatter and an all-gather.
  sent = sum(size * passes.get(kind, 1) for kind, (_, size) in program.collectives().items())
  best = cycles / clock.rate
  worst = 2 * best + (sent / clock.links if devices > 1 else 0.0)
  share = lambda seconds: flops / (seconds * peak * devices)
  return Speed((worst, best), (share(worst), share(best)))


def largest(
  peak: Callable[[int], int], capacity: int, start: int, unit: int, tries: int = 6
) -> int:
  """The largest batch that fits, nearly: memory is a line in the batch, nearly.

  Args:
    peak: bytes that a device needs for a batch; each call may be a compilation. What it says of
      the answer was checked by such a call.
    capacity: bytes that a device has.
    start: a batch to begin from, a multiple of `unit`.
    unit: what the batch must be a multiple of.
    tries: calls at most.

  Returns 0 if not even `unit` fits.
  """
  known, batch = {}, start
  for _ in range(tries):
    known[batch] = peak(batch)
    fits = max((b for b, p in known.items() if p <= capacity), default=0)
    fails = min((b for b, p in known.items() if p > capacity), default=None)
    if fails == unit or (fails is not None and fails - fits <= unit):
      break
    if len(known) == 1:
      batch = start // 2 // unit * unit or 2 * unit
      continue
    (b0, p0), (b1, p1) = sorted(known.items(), key=lambda x: abs(x[1] - capacity))[:2]
    slope = (p1 - p0) / (b1 - b0)
    aim = (b0 + (capacity - p0) / slope) if slope > 0 else 2 * max(known)
    low, high = fits + unit, (fails - unit if fails is not None else 2**31)
    batch = int(min(max(aim // unit * unit, low), high))
    # Within a step of what is known to fit there is little to gain: a sixteenth.
    if fits and batch - fits <= max(unit, fits // 16) and len(known) > 2:
      break
  return fits

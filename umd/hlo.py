"""Reads what XLA prints of a compiled program: its collectives, its arrays, its estimated cycles.

The text is that of `jax.stages.Compiled.as_text()`, of one device. What stands in the body of a
loop counts as often as the loop runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

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

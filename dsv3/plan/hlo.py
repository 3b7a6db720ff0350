"""What a compiled program sends, and what it does meanwhile, read from its text."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
  "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all "
  "collective-permute collective-broadcast"
).split()
_PRODUCTS = ("fusion", "custom-call", "dot", "convolution")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}


class Collective(NamedTuple):
  """All collectives of a kind and result, of one step."""

  kind: str
  result: str  # as bf16[64,7168]
  count: int  # times a step, loops unrolled
  bytes: int  # of one result on a device
  sure: bool = True  # or only where a condition holds, then `count` at most


_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?\S+ = (.+?) ([a-z][\w-]*?)(-start)?\("
)
_CALLED = re.compile(
  r"(?:body|to_apply|calls|condition)=%?([\w.-]+)"
  r"|(?:true|false)_computation=(%?[\w.-]+)|branch_computations=\{([^}]*)\}"
)


class Meanwhile(NamedTuple):
  """Products of a scope, and how many run while rows are on their way."""

  inside: int
  all: int


def collectives_of(text: str) -> list[Collective]:
  """Every collective of a compiled program, counted over its loops.

  A loop whose length the compiler does not know is counted once.
  """
  found = collections.Counter()
  for _, line, times, sure in _run(text):
    match = _INSTRUCTION.match(line)
    if match and match[2] in COLLECTIVES:
      found[match[2], _result(match[1], bool(match[3])), sure] += times
  return [
    Collective(kind, result, count, size(result), sure)
    for (kind, result, sure), count in found.items()
  ]


def meanwhile(text: str, scope: str) -> Meanwhile:
  """Products traced in `scope`: all, and those that the schedule has between the
  start and the end of an all-to-all."""
  on_their_way, found = collections.defaultdict(set), []
  for computation, line, _, _ in _run(text):
    rows = on_their_way[computation]
    if start := re.match(r"\s+%?(\S*all-to-all-start\S*) = ", line):
      rows.add(start[1])
    elif done := re.search(r"-done\(%?(\S*all-to-all-start[\w.-]*)", line):
      rows.discard(done[1])
    elif re.search(rf'op_name="[^"]*\b{scope}\b[^"]*/dot_general', line):
      match = _INSTRUCTION.match(line)
      if match and match[2] in _PRODUCTS:
        found.append(bool(rows))
  return Meanwhile(sum(found), len(found))


def _run(text: str) -> Iterator[tuple[str, str, int, bool]]:
  """Lines that are run: (computation, line, times, whether it surely is)."""
  bodies, entry = _computations(text)

  def walk(name: str, times: int, sure: bool):
    for line in bodies.get(name, ()):
      yield name, line, times, sure
      match = _INSTRUCTION.match(line)
      if not match or match[2] in ("fusion", "reduce"):
        continue
      inner = times * _trips(line, bodies)
      branches = []
      for called, *ways in _CALLED.findall(line):
        if called:
          yield from walk(called, inner, sure)
        branches += re.findall(r"[\w.-]+", " ".join(ways))
      for branch in branches:  # the only one is taken
        yield from walk(branch, inner, sure and len(branches) == 1)

  yield from walk(entry, 1, True)


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
  """How often an instruction's body runs: 1 where nothing is said of it.

  For GPUs and CPUs XLA writes it beside a loop. For TPUs it has removed it by
  then, and a scan is one whose condition ends at a constant: it begins at 0.
  """
  if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
    return int(said[1])
  loop = re.search(r" while\(.*condition=%?([\w.-]+)", line)
  condition = "\n".join(bodies.get(loop[1], ())) if loop else ""
  end = re.search(
    r"ROOT .* compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT", condition
  )
  n = end and re.search(
    rf"%?{re.escape(end[1])} = s32\[\]\S* constant\((\d+)\)", condition
  )
  return int(n[1]) if n else 1


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Lines of every computation by its name, and the entry's name."""
  found, name, entry = {}, "", ""
  for line in text.splitlines():
    head = re.match(r"^(ENTRY )?%?([\w.-]+) .*\{\s*$", line)
    if head and not line.startswith(" "):
      name = head[2]
      found[name] = []
      entry = name if head[1] else entry
    elif name:
      found[name].append(line)
  return found, entry


def _result(shape: str, started: bool) -> str:
  """Shapes of a result without layouts.

  One that is only started has its operands before them, and marks behind.
  """
  arrays = re.findall(r"\w+\[[\d,]*\]", shape)
  if started and shape.startswith("("):
    arrays = [a for a in arrays if a != "u32[]"]
    arrays = arrays[len(arrays) // 2 :]
  return " ".join(arrays)


def size(result: str) -> int:
  """Bytes of arrays, by their text.

  >>> size("bf16[2,3] s32[]")
  16
  """
  return sum(
    _bytes(kind) * _elements(dims)
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
  )


def _bytes(kind: str) -> int:
  found = re.search(r"\d+", kind)
  return _BYTES.get(kind) or max(int(found[0]) // 8, 1) if found else 1


def _elements(dims: str) -> int:
  return math.prod(int(n or 1) for n in dims.split(","))

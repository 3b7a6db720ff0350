"""Collectives in a compiled program, read from its text."""

import collections
import math
import re
from typing import NamedTuple

COLLECTIVES = (
  "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all "
  "collective-permute collective-broadcast"
).split()
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}


class Collective(NamedTuple):
  """All collectives of a kind and result, of one step."""

  kind: str
  result: str  # as bf16[64,7168]
  count: int  # times a step, loops unrolled
  bytes: int  # of one result on a device


_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?\S+ = (.+?) ([a-z][\w-]*?)(-start)?\("
)
_CALLED = re.compile(
  r"(?:body|to_apply|calls|condition|true_computation|false_computation)="
  r"%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)


def collectives_of(text: str) -> list[Collective]:
  """Every collective of a compiled program, counted over its loops.

  A loop whose length the compiler does not know is counted once.
  """
  bodies, entry = _computations(text)
  found = collections.Counter()

  def walk(name: str, times: int) -> None:
    for line in bodies.get(name, ()):
      match = _INSTRUCTION.match(line)
      if match and match[2] in COLLECTIVES:
        found[match[2], _result(match[1], bool(match[3]))] += times
      trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
      inner = times * int(trips[1]) if trips else times
      for one, several in _CALLED.findall(line):
        for callee in (one, *re.findall(r"%?([\w.-]+)", several)):
          if callee and match and match[2] not in ("fusion", "reduce"):
            walk(callee, inner)

  walk(entry, 1)
  return [
    Collective(kind, result, count, size(result))
    for (kind, result), count in found.items()
  ]


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

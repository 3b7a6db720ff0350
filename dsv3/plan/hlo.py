"""What a compiled program sends, and what it does meanwhile, read from its text."""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dsv3.plan import places

COLLECTIVES = (
  "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all "
  "collective-permute collective-broadcast"
).split()
_PRODUCTS = ("fusion", "custom-call", "dot", "convolution")
_KERNEL = 'custom_call_target="mosaic_gpu'  # of ours, for FP8: all are products
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}


class Collective(NamedTuple):
  """All collectives of a kind, result and place, of one step."""

  kind: str
  result: str  # as bf16[64,7168]
  count: int  # times a step, loops unrolled
  bytes: int  # of one result on a device
  sure: bool = True  # or only where a condition holds, then `count` at most
  place: places.Place = places.OTHER


class Instruction(NamedTuple):
  """One of a computation; operands are names of others in it."""

  kind: str
  op_name: str
  operands: list[str]


Graph = dict[str, Instruction]


class Line(NamedTuple):
  """A line that is run: in which computation, how often, called by what."""

  computation: str
  text: str
  times: int = 1
  sure: bool = True  # or in a branch
  caller: "Line | None" = None


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

  One that XLA has joined of several is one in every place that has a part of it.
  A loop whose length the compiler does not know is counted once.
  """
  bodies, entry = _computations(text)
  graph_of = functools.cache(lambda name: _graph(bodies[name]))
  found = collections.Counter()
  for line in _run(bodies, entry, fused=True):
    match = _INSTRUCTION.match(line.text)
    if not match or match[2] not in COLLECTIVES or _goes_on(line, bodies):
      continue
    arrays = _results(match[1], match[2] + (match[3] or ""))
    parts = collections.defaultdict(list)
    for place, array in zip(_places(line, len(arrays), graph_of), arrays):
      parts[place].append(array)
    for place, arrays in parts.items():
      found[match[2], " ".join(arrays), line.sure, place] += line.times
  return [
    Collective(kind, result, count, size(result), sure, place)
    for (kind, result, sure, place), count in found.items()
  ]


def meanwhile(text: str, scope: str) -> Meanwhile:
  """Products traced in `scope`, XLA's and kernels for Hopper: all, and those that
  the schedule has between the start and the end of an all-to-all."""
  on_their_way, found = collections.defaultdict(set), []
  for computation, line, *_ in _run(*_computations(text)):
    rows = on_their_way[computation]
    if start := re.match(r"\s+%?(\S*all-to-all-start\S*) = ", line):
      rows.add(start[1])
    elif done := re.search(r"-done\(%?(\S*all-to-all-start[\w.-]*)", line):
      rows.discard(done[1])
    elif re.search(rf"\b{scope}\b", name := _name_of(line)):
      match = _INSTRUCTION.match(line)
      product = "/dot_general" in name or _KERNEL in line
      if product and match and match[2] in _PRODUCTS:
        found.append(bool(rows))
  return Meanwhile(sum(found), len(found))


def _run(
  bodies: dict[str, list[str]], entry: str, *, fused: bool = False
) -> Iterator[Line]:
  """Lines that are run, those within a fusion only if `fused`."""
  within = ("reduce",) if fused else ("reduce", "fusion")

  def walk(name: str, times: int, sure: bool, caller: Line | None):
    for text in bodies.get(name, ()):
      line = Line(name, text, times, sure, caller)
      yield line
      match = _INSTRUCTION.match(text)
      if not match or match[2] in within:
        continue
      inner = times * _trips(text, bodies)
      branches = []
      for called, *ways in _CALLED.findall(text):
        if called:
          yield from walk(called, inner, sure, line)
        branches += re.findall(r"[\w.-]+", " ".join(ways))
      for branch in branches:  # the only one is taken
        yield from walk(branch, inner, sure and len(branches) == 1, line)

  yield from walk(entry, 1, True, None)


def _goes_on(line: Line, bodies: dict[str, list[str]]) -> bool:
  """Whether it was begun before: for TPUs XLA writes a collective that runs
  beside other work into every fusion from its start to its end."""
  if "chain_id=" not in line.text:
    return False
  return not any("AsyncCollectiveStart" in t for t in bodies[line.computation])


def _places(
  line: Line, n: int, graph_of: Callable[[str], Graph]
) -> list[places.Place]:
  """Where each of the `n` arrays of a collective is: by its own name, or that of
  the loop around it, or those of what its operands are made of."""
  names = places.split(_name_of(line.text))
  own = [places.of_name(name) for name in names]
  if len(own) == n and all(own):
    return own
  if len(own) != n:  # for TPUs joined ones have the name of the first
    own = [None] * n
  if around := _around(line):
    return [mine or around for mine in own]
  if line.caller and " async-start(" in line.caller.text:
    line = line.caller
  graph = graph_of(line.computation)
  operands = graph[_defined(line.text)].operands
  if len(operands) != n:  # a ragged one has offsets and sizes too
    operands = operands[:1] * n
  made_of = [_made_of(operand, graph) for operand in operands]
  last = places.of_names(names) or places.OTHER
  return [mine or made or last for mine, made in zip(own, made_of)]


def _around(line: Line) -> places.Place | None:
  """The place of the innermost caller that has one."""
  caller = line.caller
  while caller:
    if found := places.of_names(places.split(_name_of(caller.text))):
      return found
    caller = caller.caller
  return None


def _made_of(operand: str, graph: Graph) -> places.Place | None:
  """The place of the nearest instructions behind an operand that have any.

  Constants and the like are shared by places that have nothing else in common.
  """
  names, seen = {operand}, set()
  while names:
    named = [graph[name].op_name for name in names if graph[name].operands]
    near = [one for name in named for one in places.split(name)]
    if found := places.of_names(near):
      return found
    seen |= names
    names = {o for n in names for o in graph[n].operands} - seen
  return None


def _graph(lines: list[str]) -> Graph:
  """The instructions of a computation by their names."""
  graph = {}
  for line in lines:  # in the order in which they are computed
    match = _INSTRUCTION.match(line)
    if not match:
      continue
    used = re.findall(r"%([\w.-]+)", line[match.end() :])
    used = [name for name in used if name in graph]
    if match[2] == "get-tuple-element":
      index = int(re.search(r"index=(\d+)", line)[1])
      used = _of_tuple(used[0], index, graph)
    graph[_defined(line)] = Instruction(match[2], _name_of(line), used)
  return graph


def _of_tuple(name: str, index: int, graph: Graph) -> list[str]:
  """What an element is made of: of a joined collective its own operand."""
  kind, start = graph[name].kind, name
  if kind.endswith("-done"):
    start = graph[name].operands[0]
  operands = graph[start].operands
  joined = kind.removesuffix("-done") in COLLECTIVES and len(operands) > index
  return [operands[index]] if joined else [name]


def _defined(line: str) -> str:
  return re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)[1]


def _name_of(line: str) -> str:
  found = re.search(r'op_name="([^"]*)"', line)
  return found[1] if found else ""


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


def _results(shape: str, kind: str) -> list[str]:
  """The arrays of a result, without layouts.

  What is only started has its operands before them, and marks behind: they are
  the second of its parts. But an all-reduce has them alone.
  """
  shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/|\s", "", shape)
  if kind.endswith("-start") and kind != "all-reduce-start":
    parts = re.findall(r"\([^()]*\)|\w+\[[\d,]*\]", shape[1:-1])
    shape = parts[1] if len(parts) > 1 else shape
  return re.findall(r"\w+\[[\d,]*\]", shape)


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

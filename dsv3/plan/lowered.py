"""What a compiled step holds, sends and should not do: as a table, as values."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv3 import config
from dsv3.plan import hlo, places


class Sent(NamedTuple):
  """All collectives of a kind in one part of a step; bytes are of results on a
  device. A part is so many layers, each of which runs in every microbatch."""

  place: str
  layers: int
  microbatches: int
  kind: str
  number: int  # in the whole step
  bytes: int  # of all of them

  @property
  def runs(self) -> int:
    return self.layers * self.microbatches


@dataclasses.dataclass(frozen=True)
class Lowered:
  """What the compiler has made of a step; bytes are of one device."""

  target: str
  mesh: config.Mesh
  arguments: int  # state and batch
  outputs: int  # that are no argument's memory
  temporary: int
  collectives: list[hlo.Collective]
  times: dict[str, tuple[int, int]]  # layers and microbatches of every part
  shared: hlo.Meanwhile  # products of shared experts, during an exchange
  surprises: list[str]
  trace_seconds: float
  compile_seconds: float

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporary

  def sent(self) -> list[Sent]:
    """Collectives by place and kind, in the order of a step; the sure ones."""
    totals = collections.Counter()
    for one in self.collectives:
      if one.sure:
        totals[one.place, one.kind, "number"] += one.count
        totals[one.place, one.kind, "bytes"] += one.count * one.bytes
    order = list(places.PARTS)
    found = {(place, kind) for place, kind, _ in totals}
    rows = sorted(found, key=lambda r: (order.index(r[0].part), r[0], r[1]))
    return [
      Sent(
        str(place),
        *self.times[place.part],
        kind,
        totals[place, kind, "number"],
        totals[place, kind, "bytes"],
      )
      for place, kind in rows
    ]

  def as_dict(self) -> dict[str, Any]:
    """The same as values; bytes are of one device."""
    sent = [
      row._asdict()
      | {
        "number_each": row.number / row.runs,
        "bytes_each": row.bytes / row.runs,
      }
      for row in self.sent()
    ]
    return {
      "target": self.target,
      "mesh": str(self.mesh),
      "bytes": {
        "total": self.total,
        "arguments": self.arguments,
        "outputs": self.outputs,
        "temporary": self.temporary,
      },
      "sent": sent,
      "shared": self.shared._asdict(),
      "surprises": self.surprises,
      "trace_seconds": self.trace_seconds,
      "compile_seconds": self.compile_seconds,
    }

  def text(self) -> str:
    """A table for people."""
    lines = [
      f"{self.target}, {self.mesh}: traced in {self.trace_seconds:.1f} s, "
      f"compiled in {self.compile_seconds:.1f} s",
      f"a device holds {self.total / 1e9:,.2f} GB: arguments "
      f"{self.arguments / 1e9:,.2f}, outputs {self.outputs / 1e9:,.2f}, "
      f"temporary {self.temporary / 1e9:,.2f}",
    ]
    sure = [one for one in self.collectives if one.sure]
    lines += ["", *_table(self.sent()), "", *_largest(sure), ""]
    if len(sure) < len(self.collectives):
      more = sum(c.count * c.bytes for c in self.collectives if not c.sure)
      lines.append(
        f"and at most {more / 1e9:,.3f} GB in further rounds of the exchange"
      )
    if self.shared.all:
      lines.append(
        f"shared experts: {self.shared.inside} of {self.shared.all} products "
        "while rows are on their way to routed ones or back"
      )
    lines += [f"SURPRISE: {text}" for text in self.surprises]
    return "\n".join(lines)


def _table(sent: Sequence[Sent]) -> list[str]:
  """What is sent in each layer of each kind, and in a step."""
  number = places.rounded
  lines = [
    f"{'sent by a device':<22}{'layers x times':>15}  {'':<18}"
    f"{'in each':>8}{'MB':>12}{'GB a step':>12}"
  ]
  for row in sent:
    lines.append(
      f"{row.place:<22}{f'{row.layers} x {row.microbatches}':>15}  "
      f"{row.kind:<18}{number(row.number / row.runs):>8}"
      f"{row.bytes / row.runs / 1e6:>12,.3f}{row.bytes / 1e9:>12,.3f}"
    )
  return lines


def _largest(found: Sequence[hlo.Collective]) -> list[str]:
  """The bytes of every kind, and its four largest."""
  by_kind = collections.Counter()
  for one in found:
    by_kind[one.kind] += one.count * one.bytes
  lines = []
  for kind, n_bytes in by_kind.most_common():
    lines.append(f"{kind}: {n_bytes / 1e9:,.3f} GB a step, results on a device")
    mine = [one for one in found if one.kind == kind]
    mine.sort(key=lambda c: -c.count * c.bytes)
    for c in mine[:4]:
      mb = f"{c.bytes / 1e6:10,.3f} MB"
      lines.append(f"  {c.count:5} x {mb}  {c.place}: {_short(c.result)}")
  return lines


def _short(result: str, most: int = 3) -> str:
  """The largest of a result's arrays, and how many more."""
  arrays = sorted(result.split(), key=hlo.size, reverse=True)
  more = f" and {len(arrays) - most} more" if len(arrays) > most else ""
  return " ".join(arrays[:most]) + more

"""The plan in a terminal."""

import textwrap
from collections.abc import Sequence

from dsv3.plan import count, fitted, serve
from dsv3.plan.answer import Plan
from dsv3.plan.unit import cache_bytes, weight_bytes

BAR = 24  # characters of the longest bar


def si(value: float, unit: str) -> str:
  """A quantity with a prefix, three figures.

  >>> si(67.1e9, "B"), si(70_272, "B"), si(19.9, "s"), si(0.0021, "s")
  ('67.1 GB', '70.3 KB', '19.9 s', '2.1 ms')
  >>> si(40_400, "s")
  '11.2 h'
  """
  if unit == "s":
    for name, size in (("d", 86_400), ("h", 3600), ("min", 60)):
      if value >= 2 * size:
        return f"{value / size:.3g} {name}"
    if 0 < value < 1:
      return si(value * 1e3, "ms") if value > 1e-3 else si(value * 1e6, "us")
  for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):  # fmt: skip
    if abs(value) >= size:
      return f"{value / size:.3g} {prefix}{unit}"
  return f"{value:.3g} {unit}"


def big(n: float) -> str:
  """A count as people say it.

  >>> big(671_026_419_200), big(14.8e12), big(2_664_000)
  ('671B', '14.8T', '2.66M')
  """
  for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
    if n >= size:
      return f"{n / size:.3g}{letter}"
  return f"{n:.3g}"


def table(
  head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
) -> list[str]:
  """Columns of equal width; the first `left` lean left, the others right."""
  widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

  def line(row):
    cells = [
      f"{x:<{w}}" if i < left else f"{x:>{w}}"
      for i, (x, w) in enumerate(zip(row, widths))
    ]
    return "  " + "  ".join(cells).rstrip()

  return [line(head), *map(line, rows)]


def bars(parts: dict[str, float], unit: str, total: float) -> list[str]:
  """One line a part, largest first, with its share and a bar."""
  most, lines = max(parts.values()), []
  width = max(map(len, parts))
  for name, value in sorted(parts.items(), key=lambda item: -item[1]):
    bar = "█" * max(1, round(BAR * value / most))
    share = value / total
    lines.append(
      f"  {name:<{width}}  {si(value, unit):>9}  {share:>4.0%}  {bar}"
    )
  return lines


def text(plan: Plan, *, search: bool = False) -> str:
  """The whole answer; `search` adds the ranking of arrangements."""
  blocks = [_head(plan), _counts(plan)]
  if plan.training:
    blocks += [_layout(plan), _memory(plan), _time(plan), _network(plan)]
    blocks += [_cost(plan)]
    if search:
      blocks.append(_search(plan))
  if plan.serving:
    blocks.append(_serving(plan))
  if plan.warnings:
    blocks.append([f"! {warning}" for warning in plan.warnings])
  return "\n\n".join("\n".join(block) for block in blocks)


def _head(plan: Plan) -> list[str]:
  c = plan.chip
  fp8 = f"{c.fp8 / 1e12:,.0f} in FP8" if c.fp8 > c.bf16 else "no FP8"
  return [
    f"{plan.values.name} on {plan.n_chips:,} x {c.name}, Linears in "
    f"{plan.precision}, {plan.values.data.seq_len:,} positions",
    f"  a chip: {c.bf16 / 1e12:,.0f} TFLOP/s in BF16, {fp8}; "
    f"{c.hbm / 1e9:,.0f} GB at {c.hbm_rate / 1e12:.3g} TB/s;",
    f"  {c.link_rate / 1e9:,.3g} GB/s one way among {c.domain}, "
    f"{c.network_rate / 1e9:,.3g} GB/s beyond",
    f"  {c.source}",
  ]


def _counts(plan: Plan) -> list[str]:
  n, model, seq_len = (
    plan.parameters,
    plan.values.model,
    plan.values.data.seq_len,
  )
  flops = lambda **kwargs: count.flops_per_token(model, seq_len, **kwargs)
  cache = count.cache_bytes_per_token(model)
  a = model.attention
  lines = [
    "COUNTS",
    f"  parameters {n.main:,} main, {n.mtp:,} MTP; {n.active:,} active",
    "  by part    "
    + ", ".join(f"{part} {big(v)}" for part, v in n.by_part.items()),
    f"  FLOPs of a token in training, causal: {flops() / 1e9:.4g} G "
    f"({flops(mtp=False) / 1e9:.4g} without MTP, "
    f"{flops(recompute=True) / 1e9:.4g} with recomputation, "
    f"{flops(mtp=False, causal=False) / 1e9:.4g} of the full matrix without MTP); "
    f"forward {flops() / 3e9:.4g}",
    f"  cache of a token in BF16: {si(cache[a.kind], 'B')}; "
    + ", ".join(
      f"{kind.upper()} {si(v, 'B')} ({v / cache[a.kind]:.3g} times)"
      for kind, v in cache.items()
      if kind != a.kind
    ),
  ]
  return _wrapped(lines)


def _wrapped(lines: list[str]) -> list[str]:
  return [
    part
    for line in lines
    for part in textwrap.wrap(line, 80, subsequent_indent="             ")
  ]


def _layout(plan: Plan) -> list[str]:
  one = plan.training
  layout = one.layout
  schedule = layout.schedule
  if layout.virtual > 1:
    schedule += f" of {layout.virtual} chunks"
  rows = layout.batch / layout.mesh.ranks / layout.microbatches
  return [
    "LAYOUT",
    f"  mesh {layout.mesh}; pipeline {schedule}; recomputation {one.remat}",
    f"  {layout.batch:,} sequences a step = {layout.mesh.ranks:,} ranks x "
    f"{layout.microbatches} microbatches x {rows:g}",
    _chosen(plan),
  ]


def _chosen(plan: Plan) -> str:
  n = plan.found.considered
  if n == 1:
    return "  as given"
  if not plan.memory.fits:
    return f"  none of {n:,} arrangements considered fits; this lacks the least"
  return f"  the fastest of {n:,} arrangements considered"


def _memory(plan: Plan) -> list[str]:
  m = plan.memory
  fits = "fits" if m.fits else "DOES NOT FIT"
  return [
    f"MEMORY of the fullest chip: {si(m.total, 'B')} of "
    f"{si(m.capacity, 'B')}, {fits}",
    *bars({k: v for k, v in m.parts.items() if v}, "B", m.total),
    "  activations by recomputation: "
    + ", ".join(f"{k} {si(v, 'B')}" for k, v in plan.by_remat().items()),
  ]


def _time(plan: Plan) -> list[str]:
  s = plan.step
  low, expected, high = s.range()
  fast, _, slow = s.seconds_range()
  at_low, at_high = (s.mfu * factor for factor in s.factors)
  flops = s.tokens_chip * s.flops_token
  own = count.flops_per_token(
    plan.values.model, plan.values.data.seq_len, mtp=False
  )
  rates = {k: v for k, v in plan.rates().items() if k != "high"}
  lines = [
    "  reached, TFLOP/s: "
    + ", ".join(f"{k} {v / 1e12:,.0f}" for k, v in rates.items())
    + "; memory and links at 0.8 of their sheets"
  ]
  if bubbles := plan.by_schedule():
    lines.append(
      "  bubble by schedule: "
      + ", ".join(f"{k} {si(v, 's')}" for k, v in bubbles.items())
    )
  return [
    f"STEP {si(s.step_seconds, 's')} ({si(fast, 's')} to {si(slow, 's')}), "
    f"most of it {s.binds}",
    *bars(s.seconds, "s", s.step_seconds),
    f"  tokens/s a chip: {low:,.0f} low, {expected:,.0f} expected, "
    f"{high:,.0f} high; {s.tokens_chip * plan.n_chips:,.0f} in all",
    f"  {flops / 1e12:,.0f} model TFLOP/s a chip, MFU {s.mfu:.1%} of the BF16 "
    f"peak ({at_low:.1%} to {at_high:.1%};",
    f"  {s.mfu * own / s.flops_token:.1%} without MTP)",
    *_wrapped(lines),
  ]


def _network(plan: Plan) -> list[str]:
  per = {
    "layer": "a layer, microbatch",
    "microbatch": "a microbatch",
    "step": "a step",
  }
  rows = [
    (
      c.name,
      c.axis,
      si(c.bytes_each, "B"),
      per[c.per],
      si(c.seconds, "s"),
    )
    for c in plan.step.collectives
  ]
  if not rows:
    return ["NETWORK", "  none: one chip"]
  head = ("sent by a chip", "axis", "bytes", "", "of a step")
  return [
    "NETWORK, before what hides behind compute",
    *table(head, rows, left=2),
  ]


def _cost(plan: Plan) -> list[str]:
  fewest, expected, most = plan.chip_hours
  days = expected / plan.n_chips / 24
  lines = [
    f"BUDGET of {big(plan.tokens)} tokens",
    f"  chip-hours: {big(expected)} expected ({big(fewest)} low to {big(most)} high), "
    f"{days:,.3g} days",
  ]
  lines = _wrapped(lines)
  if plan.price is not None:
    lines.append(
      f"  at ${plan.price:g} a chip-hour: ${big(expected * plan.price)} "
      f"(${big(fewest * plan.price)} to ${big(most * plan.price)})"
    )
  else:
    lines.append("  no price is published for this chip; give --price")
  return lines


def _search(plan: Plan) -> list[str]:
  best = plan.found.ranked[0]
  rows = []
  for one in plan.found.ranked:
    layout = one.layout
    name = layout.schedule + (
      f"/{layout.virtual}" if layout.virtual > 1 else ""
    )
    rows.append(
      (
        str(layout.mesh),
        f"{name}, {layout.microbatches}x",
        one.remat,
        f"{one.step.tokens_chip:,.0f}",
        si(one.memory.total, "B"),
        one.compared(best),
      )
    )
  head = ("mesh", "schedule", "remat", "tok/s", "memory", "against the best")
  return [
    f"SEARCH: {plan.found.considered:,} arrangements, "
    f"{plan.found.too_large:,} too large; the fastest that fit",
    *table(head, rows, left=3),
  ]


def _serving(plan: Plan) -> list[str]:
  unit, rows = plan.unit, []
  for row in plan.serving:
    d, p = row.decode, row.prefill
    reading = (f"{p.tokens_chip:,.0f}", si(p.latency, "s")) if p else ("-", "-")
    cells = ["-"] * 6
    if d:
      cells = [
        f"{d.batch:.3g} of {d.fitting:,.3g}",
        f"{d.tokens_chip:,.0f}",
        f"{d.tokens_user:,.1f}",
        f"{d.latency * 1e3:,.0f} ms",
        d.binds,
        f"{row.speedup:.2f}",
      ]
    rows.append(
      (
        f"{row.context // 1024}K",
        *reading,
        *cells,
      )
    )
  head = (
    "context", "prefill/s", "a prompt", "batch", "decode/s", "user/s", "step",
    "binds", "MTP",
  )  # fmt: skip
  tensor = f", attention TP {unit.tensor}" if unit.tensor > 1 else ""
  model, low_high = plan.values.model, fitted.SERVED_SPREAD
  held = sum(weight_bytes(model, unit).values())
  one = cache_bytes(model, unit, 4096)
  intensity = serve.absorbed_flops(model) * model.n_layers
  intensity /= count.cache_bytes_per_token(model, unit.cache)["mla"]
  ridge = plan.chip.bf16 / plan.chip.hbm_rate
  notes = [
    f"  a chip holds {si(held, 'B')} of weights, {si(one, 'B')} of cache for 4K "
    f"of a sequence ({unit.cache})",
    f"  absorbed attention does {intensity:.0f} FLOPs a byte of cache; the "
    f"chip's ridge is {ridge:.0f}",
    f"  MTP: speed-up at {plan.accepted:.0%} acceptance; servers whose speed is "
    f"published decode at {low_high[0]:.2f} to {low_high[1]:.2f} of their plan",
  ]
  served = [row for row in plan.serving if row.decode]
  for row in served[:: max(1, len(served) - 1)]:  # the first and the last
    m = row.decode.memory
    parts = sorted(m.parts.items(), key=lambda item: -item[1])
    notes.append(
      f"  memory at {row.context // 1024}K: {si(m.total, 'B')} of "
      f"{si(m.capacity, 'B')}: "
      + ", ".join(f"{name} {si(v, 'B')}" for name, v in parts if v)
    )
  return [
    f"SERVING by units of {unit.chips} chips{tensor}: tokens/s and sequences of "
    "a chip",
    *table(head, rows),
    *_wrapped(notes),
  ]

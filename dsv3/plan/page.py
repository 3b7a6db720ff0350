"""The plan as one page that needs nothing else: text, tables and plots in SVG."""

import math
from collections.abc import Sequence
from html import escape

from dsv3.plan import report
from dsv3.plan.answer import Plan
from dsv3.plan.report import big, si

_STYLE = """
:root { --ink: #1b1f24; --soft: #667085; --line: #d8dde4; --back: #fff;
  --a: #2f6fde; --b: #d9622b; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4b2; --line: #353c46; --back: #14171b;
    --a: #6ea1ff; --b: #f0915f; --card: #1c2127; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--back); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr));
  gap: .75rem; margin: 1.25rem 0; }
.figures div { background: var(--card); border-radius: .5rem; padding: .75rem; }
.figures b { display: block; font-size: 1.25rem; }
.figures span { color: var(--soft); font-size: .85rem; }
pre { background: var(--card); border-radius: .5rem; padding: .9rem;
  overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
svg { width: 100%; height: auto; } text { fill: var(--ink); font-size: 13px; }
.soft { fill: var(--soft); } .warn { color: var(--b); }
"""


def html(plan: Plan) -> str:
  """The page: figures first, then plots, then all that the terminal shows."""
  title = (
    f"{plan.values.name} on {plan.n_chips:,} x {plan.chip.name}, "
    f"{plan.precision}"
  )
  parts = [f"<h1>{escape(title)}</h1>"]
  parts += [f'<p class="warn">{escape(w)}</p>' for w in plan.warnings]
  parts.append(_figures(plan))
  if plan.training:
    m, s = plan.memory, plan.step
    room = f"{si(m.total, 'B')} of {si(m.capacity, 'B')}"
    parts += [
      f"<h2>Memory of the fullest chip: {room}</h2>",
      bars(m.parts, "B"),
      f"<h2>Time of a step: {si(s.step_seconds, 's')}</h2>",
      bars(s.seconds, "s"),
    ]
  served = [row for row in plan.serving if row.decode]
  if served and not plan.training:
    one = served[0].decode
    at = f"decoding at {served[0].context // 1024}K, {one.batch:g} a chip"
    parts += [
      f"<h2>Memory of a chip, {at}: {si(one.memory.total, 'B')} of "
      f"{si(one.memory.capacity, 'B')}</h2>",
      bars(one.memory.parts, "B"),
      f"<h2>Time of a step, {at}: {si(one.latency, 's')}</h2>",
      bars(one.seconds, "s"),
    ]
  read = [row for row in plan.serving if row.prefill]
  if read:
    curves = {"prefill": [(r.context, r.prefill.tokens_chip) for r in read]}
    curves["decode"] = [(r.context, r.decode.tokens_chip) for r in served]
    parts += [
      "<h2>Tokens/s of a chip against context length</h2>",
      f"<p>Units of {plan.unit.chips} chips; decoding with the largest batch "
      "that fits, powers of two</p>",
      lines({k: v for k, v in curves.items() if v}),
    ]
  parts += [
    "<h2>All of it</h2>",
    f"<pre>{escape(report.text(plan, search=bool(plan.found)))}</pre>",
  ]
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    + "\n".join(parts)
    + "</body></html>\n"
  )


def _figures(plan: Plan) -> str:
  n = plan.parameters
  figures = [(big(n.main), f"parameters, {big(n.active)} active")]
  if plan.training:
    low, expected, high = plan.step.range()
    fewest, hours, most = plan.chip_hours
    figures += [
      (f"{expected:,.0f} tokens/s", f"a chip; {low:,.0f} to {high:,.0f}"),
      (f"{plan.step.mfu:.1%}", "MFU of the BF16 peak"),
      (f"{big(hours)} chip-hours", f"for {big(plan.tokens)} tokens; "
       f"{big(fewest)} to {big(most)}"),
      (plan.step.binds, "takes most of the step"),
    ]  # fmt: skip
    if plan.price is not None:
      figures.append(
        (f"${big(hours * plan.price)}", f"at ${plan.price:g} a chip-hour")
      )
  cells = [
    f"<div><b>{escape(big)}</b><span>{escape(small)}</span></div>"
    for big, small in figures
  ]
  return f'<div class="figures">{"".join(cells)}</div>'


def bars(parts: dict[str, float], unit: str) -> str:
  """Horizontal bars, the largest first."""
  rows = sorted((x for x in parts.items() if x[1] > 0), key=lambda x: -x[1])
  most, total = rows[0][1], sum(value for _, value in rows)
  shapes = []
  for i, (name, value) in enumerate(rows):
    y, width = 26 * i, max(1.5, 470 * value / most)
    shapes.append(
      f'<text x="165" y="{y + 17}" text-anchor="end">{escape(name)}</text>'
      f'<rect x="175" y="{y + 4}" width="{width:.1f}" height="18" rx="3" '
      f'fill="var(--a)"/><text class="soft" x="{183 + width:.1f}" '
      f'y="{y + 17}">{si(value, unit)}, {value / total:.0%}</text>'
    )
  return _svg(760, 26 * len(rows) + 6, shapes)


def lines(curves: dict[str, Sequence[tuple[float, float]]]) -> str:
  """Curves over two logarithmic axes, each named at its end."""
  points = [p for curve in curves.values() for p in curve]
  x0, x1 = (f(p[0] for p in points) for f in (min, max))
  y0 = 10 ** math.floor(math.log10(min(p[1] for p in points)))
  y1 = 10 ** math.ceil(math.log10(max(p[1] for p in points)))
  x1, y1 = max(x1, 2 * x0), max(y1, 10 * y0)  # of a single point too
  place_x = lambda x: 70 + 580 * math.log(x / x0) / math.log(x1 / x0)
  place_y = lambda y: 300 - 280 * math.log(y / y0) / math.log(y1 / y0)
  shapes, y = [], y0
  while y <= y1 * 1.01:
    h = place_y(y)
    shapes.append(
      f'<line x1="70" x2="650" y1="{h:.1f}" y2="{h:.1f}" stroke="var(--line)"/>'
      f'<text class="soft" x="62" y="{h + 4:.1f}" text-anchor="end">{y:,g}</text>'
    )
    y *= 10
  for x in sorted({p[0] for p in points}):
    shapes.append(
      f'<text class="soft" x="{place_x(x):.1f}" y="322" '
      f'text-anchor="middle">{x // 1024}K</text>'
    )
  for colour, (name, curve) in zip(("var(--a)", "var(--b)"), curves.items()):
    at = [(place_x(x), place_y(y)) for x, y in curve]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    shapes.append(
      f'<polyline points="{path}" fill="none" stroke="{colour}" '
      'stroke-width="2.5"/>'
    )
    shapes += [
      f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
      for x, y in at
    ]
    shapes.append(
      f'<text x="{at[-1][0] + 12:.1f}" y="{at[-1][1] + 4:.1f}" '
      f'style="fill: {colour}">{name}</text>'
    )
  return _svg(760, 335, shapes)


def _svg(width: int, height: int, shapes: list[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width} {height}" role="img" '
    f'xmlns="http://www.w3.org/2000/svg">{"".join(shapes)}</svg>'
  )

"""A comparison as one HTML page that needs nothing else: no script, no link."""

import html
import json
from collections.abc import Sequence

from dsv3.lab import plots, table
from dsv3.lab.compare import Comparison
from dsv3.lab.experiment import Experiment
from dsv3.lab.results import Line

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem;
  padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; white-space: nowrap;
  border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
.better td:nth-child(7) { color: #00724f; font-weight: 600; }
.worse td:nth-child(7) { color: #b3261e; font-weight: 600; }
pre { white-space: pre-wrap; }
"""
_HOW = """\
Differences are paired by seed: the same text in the same order, the same first
weights where shapes allow. The interval is a bootstrap over seeds, stretched
for how few they are; it is of one arm against the baseline, with no correction
for the number of arms. Curves are means over seeds of an average with decay
0.9, shades their least and largest. The grey band is 0.005 nats either way."""


def page(
  asked: Experiment,
  found: Sequence[Comparison],
  lines: dict[str, list[Line]],
  *,
  relative: bool = False,
) -> str:
  """The page: a table and a picture a metric, then every run."""
  title = f"{asked.name}: {', '.join(asked.arms)}"
  parts = [f"<h1>{_text(asked.name)}</h1>"]
  for i, comparison in enumerate(found):
    figure = (
      plots.svg(plots.draw_curves(comparison, lines, relative=relative))
      if i == 0
      else plots.svg(plots.draw_forest_alone(comparison))
    )
    parts += [
      f"<h2>{_text(comparison.metric)}</h2>",
      _table(comparison),
      f'<figure class="wide">{_drawing(figure, f"m{i}-")}</figure>',
    ]
  parts.append("".join(f"<p>{_text(note)}</p>" for note in found[0].notes))
  parts += [f"<p>{_text(_HOW)}</p>", "<h2>Runs</h2>", _runs(lines)]
  body = "\n".join(parts)
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width">\n'
    f"<title>{_text(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n"
    f"<body>\n{body}\n</body>\n</html>\n"
  )


def _drawing(svg: str, prefix: str) -> str:
  """The <svg> element alone, with ids of its own on the page."""
  svg = svg[svg.index("<svg") :]
  for mark in ('id="', 'href="#', "url(#"):
    svg = svg.replace(mark, mark + prefix)
  return svg


def _table(found: Comparison) -> str:
  head = "".join(f"<th>{_text(name)}</th>" for name in table.columns(found))
  rows = [
    f'<tr class="{row.verdict.split()[0]}">'
    + "".join(f"<td>{_text(x)}</td>" for x in table.cells(found, row))
    + "</tr>"
    for row in found.rows
  ]
  return (
    f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


def _runs(lines: dict[str, list[Line]]) -> str:
  heads = (
    "arm seed loss bits/byte MaxVio steps tokens FLOPs time commit".split()
  )
  rows = []
  for name, found in lines.items():
    for line in found:
      rows.append([name, str(line["seed"]), *_run_cells(line)])
  head = "".join(f"<th>{_text(h)}</th>" for h in heads)
  body = "".join(
    "<tr>" + "".join(f"<td>{_text(x)}</td>" for x in row) + "</tr>"
    for row in rows
  )
  diffs = "".join(
    f"<dt>{_text(name)}</dt><dd><code>"
    f"{_text(json.dumps(found[0]['diff']))}</code></dd>"
    for name, found in lines.items()
  )
  return (
    f"<dl>{diffs}</dl>"
    f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def _run_cells(line: Line) -> list[str]:
  final, seconds = line.get("final", {}), line.get("wall_seconds")
  dirty = ", changed" if line.get("dirty") else ""
  scores = [
    table.number(final.get(k)) for k in ("loss", "bits_per_byte", "max_vio")
  ]
  if line["error"]:
    scores[0] = f"failed: {line['error'][:80]}"
  return [
    *scores,
    f"{line['steps']:,}",
    f"{line['tokens']:,}",
    f"{line['flops']:.3g}",
    f"{seconds:,.0f} s" if seconds else "",
    f"{line.get('commit', '')[:7]}{dirty}",
  ]


def _text(text: str) -> str:
  return html.escape(text)

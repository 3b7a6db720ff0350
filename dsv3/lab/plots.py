"""Pictures of a comparison: curves, differences with their intervals, table."""

import io
import pathlib

import numpy as np

from dsv3.eval.heatmap import figure_class
from dsv3.lab import curves, table
from dsv3.lab.compare import EFFECT, MATCHES, Comparison, whole
from dsv3.lab.results import Line

# Okabe and Ito's, told apart by most eyes; then again with dashes.
_COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
_DASHES = ("-", "--", ":", "-.")
_POINTS = 300  # drawn of a curve
_UNIT = {"step": "step", "flops": "FLOPs", "tokens": "tokens"}


def style(i: int) -> dict[str, str]:
  """Colour and dash of arm number `i`."""
  dash = _DASHES[i // len(_COLOURS) % len(_DASHES)]
  return {"color": _COLOURS[i % len(_COLOURS)], "linestyle": dash}


def draw_curves(
  found: Comparison, lines: dict[str, list[Line]], *, relative: bool = False
):
  """Figure: training loss, its difference to the baseline, MaxVio, and forest."""
  lines = whole(lines)
  has_vio = any(
    "max_vio" in x.get("curve", {}) for a in lines.values() for x in a
  )
  shape = (2, 2) if has_vio else (1, 3)
  figure = figure_class()(
    figsize=(4.8 * shape[1], 3.4 * shape[0] + 0.5), layout="constrained"
  )
  axes = figure.subplots(*shape).flat
  x = MATCHES.get(found.match or "", "step")
  x = x if x in _UNIT else "step"
  loss, gap, *vio, forest = axes
  _curves(loss, lines, "loss/main", x)
  loss.set_title("training loss, nats a token", fontsize=10)
  _gaps(gap, found, lines, x, relative)
  for axis in vio:
    _curves(axis, lines, "max_vio", x)
    axis.set_title("MaxVio of a batch", fontsize=10)
    axis.set_ylim(bottom=0)
  for axis in (loss, gap, *vio):
    axis.set_xlabel(_UNIT[x])
    axis.grid(alpha=0.25)
  draw_forest(forest, found)
  handles, labels = loss.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=min(len(labels), 6)
  )
  return figure


def _curves(axis, lines: dict[str, list[Line]], name: str, x: str) -> None:
  floor = []
  for i, (arm, found) in enumerate(lines.items()):
    if curve := curves.of_arm(found, name, x):
      _line(axis, curve, arm, i)
      floor += list(curve.mean[np.isfinite(curve.mean)])
  if floor:  # the first steps would press all arms into one line
    low, high = min(floor), float(np.quantile(floor, 0.9))
    margin = max(high - low, 1e-3)
    axis.set_ylim(low - 0.05 * margin, high + 0.1 * margin)


def _gaps(axis, found: Comparison, lines, x: str, relative: bool) -> None:
  base = lines[found.baseline]
  for i, (arm, ours) in enumerate(lines.items()):
    gap = curves.difference(ours, base, "loss/main", x, relative=relative)
    if gap and arm != found.baseline:
      scaled = [100 * y for y in gap[1:]] if relative else gap[1:]
      _line(axis, curves.Curve(gap.x, *scaled), arm, i)
  axis.axhline(0, color="grey", linewidth=0.8)
  unit = "% of it" if relative else "nats"
  axis.set_title(f"training loss minus {found.baseline}, {unit}", fontsize=10)


def _line(axis, curve: curves.Curve, name: str, i: int) -> None:
  every = max(1, -(-len(curve.x) // _POINTS))
  x, mean, low, high = (part[::every] for part in curve)
  axis.plot(x, mean, label=name, linewidth=1.4, **style(i))
  axis.fill_between(x, low, high, color=style(i)["color"], alpha=0.15, lw=0)


def draw_forest(axis, found: Comparison) -> None:
  """Every arm's paired differences, a point a seed, and the interval."""
  rows = [row for row in found.rows if row.name != found.baseline]
  order = {row.name: i for i, row in enumerate(found.rows)}
  for y, row in enumerate(rows):
    colour = style(order[row.name])["color"]
    points = list(row.differences.values())
    axis.plot(points, [y] * len(points), "o", color=colour, ms=4, alpha=0.6)
    if row.interval:
      mean, low, high = row.interval
      axis.plot([low, high], [y + 0.18] * 2, color=colour, linewidth=2)
      axis.plot([mean], [y + 0.18], "D", color=colour, ms=5)
  axis.axvline(0, color="grey", linewidth=0.8)
  if "loss" in found.metric:
    axis.axvspan(-EFFECT, EFFECT, color="grey", alpha=0.12, lw=0)
  names = [f"{row.name}\n{row.verdict}" for row in rows]
  axis.set_yticks(range(len(rows)), names, fontsize=8)
  axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
  title = f"{found.metric} minus {found.baseline}: seeds, mean, 95%"
  axis.set_title(title, fontsize=10)
  axis.locator_params(axis="x", nbins=6)  # more have no room for +-0.025
  axis.grid(axis="x", alpha=0.25)


def draw_forest_alone(found: Comparison):
  """Figure: the differences in one metric."""
  figure = figure_class()(
    figsize=(7, 1.2 + 0.45 * len(found.rows)), layout="constrained"
  )
  draw_forest(figure.subplots(), found)
  return figure


def draw_table(found: Comparison):
  """Figure: the table, for slides and pages that take only pictures."""
  heads = table.columns(found)
  rows = [table.cells(found, row) for row in found.rows]
  widths = [max(map(len, column)) for column in zip(heads, *rows)]
  size = 0.1 * sum(widths) + 0.3 * len(heads), 0.3 * (len(rows) + 1) + 0.2
  figure = figure_class()(figsize=size)
  axis = figure.add_axes((0, 0, 1, 1))
  axis.set_axis_off()
  shares = [(0.1 * w + 0.3) / size[0] for w in widths]
  drawn = axis.table(
    rows, colLabels=heads, colWidths=shares, cellLoc="left", bbox=(0, 0, 1, 1)
  )
  drawn.auto_set_font_size(False)
  drawn.set_fontsize(9)
  for (y, _), cell in drawn.get_celld().items():
    cell.set_linewidth(0.4)
    if y == 0:
      cell.set_text_props(weight="bold")
  return figure


def save(figure, stem: pathlib.Path) -> list[pathlib.Path]:
  """`stem`.png and `stem`.svg."""
  paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
  figure.savefig(paths[0], dpi=130)
  paths[1].write_text(svg(figure))
  return paths


def svg(figure) -> str:
  """The figure as SVG, the same text for the same results."""
  import matplotlib

  with matplotlib.rc_context({"svg.hashsalt": "dsv3", "svg.fonttype": "none"}):
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
  return out.getvalue()

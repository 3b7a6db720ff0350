"""The table and the picture of what quantisation costs (`train/watch.py`)."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3.eval.heatmap import cells, figure_class

PASSES = ("fprop", "dgrad", "wgrad")
_OPERANDS = {"fprop": "xw", "dgrad": "gw", "wgrad": "xg"}
_HEADER = (
  "linear",
  "pass",
  "error",
  "worst",
  "at",
  "underflow",
  "saturation",
  "log2 of scales",
)


def kinds(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
  """Layers in their order (`moe.0`) and kinds of Linear (`attention.w_o`)."""
  layers, names = {}, {}
  for row in rows:
    layer, kind = _split(row["linear"])
    layers[layer] = names[kind] = None
  order = ["dense", "moe", "mtp"]
  place = lambda layer: (
    order.index(layer.split(".")[0]),
    int(layer.split(".")[1]),
  )
  return sorted(layers, key=place), sorted(names)


def _split(linear: str) -> tuple[str, str]:
  stack, layer, kind = linear.split(".", 2)
  return f"{stack}.{layer}", kind.removeprefix("block.")


def table(rows: Sequence[dict[str, Any]]) -> str:
  """A line for each kind of Linear and pass, over all layers.

  Error: relative, of the matmul, mean and worst with the layer; underflow and
  saturation: shares of an operand's numbers, the worst of both operands; log2 of
  the smallest and the largest scale. What stays high in all layers has "-", in
  some of them is left out.
  """
  lines = [_HEADER]
  for kind in kinds(rows)[1]:
    for pass_ in PASSES:
      mine = [
        row
        for row in rows
        if row["pass"] == pass_ and _split(row["linear"])[1] == kind
      ]
      lines.append((kind, pass_, *_cells_of(mine, _OPERANDS[pass_])))
  widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
  return "\n".join(
    "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip()
    for line in lines
  )


def _cells_of(rows, operands: str) -> list[str]:
  """The table's columns of one kind of Linear and pass."""
  given = [row for row in rows if not np.isnan(row["error"])]
  if not given:
    return ["-"] * (len(_HEADER) - 2)
  worst = max(given, key=lambda row: row["error"])
  of_both = lambda name: [row[f"{o}_{name}"] for row in given for o in operands]
  return [
    f"{np.mean([row['error'] for row in given]):.4f}",
    f"{worst['error']:.4f}",
    _split(worst["linear"])[0],
    f"{np.nanmax(of_both('underflow')):.2%}",
    f"{np.nanmax(of_both('saturation')):.2%}",
    f"{np.nanmin(of_both('scale_min')):.1f} to "
    f"{np.nanmax(of_both('scale_max')):.1f}",
  ]


# Rows of the heat map under the errors: of an operand, and how a cell is made.
_OF_OPERAND = (
  ("underflow of {}, %", lambda row, o: 100 * row[f"{o}_underflow"]),
  ("saturation of {}, %", lambda row, o: 100 * row[f"{o}_saturation"]),
  (
    "scales of {}, octaves",
    lambda row, o: row[f"{o}_scale_max"] - row[f"{o}_scale_min"],
  ),
)


def draw(
  rows: Sequence[dict[str, Any]], path: str | pathlib.Path, *, title: str
) -> None:
  """Writes the heat map as PNG, SVG or PDF: kinds of Linear by layer.

  The first row of panels is the relative error of the three matmuls; under each
  are both of its operands: underflow, saturation, and how many octaves lie
  between the smallest and the largest scale. What stays high is grey.
  """
  layers, names = kinds(rows)
  width = max(0.4 * len(layers), 1.8)
  height = max(0.26 * len(names), 1.4)
  n_rows = 1 + len(_OF_OPERAND)
  size = 6 * (width + 0.45) + 1.6, n_rows * (height + 0.75) + 0.6
  figure = figure_class()(figsize=size, layout="constrained")
  grid = figure.add_gridspec(n_rows, 6)
  by_place = {(row["pass"], *_split(row["linear"])): row for row in rows}

  def panel(axis, pass_, value, label):
    found = np.full((len(names), len(layers)), np.nan)
    for y, name in enumerate(names):
      for x, layer in enumerate(layers):
        if row := by_place.get((pass_, layer, name)):
          found[y, x] = value(row)
    top = max(np.max(found[np.isfinite(found)], initial=0.0), 0.1)
    image = cells(axis, found, (0.0, float(top)), ".1f")
    figure.colorbar(image, ax=axis, fraction=0.05, aspect=20, pad=0.02)
    axis.set_title(label, fontsize=9)
    first = axis.get_subplotspec().colspan.start == 0
    axis.set_yticks(range(len(names)), names if first else [], fontsize=8)
    axis.set_xticks(range(len(layers)), layers, fontsize=8, rotation=60)

  for i, pass_ in enumerate(PASSES):
    axis = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
    error = lambda row: 100 * row["error"]
    panel(axis, pass_, error, f"{pass_}: error, %")
    for j, operand in enumerate(_OPERANDS[pass_]):
      for k, (label, value) in enumerate(_OF_OPERAND):
        axis = figure.add_subplot(grid[1 + k, 2 * i + j])
        of_it = lambda row, value=value, o=operand: value(row, o)
        panel(axis, pass_, of_it, label.format(operand))
  figure.suptitle(title, fontsize=12)
  figure.savefig(path, dpi=130)

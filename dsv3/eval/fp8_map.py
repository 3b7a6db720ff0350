"""The table and the picture of what quantisation costs (`train/watch.py`)."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3.eval.heatmap import cells, figure_class

PASSES = ("fprop", "dgrad", "wgrad")
_OPERANDS = {"fprop": "xw", "dgrad": "gw", "wgrad": "xg"}
_HEADER = ("linear", "pass", "error", "worst", "at", "underflow", "saturation")


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
  saturation: shares of an operand's numbers, the worst of both operands.
  """
  lines = [_HEADER]
  for kind in kinds(rows)[1]:
    for pass_ in PASSES:
      mine = [
        row
        for row in rows
        if row["pass"] == pass_ and _split(row["linear"])[1] == kind
      ]
      worst = max(mine, key=lambda row: np.nan_to_num(row["error"], nan=np.inf))
      share = lambda name, mine=mine, p=pass_: max(
        row[f"{place}_{name}"] for row in mine for place in _OPERANDS[p]
      )
      lines.append(
        (
          kind,
          pass_,
          f"{np.mean([row['error'] for row in mine]):.4f}",
          f"{worst['error']:.4f}",
          _split(worst["linear"])[0],
          f"{share('underflow'):.2%}",
          f"{share('saturation'):.2%}",
        )
      )
  widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
  return "\n".join(
    "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip()
    for line in lines
  )


def draw(
  rows: Sequence[dict[str, Any]], path: str | pathlib.Path, *, title: str
) -> None:
  """Writes the heat map as PNG, SVG or PDF: kinds of Linear by layer.

  Columns are the three matmuls; the first row of panels is the relative error,
  the others the underflow of each operand, in percent.
  """
  layers, names = kinds(rows)
  width = max(0.55 * len(layers), 2.2)
  height = max(0.3 * len(names), 1.5)
  size = 3 * width + 4.0, 3 * (height + 0.6) + 0.8
  figure = figure_class()(figsize=size, layout="constrained")
  axes = figure.subplots(3, 3, sharex=True, sharey=True, squeeze=False)
  by_place = {(row["pass"], *_split(row["linear"])): row for row in rows}
  for column, pass_ in enumerate(PASSES):
    a, b = _OPERANDS[pass_]
    panels = [
      ("error", 100, f"{pass_}: error, %"),
      (f"{a}_underflow", 100, f"underflow of {a}, %"),
      (f"{b}_underflow", 100, f"underflow of {b}, %"),
    ]
    for axis, (key, factor, label) in zip(axes[:, column], panels):
      grid = np.full((len(names), len(layers)), np.nan)
      for y, name in enumerate(names):
        for x, layer in enumerate(layers):
          if row := by_place.get((pass_, layer, name)):
            grid[y, x] = factor * row[key]
      top = max(float(np.nanmax(grid, initial=0.0)), 0.1)
      image = cells(axis, grid, (0.0, top), ".1f")
      figure.colorbar(image, ax=axis, fraction=0.05, aspect=20, pad=0.02)
      axis.set_title(label, fontsize=9)
      axis.set_yticks(range(len(names)), names, fontsize=8)
      axis.set_xticks(range(len(layers)), layers, fontsize=8, rotation=60)
  figure.suptitle(title, fontsize=12)
  figure.savefig(path, dpi=130)

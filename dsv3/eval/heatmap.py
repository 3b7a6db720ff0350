"""The picture of a needle-in-a-haystack evaluation (Fig. 8)."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3.config import ConfigError

_CELL = 0.62, 0.44  # inches
_NAMES = {
  "recall": "share of right answers",
  "log_prob": "log-probability of an answer's token, nats",
}


def figure_class():
  """matplotlib's Figure; ConfigError without the package."""
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ConfigError(
      'heat map: wanted the package matplotlib: pip install "dsv3[plot]"'
    ) from error
  return Figure


def draw(
  rows: Sequence[dict[str, Any]],
  path: str | pathlib.Path,
  *,
  title: str,
  panels: Sequence[str] = ("recall", "log_prob"),
) -> None:
  """Writes the heat map of `dsv3.eval.needle.score` as PNG, SVG or PDF.

  Colours of `recall` go from 0 to 1, as in the report. Those of `log_prob` go
  from the whole number below the least to 0, so that a model that gives no
  right answer has a map too; with two models, look at the scale. Cells that
  `rows` do not have stay grey.
  """
  lengths = sorted({row["length"] for row in rows})
  depths = sorted({row["depth"] for row in rows})
  width = max(_CELL[0] * len(lengths), 3.4)
  height = max(_CELL[1] * len(depths), 1.6)
  size = (width + 1.1) * len(panels) + 0.8, height + 1.6
  figure = figure_class()(figsize=size, layout="constrained")
  axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  labels = [_tokens(length) for length in lengths]
  turn = 45 if len(labels) > 6 and max(map(len, labels)) > 5 else 0
  for axis, panel in zip(axes, panels):
    grid = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
      place = depths.index(row["depth"]), lengths.index(row["length"])
      grid[place] = row[panel]
    image = cells(axis, grid, _scale(panel, grid))
    figure.colorbar(image, ax=axis, fraction=0.05, aspect=30, pad=0.02)
    axis.set_title(_NAMES[panel], fontsize=10)
    axis.set_xticks(range(len(lengths)), labels, rotation=turn)
    axis.set_yticks(range(len(depths)), [f"{depth:.3g}" for depth in depths])
    axis.set_xlabel("context length, tokens")
  axes[0].set_ylabel("depth of the needle, %")
  figure.suptitle(textwrap.fill(title, int(9 * size[0])), fontsize=12)
  figure.savefig(path, dpi=150)


def _scale(panel: str, grid: np.ndarray) -> tuple[float, float]:
  """Values of the first and the last colour."""
  if panel == "recall":
    return 0.0, 1.0
  return float(np.floor(np.nanmin(grid, initial=-1.0))), 0.0


def cells(
  axis, grid: np.ndarray, scale: tuple[float, float], form: str = ".2f"
):
  """A grid of coloured cells with their numbers in them; NaN stays grey."""
  low, high = scale
  image = axis.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto")
  axis.set_facecolor("lightgrey")
  for (y, x), value in np.ndenumerate(grid):
    if not np.isnan(value):
      ink = "white" if value < low + 0.6 * (high - low) else "black"
      axis.text(
        x, y, f"{value:{form}}", ha="center", va="center", color=ink, fontsize=8
      )
  axis.set_xticks(np.arange(grid.shape[1] + 1) - 0.5, minor=True)
  axis.set_yticks(np.arange(grid.shape[0] + 1) - 0.5, minor=True)
  axis.grid(which="minor", color="white", linewidth=1.0)
  axis.tick_params(which="both", length=0)
  axis.spines[:].set_visible(False)
  return image


def _tokens(length: int) -> str:
  """As the report writes it: 128K are 131,072.

  >>> _tokens(131072), _tokens(1000)
  ('128K', '1,000')
  """
  return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"

"""Curves out of results: smoothed, paired by seed, a mean and a range an arm."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dsv3.lab.results import Line

DECAY = 0.9  # of the report's relative loss error (Fig. 10)


class Curve(NamedTuple):
  """Of several seeds: their mean, least and largest at every x."""

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


def ema(values: Sequence[float | None], decay: float = DECAY) -> np.ndarray:
  """Exponential moving average that begins with the first value.

  NaN from the first that is not finite on: nothing after it is comparable.

  >>> ema([1.0, 2.0, 2.0], decay=0.5).tolist()
  [1.0, 1.5, 1.75]
  """
  out = np.empty(len(values))
  for i, x in enumerate(values):
    x = np.nan if x is None else x
    out[i] = decay * out[i - 1] + (1 - decay) * x if i else x
  return out


def of_arm(
  lines: Sequence[Line], name: str, x: str = "step", decay: float = DECAY
) -> Curve | None:
  """A smoothed curve of all seeds of an arm; None where they have none."""
  found = [_of_run(line, name, x, decay) for line in lines]
  return _joined([pair for pair in found if pair is not None])


def difference(
  arm: Sequence[Line],
  base: Sequence[Line],
  name: str,
  x: str = "step",
  decay: float = DECAY,
  *,
  relative: bool = False,
) -> Curve | None:
  """Smoothed arm minus smoothed baseline, seed by seed.

  `relative`: over the baseline, the report's relative error (Fig. 10, App. B).
  """
  by_seed = {line["seed"]: _of_run(line, name, x, decay) for line in base}
  found = []
  for line in arm:
    ours, theirs = _of_run(line, name, x, decay), by_seed.get(line["seed"])
    if ours is None or theirs is None:
      continue
    at = np.interp(ours[0], *theirs, left=np.nan, right=np.nan)
    d = ours[1] - at
    found.append((ours[0], d / at if relative else d))
  return _joined(found)


def relative_notes(lines: Mapping[str, Sequence[Line]], base: str) -> list[str]:
  """How far every arm's smoothed training loss is from the baseline's.

  Of the mean over seeds, and of any seed; the first tenth, where losses fall
  by the step, is left out, and all after the first loss that is not finite.
  """
  out = []
  for name, ours in lines.items():
    gap = difference(ours, lines[base], "loss/main", relative=True)
    if gap is None or name == base:
      continue
    bad = [_diverged(name, ours), _diverged(base, lines[base])]
    out.append(
      f"Relative error of {name}'s training loss, smoothed ({DECAY}): "
      f"{_extremes(gap)}.{''.join(bad)}"
    )
  return out


def _extremes(gap: Curve) -> str:
  """Largest of a relative error and its last, where it is a number."""
  kept = (gap.x >= gap.x[-1] / 10) & np.isfinite(gap.mean)
  if not kept.any():
    return "no step to compare after the first tenth"
  x, mean = gap.x[kept], np.abs(gap.mean[kept])
  any_seed = np.maximum(np.abs(gap.low), np.abs(gap.high))[kept]
  end = "the end" if kept[-1] else f"step {x[-1]:.0f}, the last to compare"
  return (
    f"at most {mean.max():.2%} on average over seeds (step "
    f"{x[mean.argmax()]:.0f}) and {any_seed.max():.2%} in any, "
    f"{gap.mean[kept][-1]:+.2%} at {end}"
  )


def _diverged(name: str, lines: Sequence[Line]) -> str:
  """Where the loss of the first seed stopped being a finite number, if it did."""
  found = []
  for line in lines:
    curve = line.get("curve", {})
    finite = np.isfinite(np.array(curve.get("loss/main", []), np.float64))
    if not finite.all():
      found.append((curve["step"][finite.argmin()], line["seed"]))
  if not found:
    return ""
  step, seed = min(found)
  return f" {name}'s loss is not finite at step {step} (seed {seed})."


def _of_run(line: Line, name: str, x: str, decay: float):
  curve = line.get("curve", {})
  if not curve.get(name):
    return None
  steps = np.asarray(curve["step"], np.float64)
  if x != "step":
    steps *= line[x] / max(line["steps"], 1)
  return steps, ema(curve[name], decay)


def _joined(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Curve | None:
  if not pairs:
    return None
  x = min((x for x, _ in pairs), key=len)
  all_y = np.stack([np.interp(x, *pair) for pair in pairs])
  return Curve(x, all_y.mean(0), all_y.min(0), all_y.max(0))

"""Variants that cost the same: one width is found so that a count is equal.

A comparison of attention or of FFNs says something only at equal parameters or
at equal FLOPs a token. Counts are the planner's (`dsv3.plan.count`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.plan import count

COUNTS: dict[str, Callable[[config.Config], float]] = {
  "flops": lambda values: count.flops_per_token(
    values.model, values.data.seq_len
  ),
  "parameters": lambda values: count.by_formula(values.model).main,
  "active": lambda values: count.by_formula(values.model).active,
}


def matched(
  base: str,
  diff: Mapping[str, Any],
  free: str,
  *,
  by: str = "flops",
  multiple: int = 8,
  within: float = 0.02,
) -> dict[str, Any]:
  """`diff` with the width `free` that makes it cost what `base` costs.

  Args:
    base: a config's name or path.
    diff: what the variant changes, without `free`.
    free: the key of a width that the count grows with, such as
      "model.dense_hidden", "model.moe.hidden" or "model.attention.v_dim".
    by: what is equal: training "flops" of a token, "parameters", or "active"
      ones of a token.
    multiple: of which the width is one.
    within: the largest relative difference that is let through.

  Raises:
    ConfigError: no width comes that near, or the count does not depend on it.

  >>> dense = {"model.ffn": "dense"}
  >>> matched("tiny", dense, "model.dense_hidden")["model.dense_hidden"]
  464
  """
  if by not in COUNTS:
    raise ConfigError(
      f"matched: by: found {by!r}, wanted one of {', '.join(COUNTS)}"
    )
  if free in diff:
    raise ConfigError(f"matched: {free}: set by the diff, wanted it free")
  wanted = COUNTS[by](config.build(overlay.load(base)))

  def costs(n: int) -> float:
    values = overlay.overlay(overlay.load(base), {**diff, free: n * multiple})
    return COUNTS[by](config.build(values))

  if costs(2) <= costs(1):
    raise ConfigError(f"matched: {free}: {by} do not grow with it")
  n = _nearest(costs, wanted)
  off = costs(n) / wanted - 1
  if abs(off) > within:
    raise ConfigError(
      f"matched: {free}: the nearest is {n * multiple}, with {off:+.1%} {by}, "
      f"wanted within {within:.0%}"
    )
  return {**diff, free: n * multiple}


def _nearest(costs: Callable[[int], float], wanted: float) -> int:
  """The whole number, 1 or more, whose cost is nearest; costs grow."""
  high = 1
  while costs(high) < wanted:
    high *= 2
  low = high // 2
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if costs(middle) < wanted else (low, middle)
  return min(
    (n for n in (low, high) if n), key=lambda n: abs(costs(n) - wanted)
  )

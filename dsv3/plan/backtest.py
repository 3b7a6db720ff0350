"""The planner against what was published: fit, table, spread.

  python -m dsv3.plan.backtest           prints the tables of the experiment
  python -m dsv3.plan.backtest --write   fits and writes fitted.py anew

Eight numbers are fitted on the eight anchors marked so: a share of the peak for
each family of chips and each precision, and two of decoding. All others are
held out; "superseded" are those that later software has beaten on the same
chips: the planner speaks of the best software known, and its low of the worst.
"""

import functools
import math
import pathlib
import re
import sys

from dsv3 import config, overlay
from dsv3.plan import anchors, chips, count, fitted, search, serve, step


@functools.cache
def paper(remat: str) -> config.Config:
  """The report's model under a policy of recomputation."""
  return config.build(overlay.load("v3_671b", [f"model.remat={remat}"]))


def planned(anchor: anchors.Training, shares=fitted.SHARE) -> step.Step:
  """What the planner says of an anchor's run."""
  layout = step.Layout(
    anchor.mesh,
    anchor.batch,
    anchor.microbatches,
    anchor.schedule,
    anchor.virtual,
    anchor.precision,
  )
  values, chip = paper(anchor.remat), chips.chip(anchor.chip)
  return step.of(values, chip, layout, mtp=anchor.mtp, shares=shares)


def error(anchor: anchors.Training, shares=fitted.SHARE) -> float:
  """Planned step time over the measured, less one."""
  return anchor.tokens / planned(anchor, shares).tokens_chip - 1


def _family(anchor) -> tuple[str, str]:
  return chips.chip(anchor.chip).family, anchor.precision


def fit() -> dict[tuple[str, str], float]:
  """Shares with which the fitted anchors are met; BF16 first, FP8 rests on it."""
  shares = {}
  keys = sorted({_family(a) for a in anchors.TRAINING})  # bf16 before fp8
  for key in keys:
    mine = [
      a for a in anchors.TRAINING if _family(a) == key and a.role == "fitted"
    ]
    low, high = 0.01, 2.0
    for _ in range(40):
      shares[key] = math.sqrt(low * high)
      off = sum(math.log1p(error(a, shares)) for a in mine)
      low, high = (shares[key], high) if off > 0 else (low, shares[key])
    shares[key] = round(shares[key], 4)
  return shares


def spread() -> dict[tuple[str, str], tuple[float, float]]:
  """Least and most of measured over planned, a tenth either way at least."""
  out = {}
  for key in sorted({_family(a) for a in anchors.TRAINING}):
    found = [
      a.tokens / planned(a).tokens_chip
      for a in anchors.TRAINING
      if _family(a) == key
    ]
    out[key] = round(min(0.9, *found), 3), round(max(1.1, *found), 3)
  return out


def served(anchor: anchors.Serving, **factors) -> float:
  """Tokens a second and chip that the planner says of an anchor."""
  model, chip = paper("paper").model, chips.chip(anchor.chip)
  if not anchor.batch:
    return serve.prefill(model, chip, anchor.unit, anchor.context).tokens_chip
  found = serve.decode(
    model,
    chip,
    anchor.unit,
    anchor.context,
    anchor.batch,
    queries=anchor.queries,
    **factors,
  )
  kept = 1 + serve.DRAFT_ACCEPTED * (anchor.queries - 1)
  return found.tokens_chip * kept


def fit_serving() -> tuple[float, float]:
  """SERVED and LAYER, in turn, until the two fitted anchors are met."""
  one, wide = (a for a in anchors.SERVING if a.role == "fitted")
  share, layer = 1.0, 0.0
  for _ in range(50):
    off = 1 / one.tokens - 1 / served(one, served=share, layer=layer)
    layer += one.batch * off / paper("paper").model.n_layers
    full = wide.batch / served(wide, served=share, layer=layer)
    fixed = layer * paper("paper").model.n_layers
    share *= (full - fixed) / (wide.batch / wide.tokens - fixed)
  return round(share, 3), round(layer, 7)


def serving_spread() -> tuple[float, float]:
  """Least and most of measured over planned decoding."""
  found = [a.tokens / served(a) for a in anchors.SERVING if a.batch]
  return round(min(found), 3), round(max(found), 3)


def serving_table() -> str:
  """Every anchor of inference."""
  rows = [
    "| run | context | measured | planned | error of time | role | assumed |",
    "|---|---|---|---|---|---|---|",
  ]
  for a in anchors.SERVING:
    found = served(a)
    rows.append(
      f"| {a.name} | {a.context:,} | {a.tokens:,.4g} | {found:,.4g} | "
      f"{a.tokens / found - 1:+.0%} | {a.role} | {a.assumed} |"
    )
  return "\n".join(rows)


def table() -> str:
  """Every training anchor: measured, planned, error, what binds."""
  rows = [
    "| run | precision | measured | planned | error of step time | role | MFU |"
    " binds | memory, GB | routing, and what is assumed |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for a in anchors.TRAINING:
    found = planned(a)
    note = a.routing + (f"; {a.assumed}" if a.assumed else "")
    rows.append(
      f"| {a.name} | {a.precision} | {a.tokens:,.0f} | "
      f"{found.tokens_chip:,.0f} | {error(a):+.0%} | {a.role} | "
      f"{found.mfu:.1%} | {found.binds} | {_memory(a)} | {note} |"
    )
  return "\n".join(rows)


def _memory(anchor: anchors.Training) -> str:
  """Planned bytes of an anchor's fullest chip, and whether they fit."""
  layout, chip = planned(anchor).layout, chips.chip(anchor.chip)
  held = search.candidate(
    paper(anchor.remat), chip, layout, anchor.remat
  ).memory
  return f"{held.total / 1e9:.0f} of {chip.hbm / 1e9:.0f}" + (
    "" if held.fits else ", too much"
  )


def headline() -> str:
  """What the report and its authors state of pre-training, all of one run."""
  found = planned(anchors.TRAINING[0])
  model, tokens = paper("paper").model, found.tokens_chip
  flops = lambda causal: (
    tokens * count.flops_per_token(model, 4096, mtp=False, causal=causal)
  )
  hours_ = found.chip_hours(14.8e12)
  rows = [
    "| of pre-training on 2048 H800 | stated | planned | error |",
    "|---|---|---|---|",
  ]
  rows += [
    f"| {name} | {stated:,g} | {planned_:,.4g} | {planned_ / stated - 1:+.1%} |"
    for name, stated, planned_ in (
      ("tokens/s a chip", 1543, tokens),
      ("TFLOPS, causal, without MTP", 385, flops(True) / 1e12),
      ("TFLOPS, full matrix, without MTP", 432, flops(False) / 1e12),
      ("MFU, causal, without MTP, %", 38.94, 100 * flops(True) / 989e12),
      ("MFU, full matrix, without MTP, %", 43.73, 100 * flops(False) / 989e12),
      ("thousand H800 hours", 2664, hours_ / 1e3),
      ("million dollars", 5.328, 2 * hours_ / 1e6),
    )
  ]
  return "\n".join(rows)


def hours(anchor: anchors.Hours) -> float:
  """What the planner says of published chip-hours, on H800s."""
  total = 0.0
  for part in anchor.stages:
    tree = overlay.overlay(overlay.load(part.config), part.diff)
    found = step.of(config.build(tree), chips.chip("h800"), part.layout)
    total += found.chip_hours(part.tokens)
  return total


def hours_table() -> str:
  """Published costs whose arrangement was not: all held out."""
  rows = [
    "| run | H800 hours | planned | error | assumed |",
    "|---|---|---|---|---|",
  ]
  rows += [
    f"| {a.name} | {a.hours / 1e3:,.1f}K | {hours(a) / 1e3:,.1f}K | "
    f"{hours(a) / a.hours - 1:+.0%} | {a.assumed} |"
    for a in anchors.HOURS
  ]
  return "\n".join(rows)


def terms() -> str:
  """Terms of DeepSeek's own step, where they were published."""
  found = planned(anchors.TRAINING[0])
  layout, chunk = found.layout, found.chunk
  m, stages = layout.microbatches, layout.mesh.stage
  rows = [
    "| term of DeepSeek's step | measured, s | planned, s |",
    "|---|---|---|",
  ]
  rows += [
    f"| {name} | {measured:.2f} | {planned_:.2f} |"
    for name, measured, planned_ in (
      ("all", 19.93, found.step_seconds),
      ("forward and backward alone (1F, 1B, 1W)", 1.13 + 1.99 + 0.48,
       stages * (chunk.forward + chunk.backward)),
      ("in pairs (1F1B)", 13.95, (m - stages) * chunk.pair),
      ("bubble", 2.06, found.seconds["pipeline bubble"]),
      ("optimizer", 0.29, found.seconds["gradients, optimizer"]),
    )
  ]  # fmt: skip
  return "\n".join(rows)


def write() -> None:
  """Fits anew and writes `fitted.py`, whose text around the numbers stays."""
  path = pathlib.Path(fitted.__file__)
  fitted.SHARE.update(fit())
  fitted.SPREAD.update(spread())
  text = path.read_text()
  for name in ("SHARE", "SPREAD"):
    values = {k: v for k, v in getattr(fitted, name).items() if k[0] != "cpu"}
    lines = "".join(
      f'  ("{family}", "{precision}"): {value},\n'
      for (family, precision), value in values.items()
    )
    before, after = text.split(f"{name} = {{", 1)
    text = f"{before}{name} = {{\n{lines}}}{after.split('}', 1)[1]}"
  numbers = dict(zip(("SERVED", "LAYER"), fit_serving()))
  numbers["SERVED_SPREAD"] = serving_spread()
  for name, value in numbers.items():
    text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
  path.write_text(text)


if __name__ == "__main__":
  if "--write" in sys.argv[1:]:
    write()
  tables = table, headline, terms, hours_table, serving_table
  print(*(one() for one in tables), sep="\n\n")

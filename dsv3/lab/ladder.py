"""An iso-FLOP ladder: several sizes on each budget, and the law through them.

On one budget a small model sees many tokens and a large one few; between them
lies the best. A parabola in the logarithm of the size finds it for each budget,
and the best sizes over the budgets give the exponent (arXiv 2203.15556,
approach 2; DeepSeek LLM, arXiv 2401.02954, Sec. 3.2, counts FLOPs a token as here).
"""

import contextlib
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.lab import bootstrap
from dsv3.lab.results import Line
from dsv3.lab.sweep import Sweep
from dsv3.plan import count


def ladder(
  base: str, budgets: Iterable[float], sizes: Mapping[str, Mapping[str, Any]]
) -> Sweep:
  """Every size on every budget: arms that differ in their steps.

  Args:
    base: a config's name or path.
    budgets: training FLOPs, MTP's and the output head's included.
    sizes: diffs by name, such as {"d64": {"model.dim": 64, ...}}.

  Raises:
    ConfigError: a budget that buys no 10 steps of a size.
  """
  found = []
  for budget in budgets:
    for name, diff in sizes.items():
      values = config.build(overlay.overlay(overlay.load(base), diff))
      step = values.schedule.batch_size * values.data.seq_len
      step *= count.flops_per_token(values.model, values.data.seq_len)
      steps = round(budget / step)
      if steps < 10:
        raise ConfigError(
          f"ladder: {name}: {budget:.3g} FLOPs buy {steps} steps, wanted 10 or "
          "more"
        )
      found.append((_arm(budget, name), {**diff, "train.steps": steps}))
  return found


@dataclasses.dataclass(frozen=True)
class Rung:
  """The sizes of one budget, and the best between them."""

  budget: float  # FLOPs
  flops_token: tuple[float, ...]  # of each size, training
  loss: tuple[float, ...]
  best: float  # FLOPs a token, at the bottom of the parabola
  best_loss: float
  inside: bool  # between the sizes, not beyond them


@dataclasses.dataclass(frozen=True)
class Law:
  """best size = coefficient x budget ^ exponent; the rest buys tokens."""

  rungs: tuple[Rung, ...]
  exponent: float
  coefficient: float

  def best(self, budget: float) -> float:
    """FLOPs a token of the best model for a budget."""
    return self.coefficient * budget**self.exponent


def rung(
  budget: float, flops_token: Sequence[float], loss: Sequence[float]
) -> Rung:
  """A parabola through (log size, loss) of one budget.

  Raises ConfigError for fewer than three sizes, or where it has no bottom.

  >>> one = rung(1e15, [1e6, 2e6, 4e6], [2.1, 2.0, 2.1])
  >>> f"{one.best:.3g} {one.best_loss:.3g} {one.inside}"
  '2e+06 2 True'
  """
  if len(set(flops_token)) < 3:
    raise ConfigError(
      f"ladder: {budget:.3g} FLOPs: found {len(set(flops_token))} sizes, wanted "
      "three or more"
    )
  x = np.log(flops_token)
  a, b, c = np.polyfit(x, loss, 2)
  if a <= 0:
    raise ConfigError(
      f"ladder: {budget:.3g} FLOPs: the losses have no least between them: "
      "wanted smaller or larger sizes"
    )
  bottom = -b / (2 * a)
  return Rung(
    budget,
    tuple(flops_token),
    tuple(loss),
    math.exp(bottom),
    float(c - b * b / (4 * a)),
    bool(x.min() <= bottom <= x.max()),
  )


def fit(rungs: Sequence[Rung]) -> Law:
  """The power law through the best sizes; ConfigError for one budget alone."""
  if (n := len({one.budget for one in rungs})) < 2:
    raise ConfigError(
      f"ladder: found {n} budgets with a best size, wanted two or more for a law"
    )
  exponent, constant = np.polyfit(
    np.log([one.budget for one in rungs]),
    np.log([one.best for one in rungs]),
    1,
  )
  return Law(tuple(rungs), float(exponent), math.exp(constant))


def answer(
  lines: Mapping[str, Sequence[Line]],
  budgets: Iterable[float],
  folder: pathlib.Path,
) -> list[str]:
  """What the runs of a `ladder` say, as notes, and the law's picture in `folder`.

  `lines` are results by arm; seeds of an arm are averaged, and each alone has an
  exponent, whose interval is said. A budget without a least loss among its sizes is
  in no law; that, and a law without two, is said.
  """
  budgets = list(budgets)
  rungs, notes = _rungs(lines, budgets)
  try:
    law = fit(rungs)
  except ConfigError as error:
    return [*notes, f"{error}."]
  draw(law).savefig(folder / "law.png", dpi=130)
  said = f"Best size: {law.coefficient:.3g} x FLOPs^{law.exponent:.2f}"
  return [*notes, f"{said}{_of_seeds(lines, budgets)}."]


def _rungs(
  lines: Mapping[str, Sequence[Line]], budgets: Sequence[float]
) -> tuple[list[Rung], list[str]]:
  """Those with their best size between the sizes, and a note of each budget."""
  rungs, notes = [], []
  for budget in budgets:
    mine = [v for name, v in lines.items() if name.startswith(_arm(budget, ""))]
    mean = lambda of, mine=mine: [statistics.fmean(map(of, v)) for v in mine]
    per_token = mean(lambda line: line["flops"] / line["tokens"])
    try:
      one = rung(budget, per_token, mean(lambda line: line["final"]["loss"]))
    except ConfigError as error:
      notes.append(f"{error}.")
      continue
    if not one.inside:  # a parabola says nothing of what lies beyond it
      beyond = "smaller" if one.best < min(one.flops_token) else "larger"
      notes.append(f"{budget:.3g} FLOPs: best {beyond} than all sizes here.")
      continue
    rungs.append(one)
    notes.append(
      f"{budget:.3g} FLOPs: best at {one.best:.3g} FLOPs a token, loss "
      f"{one.best_loss:.3f}."
    )
  return rungs, notes


def _of_seeds(
  lines: Mapping[str, Sequence[Line]], budgets: Sequence[float]
) -> str:
  """The exponents of seeds that have all arms, each through its own losses."""
  seeds = set.intersection(*({x["seed"] for x in v} for v in lines.values()))
  found = []
  for seed in sorted(seeds) if len(seeds) > 1 else ():
    own = {k: [x for x in v if x["seed"] == seed] for k, v in lines.items()}
    with contextlib.suppress(ConfigError):  # it has no law
      found.append(fit(_rungs(own, budgets)[0]).exponent)
  if (spread := bootstrap.interval(found)) is None:
    return ""
  alone = ", ".join(f"{x:.2f}" for x in found)
  return (
    f"; {len(found)} of {len(seeds)} seeds alone: {alone}, of whose mean the 95% "
    f"interval is {spread.low:.2f} to {spread.high:.2f}"
  )


def _arm(budget: float, size: str) -> str:
  return f"{budget:.3g}-{size}".replace("+", "")


def draw(law: Law):
  """Figure: the parabola of every budget, and the best sizes over budgets."""
  from dsv3.eval.heatmap import figure_class

  figure = figure_class()(figsize=(9, 3.6), layout="constrained")
  valleys, line = figure.subplots(1, 2)
  for one in law.rungs:
    (dots,) = valleys.plot(one.flops_token, one.loss, "o", ms=4)
    x = np.geomspace(*(f(one.flops_token) for f in (min, max)), 50)
    curve = np.polyfit(np.log(one.flops_token), one.loss, 2)
    label = f"{one.budget:.3g} FLOPs"
    valleys.plot(
      x, np.polyval(curve, np.log(x)), color=dots.get_color(), label=label
    )
    valleys.plot(one.best, one.best_loss, "*", color=dots.get_color(), ms=10)
  valleys.set(xscale="log", xlabel="FLOPs a token", ylabel="loss, nats a token")
  valleys.legend(fontsize=8)
  budgets = np.array([one.budget for one in law.rungs])
  line.plot(budgets, [one.best for one in law.rungs], "*", ms=10)
  line.plot(budgets, law.best(budgets), label=f"exponent {law.exponent:.2f}")
  line.set(
    xscale="log", yscale="log", xlabel="budget, FLOPs",
    ylabel="best size, FLOPs a token",
  )  # fmt: skip
  line.legend(fontsize=8)
  for axis in (valleys, line):
    axis.grid(alpha=0.25)
  return figure

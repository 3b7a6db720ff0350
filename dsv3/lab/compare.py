"""What the results of an experiment say: every arm against one of them.

Differences are paired by seed. An arm that costs more than the baseline is no
better for being better: `match` says what has to be equal for a verdict.
"""

import difflib
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsv3.config import ConfigError
from dsv3.lab import bootstrap, results
from dsv3.lab.experiment import Experiment
from dsv3.lab.results import Line

EFFECT = 0.005  # nats: the difference that the codebase is made to show
TOLERANCE = 0.02  # within which costs are equal
MATCHES = {"flops": "flops", "params": "parameters", "tokens": "tokens"}
_HIGHER = ("accuracy", "accepted", "tokens_per_second", "model_flops", "mfu")


class Row(NamedTuple):
  """An arm, and how it differs from the baseline."""

  name: str
  values: dict[int, float]  # the metric, by seed
  failed: int  # runs that ended in an error, in no number here
  differences: dict[int, float]  # by seed; {} for the baseline
  interval: bootstrap.Interval | None  # of their mean
  needed: int | None  # seeds to see EFFECT, of a loss
  cost: dict[str, float]  # over the baseline's, by the names of MATCHES
  verdict: str

  @property
  def mean(self) -> float:
    return statistics.fmean(self.values.values())

  @property
  def std(self) -> float | None:
    found = list(self.values.values())
    return statistics.stdev(found) if len(found) > 1 else None


class Comparison(NamedTuple):
  """A metric of all arms."""

  metric: str
  baseline: str
  match: str | None
  rows: list[Row]  # in the order of the experiment; the baseline among them
  notes: list[str]  # what a reader must know besides


def whole(lines: Mapping[str, Sequence[Line]]) -> dict[str, list[Line]]:
  """Without the runs that failed."""
  kept = {n: [x for x in found if not x["error"]] for n, found in lines.items()}
  return {name: found for name, found in kept.items() if found}


def of_arms(asked: Experiment) -> tuple[dict[str, list[Line]], list[Line]]:
  """Lines of every arm that has any, and those of no arm of the experiment."""
  names = {run.id: run.name for run in asked.runs}
  found: dict[str, list[Line]] = {name: [] for name in asked.arms}
  others = []
  for (id_, _), line in sorted(results.read(asked.results).items()):
    found[names[id_]].append(line) if id_ in names else others.append(line)
  return {name: lines for name, lines in found.items() if lines}, others


def compare(
  asked: Experiment,
  metric: str = "loss",
  *,
  baseline: str | None = None,
  match: str | None = None,
) -> Comparison:
  """All arms with results against `baseline`, the experiment's own if None.

  Where its own has no result, against the first arm that has; a note says so.

  `metric` is a name of `final`, of the last step as train/NAME, of the best
  evaluation as best/NAME, or of a line itself. Raises ConfigError.
  """
  lines, others = of_arms(asked)
  done = {
    name: {line["seed"]: line for line in found if not line["error"]}
    for name, found in lines.items()
  }
  all_done = [line for found in done.values() for line in found.values()]
  if not all_done:
    raise ConfigError(
      f"{asked.results}: found no result, wanted: dsv3 sweep {asked.folder}"
    )
  _check_metric(metric, all_done)
  baseline = _baseline(asked, done, baseline)
  make = functools.partial(
    _row,
    metric=metric,
    lower=lower_is_better(metric, asked.higher),
    base=done[baseline],
    match=match,
  )
  rows = [
    make(name, done[name], failed=len(found) - len(done[name]))
    for name, found in lines.items()
    if done[name]
  ]
  missing = [name for name in asked.arms if not done.get(name)]
  notes = _notes(all_done, others, missing, match)
  if infinite := [line for line in all_done if value(line, metric) is None]:
    runs = ", ".join(f"{line['name']}-s{line['seed']}" for line in infinite)
    notes.insert(0, f"Without a finite {metric}, and left out: {runs}.")
  if asked.baseline in missing:
    notes.insert(
      0, f"Of {asked.baseline} there is no result: minus {baseline}."
    )
  return Comparison(metric, baseline, match, rows, notes)


def value(line: Line, metric: str) -> float | None:
  """A metric of a line; None where it has no such number."""
  group, _, name = metric.rpartition("/")
  top, _, rest = metric.partition("/")
  if top in ("best", "train"):
    found = line.get(top, {}).get(rest)
  elif not group and metric in line.get("final", {}):
    found = line["final"][name]
  else:
    found = line.get(metric)
  is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
  return float(found) if is_number and math.isfinite(found) else None


def lower_is_better(metric: str, higher: Sequence[str] = ()) -> bool:
  """Of most metrics; not of `higher`, which an experiment names."""
  return metric not in higher and not any(word in metric for word in _HIGHER)


def _check_metric(metric: str, lines: Sequence[Line]) -> None:
  if any(value(line, metric) is not None for line in lines):
    return
  names = {name for line in lines for name in _metrics(line)}
  close = difflib.get_close_matches(metric, sorted(names), n=1, cutoff=0.4)
  hint = f"; did you mean {close[0]}?" if close else ""
  raise ConfigError(
    f"--metric={metric}: found in no result{hint} "
    f"(there are {', '.join(sorted(names))})"
  )


def _metrics(line: Line) -> list[str]:
  top = [k for k in line if value(line, k) is not None and k != "seed"]
  inside = [f"{g}/{k}" for g in ("best", "train") for k in line.get(g, {})]
  return [*line.get("final", {}), *top, *inside]


def _baseline(
  asked: Experiment, done: Mapping[str, Mapping], wanted: str | None
) -> str:
  with_some = [name for name, found in done.items() if found]
  if wanted is None:
    return asked.baseline if asked.baseline in with_some else with_some[0]
  if wanted not in asked.arms:
    raise ConfigError(
      f"--baseline={wanted}: no such arm; there are {', '.join(asked.arms)}"
    )
  if wanted not in with_some:
    raise ConfigError(
      f"--baseline={wanted}: found no result of it; there are those of "
      f"{', '.join(with_some)}"
    )
  return wanted


def _row(
  name: str,
  arm: Mapping[int, Line],
  *,
  failed: int,
  metric: str,
  lower: bool,
  base: Mapping[int, Line],
  match: str | None,
) -> Row:
  values, reference = _values(arm, metric), _values(base, metric)
  is_base = arm is base
  differences = {
    seed: values[seed] - reference[seed]
    for seed in sorted(values.keys() & reference.keys())
    if not is_base
  }
  listed = list(differences.values())
  found = bootstrap.interval(listed)
  cost = {kind: _ratio(arm, base, key) for kind, key in MATCHES.items()}
  if is_base:
    verdict = "baseline"
  elif match and abs(cost[match] - 1) > TOLERANCE:
    verdict = f"not matched: {cost[match]:.3g} x {match}"
  else:
    verdict = bootstrap.verdict(found, lower_is_better=lower)
  in_nats = "loss" in metric
  needed = bootstrap.seeds_needed(listed, EFFECT) if in_nats else None
  return Row(name, values, failed, differences, found, needed, cost, verdict)


def _values(arm: Mapping[int, Line], metric: str) -> dict[int, float]:
  found = {seed: value(line, metric) for seed, line in arm.items()}
  return {seed: v for seed, v in found.items() if v is not None}


def _ratio(arm, base, key: str) -> float:
  mean = lambda lines: statistics.fmean(line[key] for line in lines.values())
  return mean(arm) / mean(base) if mean(base) else math.nan


def _machine(device: Mapping[str, Any]) -> str:
  """The kind of device; of a CPU its name and cores, where its line has them.

  >>> _machine({"kind": "cpu", "model": "AMD EPYC 7B13", "cores": 2})
  'AMD EPYC 7B13, 2 cores'
  >>> _machine({"kind": "cpu"})
  'cpu'
  """
  name = device.get("model") or device.get("kind", "?")
  cores = device.get("cores")
  return f"{name}, {cores} core{'s' * (cores > 1)}" if cores else name


def _notes(
  lines: Sequence[Line],
  others: Sequence[Line],
  missing: Sequence[str],
  match: str | None,
) -> list[str]:
  out = []
  if missing:
    out.append(f"Without a result: {', '.join(missing)}.")
  if others:
    out.append(
      f"{len(others)} results are of other configs than sweep.py has now and "
      "are left out."
    )
  corpora = {str(line.get("corpus")) for line in lines}
  if len(corpora) > 1:
    out.append(
      f"The runs have read {len(corpora)} different texts: differences between "
      "arms are also those of the texts."
    )
  commits = sorted({line.get("commit", "unknown")[:7] for line in lines})
  dirty = sum(bool(line.get("dirty")) for line in lines)
  changed = f", {dirty} of {len(lines)} runs with uncommitted code" * bool(
    dirty
  )
  machines = sorted({_machine(line.get("device", {})) for line in lines})
  versions = sorted(
    {line.get("versions", {}).get("jax", "?") for line in lines}
  )
  out.append(
    f"Commit {', '.join(commits)}{changed}; {' and '.join(machines)}; "
    f"jax {', '.join(versions)}."
  )
  if match:
    out.append(
      f"Verdicts are of arms within {TOLERANCE:.0%} of the baseline's {match}."
    )
  return out

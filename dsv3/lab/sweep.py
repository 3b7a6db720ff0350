"""Sweep algebra: an arm is a name and a diff, a sweep a list of arms.

What an experiment's `runs()` returns. Sweeps are combined into larger ones; a
key that two of them set is an error, for one of the two would be lost.

>>> gates = over("model.moe.gate", ["sigmoid", "softmax"])
>>> speeds = over("schedule.bias_speed", [0.001, 0.01])
>>> [name for name, _ in product(gates, speeds)]  # doctest: +ELLIPSIS
['gate=sigmoid,bias_speed=0.001', ..., 'gate=softmax,bias_speed=0.01']
"""

import functools
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv3.config import ConfigError

SEED = "train.seed"
Diff = dict[str, Any]
Sweep = list[tuple[str, Diff]]


def arms(named: Mapping[str, Mapping[str, Any]]) -> Sweep:
  """A sweep from a dict of diffs; {} is the base itself."""
  return [(name, dict(diff)) for name, diff in named.items()]


def over(key: str, values: Iterable[Any]) -> Sweep:
  """An arm for every value of a key, named for both."""
  last = key.split(".")[-1]
  return [(f"{last}={value}", {key: value}) for value in values]


def chain(*sweeps: Iterable[tuple[str, Mapping[str, Any]]]) -> Sweep:
  """All arms of the first sweep, then of the second, ..."""
  return [(name, dict(diff)) for sweep in sweeps for name, diff in sweep]


def product(*sweeps: Iterable[tuple[str, Mapping[str, Any]]]) -> Sweep:
  """Every arm of one sweep with every arm of the others; the last runs fastest."""
  return [_join(parts) for parts in itertools.product(*map(chain, sweeps))]


def zipped(*sweeps: Iterable[tuple[str, Mapping[str, Any]]]) -> Sweep:
  """The first arms together, then the second ones, ...; of equal length."""
  lists = [chain(sweep) for sweep in sweeps]
  if len({len(arms) for arms in lists}) > 1:
    lengths = ", ".join(str(len(arms)) for arms in lists)
    raise ConfigError(f"zipped: found sweeps of {lengths} arms, wanted equal")
  return [_join(parts) for parts in zip(*lists)]


def subsample(
  sweep: Iterable[tuple[str, Mapping[str, Any]]], n: int, seed: int = 0
) -> Sweep:
  """`n` arms at random, in their order: random search on a grid."""
  whole = chain(sweep)
  if not 0 < n <= len(whole):
    raise ConfigError(f"subsample: found {n}, wanted 1 to {len(whole)} arms")
  kept = sorted(random.Random(seed).sample(range(len(whole)), n))
  return [whole[i] for i in kept]


def seeds(
  sweep: Iterable[tuple[str, Mapping[str, Any]]], wanted: int | Sequence[int]
) -> Sweep:
  """Every arm once a seed, under one name: 0 to n - 1, or those listed.

  A seed gives the order of the data and the first weights, so runs of one seed
  are pairs. `dsv3 sweep --seeds` does this to arms that name none.
  """
  chosen = range(wanted) if isinstance(wanted, int) else wanted
  by_seed = [("", {SEED: int(seed)}) for seed in chosen]
  return [_join(parts) for parts in itertools.product(chain(sweep), by_seed)]


def _join(parts: Sequence[tuple[str, Diff]]) -> tuple[str, Diff]:
  name = ",".join(name for name, _ in parts if name)
  return name, functools.reduce(
    lambda a, b: _disjoint(name, a, b), (diff for _, diff in parts), {}
  )


def _disjoint(name: str, a: Diff, b: Diff) -> Diff:
  if twice := sorted(a.keys() & b.keys()):
    raise ConfigError(f"{name}: config.{twice[0]}: set twice, wanted once")
  return a | b

"""An experiment: a folder with a question, its arms and its results.

README.md        question, what the paper reports, method, table, verdict
sweep.py         BASE, a config, and `runs()`, names and diffs of it; as it
                 likes BASELINE (an arm; the first), METRICS (those of `compare`;
                 loss), HIGHER (metrics of its own of which more is better),
                 RELATIVE (curves of the relative loss error) and SEEDS (three);
                 measure(workdir), more numbers of a run that has ended; and
                 answer(lines, folder), notes on the table from the lines of
                 each arm, and pictures of its own
results.jsonl    a line a run, see `dsv3.lab.results`

A run is known by what it computes: the seed, and where its config departs from
the report's. Its name is for people; a changed base or length is another run.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.lab import sweep

# Keys that change neither what a run computes nor what it is measured on.
NEUTRAL = frozenset(
  "name data.cache train.log_every train.checkpoint_every "
  "train.checkpoint_minutes "
  "train.checkpoints_kept train.max_skipped mesh.data mesh.fsdp mesh.expert "
  "mesh.context mesh.tensor mesh.stage mesh.expert_nodes mesh.expert_rows".split()
)
_NAME = re.compile(r"[\w.,=+-]{1,100}")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """An arm under a seed."""

  name: str
  seed: int
  diff: dict[str, Any]  # computed: where it departs from BASE, the seed aside
  values: config.Config
  id: str  # of all that it computes, the seed aside

  @property
  def key(self) -> tuple[str, int]:
    return self.id, self.seed

  def __str__(self) -> str:
    return f"{self.name}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a folder asks to be run."""

  folder: pathlib.Path
  base: str  # a config's name or path
  runs: tuple[Run, ...]
  baseline: str  # the arm that the others are compared with
  metrics: tuple[str, ...]  # that they are compared in
  answer: Callable | None = None
  higher: tuple[str, ...] = ()  # metrics of which more is better
  relative: bool = False  # is the relative error of the loss asked for

  @property
  def name(self) -> str:
    return self.folder.resolve().name

  @property
  def results(self) -> pathlib.Path:
    return self.folder / "results.jsonl"

  @property
  def arms(self) -> list[str]:
    """Names, in the order of `runs()`."""
    return list(dict.fromkeys(run.name for run in self.runs))


def load(
  folder: str | pathlib.Path,
  n_seeds: int | None = None,
  overrides: Iterable[str] = (),
) -> Experiment:
  """The experiment in `folder`: every arm under every seed.

  `n_seeds` is of the arms that set no train.seed: the first of SEEDS, and those
  that follow them; None: SEEDS as `sweep.py` has them, or three. `overrides` are
  `key=value` on BASE. Runs stop at train.steps and not at train.max_minutes,
  unless an arm sets that. Raises ConfigError.
  """
  folder = pathlib.Path(folder)
  path = folder / "sweep.py"
  if not path.is_file():
    raise ConfigError(f"{folder}: found no experiment there (no {path})")
  module = overlay.module_of(path)
  base = getattr(module, "BASE", None)
  if not isinstance(base, str) or not callable(getattr(module, "runs", None)):
    raise ConfigError(f"{path}: found no BASE and runs(), wanted both")
  beside = folder / (base if base.endswith(".py") else f"{base}.py")
  base = str(beside) if beside.is_file() else base
  seeds = _seeds(path, getattr(module, "SEEDS", range(3)), n_seeds)
  try:
    listed = _listed(module.runs(), seeds)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
  except Exception as error:
    raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
  tree = overlay.overlay(overlay.load(base), {"train.max_minutes": 0.0})
  make = functools.partial(_run, path, tree, tuple(overrides))
  runs = tuple(make(name, diff) for name, diff in listed)
  _check_unique(path, runs)
  baseline = getattr(module, "BASELINE", runs[0].name)
  if baseline not in {run.name for run in runs}:
    raise ConfigError(f"{path}: BASELINE: found {baseline!r}, wanted an arm")
  return Experiment(
    folder,
    base,
    runs,
    baseline,
    _names(path, "METRICS", getattr(module, "METRICS", ["loss"])),
    answer=getattr(module, "answer", None),
    higher=_names(path, "HIGHER", getattr(module, "HIGHER", ())),
    relative=bool(getattr(module, "RELATIVE", False)),
  )


def _seeds(path, found: Any, n: int | None) -> list[int]:
  """`n` seeds: those of SEEDS, then the ones after its largest."""
  is_list = isinstance(found, Sequence) and not isinstance(found, str)
  if not is_list or not found or not all(isinstance(s, int) for s in found):
    raise ConfigError(f"{path}: SEEDS: found {found!r}, wanted a list of seeds")
  more = itertools.count(max(found) + 1)
  return list(itertools.islice(itertools.chain(found, more), n or len(found)))


def _names(path, what: str, found: Any) -> tuple[str, ...]:
  is_list = isinstance(found, Sequence) and not isinstance(found, str)
  if not is_list or not all(isinstance(name, str) for name in found):
    raise ConfigError(
      f"{path}: {what}: found {found!r}, wanted a list of names"
    )
  return tuple(found)


def _listed(found: Any, seeds: Sequence[int]) -> sweep.Sweep:
  """Arms under their seeds: all of the first seed, then of the second, ...

  So that a sweep which is cut, or grows, has as many seeds of every arm.
  """
  out = []
  for arm in found:
    if not isinstance(arm, (tuple, list)) or len(arm) != 2:
      raise ConfigError(f"runs(): found {arm!r}, wanted a name and a diff")
    name, diff = arm
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise ConfigError(
        f"runs(): found the name {name!r}, wanted letters, digits and .,=+-_"
      )
    if not isinstance(diff, Mapping):
      raise ConfigError(f"{name}: found {diff!r}, wanted a dict of dotted keys")
    out.append([(name, diff)])
    if sweep.SEED not in diff:
      out[-1] = sweep.seeds(out[-1], seeds)
  if not out:
    raise ConfigError("runs(): found no arm, wanted at least one")
  rounds = itertools.zip_longest(*out)
  return [arm for arms in rounds for arm in arms if arm is not None]


def _run(path, base, overrides, name: str, diff: Mapping[str, Any]) -> Run:
  tree = base.copy_and_resolve_references()
  before = overlay.flat(tree)
  shared = overlay.parse(tree, overrides)
  if twice := sorted(shared.keys() & diff.keys()):
    raise ConfigError(f"--config.{twice[0]}: is set by the arm {name} itself")
  try:
    values = config.build(overlay.overlay(tree, {**shared, **diff}))
  except ConfigError as error:
    raise ConfigError(f"{path}: {name}: {error}") from error
  after = overlay.flat(tree)
  changed = {key: after[key] for key in after if after[key] != before[key]}
  changed.pop(sweep.SEED, None)
  return Run(name, values.train.seed, changed, values, identity(values))


def identity(values: config.Config) -> str:
  """Twelve digits for all that a run computes, but for its seed.

  Of its departures from the report's config, so that a key that is new to the
  schema leaves old results what they are.
  """
  departures = overlay.difference(_paper(), dataclasses.asdict(values))
  found = {
    key: value
    for key, (_, value) in departures.items()
    if key not in NEUTRAL and key != sweep.SEED
  }
  text = json.dumps(found, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _paper() -> Mapping[str, Any]:
  root = overlay.load(str(overlay.CONFIGS / "v3_671b.py"))
  return dataclasses.asdict(config.build(root))


def _check_unique(path: pathlib.Path, runs: Sequence[Run]) -> None:
  seen: dict[Any, Run] = {}
  for run in runs:
    for what in ((run.name, run.seed), run.key):
      if what in seen:
        raise ConfigError(
          f"{path}: {seen[what]} and {run}: one name or one run twice"
        )
      seen[what] = run

"""Steps of a run once more, from a checkpoint, with a knob changed.

The same batches in the same order, from the same weights and moments: what is
different afterwards is the knob's doing. Without a change the numbers are the
run's own, to the bit, on the machine and versions that it ran on.

The routers' choices can be recorded, and frozen in another replay of the same
steps (`lab/frozen.py`): what is still different then is not the routing's doing.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.data.batches import Batches
from dsv3.lab import frozen as routers
from dsv3.train import feed, layout, program, run, schedule, state
from dsv3.train.checkpoint import Checkpoints
from dsv3.train.logs import read_metrics
from dsv3.train.trees import abstract, state_of, trees_of

# What decides which rows a step reads: a change of these is no replay.
_OF_DATA = ("data.", "schedule.batch_", "train.seed")
COLUMNS = ("loss", "loss/main", "grad_norm", "max_vio")  # those of the table


def replay(
  workdir: str | pathlib.Path,
  first: int,
  steps: int,
  diff: Mapping[str, Any] | None = None,
  *,
  record: str | pathlib.Path | None = None,
  frozen: str | pathlib.Path | None = None,
) -> Iterator[dict[str, float]]:
  """Metrics of `steps` steps after checkpoint `first`, under a changed config.

  `record` is a file for the choices of every router, written after the last
  step; `frozen` is one whose choices the routers take. A run's own choices
  frozen give its own numbers, to the bit where the frozen program rounds as the
  run's does and none is `misrecorded` (`frozen.Recorder`).

  Raises:
    ConfigError: no such checkpoint, a change of the data, of the shapes of
      parameters or moments, steps past the end of the run, or a trace of other
      steps, of other rows or of another model.
  """
  if record is not None and frozen is not None:
    raise ConfigError("--record: found beside --frozen, wanted one of them")
  values = _values(workdir, first, diff or {})
  if not values.model.n_routers and (record is not None or frozen is not None):
    raise ConfigError("replay: found a dense model, wanted routers")
  if first + steps > values.train.steps > 0:
    raise ConfigError(
      f"--steps: found {steps}, wanted at most {values.train.steps - first}: "
      f"the run has {values.train.steps}"
    )
  plan = schedule.make(values)
  alone = layout.of_devices(values, jax.devices()[:1])
  made = program.make(values, alone, plan)
  start, meta = _restore(workdir, first, made.like)
  start = state.with_memory(start, values.model)
  ahead = meta["sequences"] - plan.first_sequence(first)
  rows = feed.training(Batches(values, values.train.seed), plan, first, ahead)
  steps = range(first + 1, first + steps + 1)
  if frozen is not None:
    step = routers.frozen_step(made, values, plan)
    rows = routers.give(routers.load(frozen, steps), values.model, rows)
    return _run(step, start, rows, steps)
  if record is not None:
    return _record(
      record, routers.Recorder(values, made.step), start, rows, steps
    )
  return _run(made.step, start, rows, steps)


def _run(step, now, rows, steps):
  for number, batch in zip(steps, rows):
    now, metrics = step(now, batch)
    metrics = jax.device_get(metrics)
    found = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
    yield {"step": number, **found}


def _record(path, recorder, start, rows, steps):
  yield from _run(recorder, start, rows, steps)
  routers.save(path, recorder.trace)


def _values(workdir, first, diff) -> config.Config:
  """The run's config at that step, with the diff over it."""
  if of_data := [key for key in diff if key.startswith(_OF_DATA)]:
    raise ConfigError(
      f"replay: config.{of_data[0]}: decides which rows a step reads; wanted a "
      "knob under which the batches are the same"
    )
  tree = run.as_tree(run.config_at(workdir, first))
  # The schedule is in shares of the length that the run had then.
  length, _ = run.position_of(pathlib.Path(workdir), first + 1)
  values = config.build(overlay.overlay(tree, {"train.steps": length, **diff}))
  return dataclasses.replace(values, mesh=config.Mesh())  # on one device


def _restore(workdir, first, like):
  checkpoints = Checkpoints(
    pathlib.Path(workdir) / "checkpoints", read_only=True
  )
  if first not in checkpoints.steps:
    known = ", ".join(map(str, checkpoints.steps))
    raise ConfigError(
      f"--from={first}: no such checkpoint; there are {known or 'none'}"
    )
  wanted = trees_of(like.replace(ema=None))  # an average changes no step
  try:
    trees, meta = checkpoints.restore(first, abstract(wanted))
  except Exception as error:  # Orbax and TensorStore raise many kinds
    reason = str(error).strip().split("\n")[0][:120]
    raise ConfigError(
      f"replay: checkpoint {first} does not fit the changed config: {reason}"
    ) from error
  return state_of(trees, like.replace(ema=None)), meta


def beside(
  workdir: str | pathlib.Path, found: list[dict[str, float]]
) -> list[dict[str, Any]]:
  """Each step of a replay and what the run has logged of it, if it has."""
  logged = {
    row["step"]: row
    for row in read_metrics(pathlib.Path(workdir))
    if "loss" in row
  }
  return [
    {"step": row["step"], "replay": row, "run": logged.get(row["step"])}
    for row in found
  ]


def table(rows: list[dict[str, Any]]) -> str:
  """Run, replay and their difference, in the columns of COLUMNS."""
  lines = ["  step  " + "".join(f"{name:>34}" for name in COLUMNS)]
  for row in rows:
    cells = []
    for name in COLUMNS:
      new, old = row["replay"].get(name), (row["run"] or {}).get(name)
      cell = "-" if new is None else f"{new:.5g}"
      if new is not None and old is not None:
        cell = f"{old:.5g} -> {new:.5g} ({new - old:+.2g})"
      cells.append(f"{cell:>34}")
    lines.append(f"{row['step']:>6}  " + "".join(cells))
  return "\n".join(lines)

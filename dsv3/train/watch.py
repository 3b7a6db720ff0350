"""Watching FP8: what quantisation costs every Linear, and a guard over it.

A report runs the step's objective once more, forward and backward, on one
microbatch, and reads off each matmul beside its twin in high precision
(`ops/report.py`). Between reports it costs nothing.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3 import config
from dsv3.nn import precision
from dsv3.nn.transformer import make_model, split
from dsv3.ops import losses
from dsv3.ops.report import COLUMNS, OPERANDS, PASSES
from dsv3.train.schedule import Schedule
from dsv3.train.state import TrainState
from dsv3.train.step import Batch, count_choices, objective

# name of a stack's Linear -> [layers, PASSES, COLUMNS]
Report = dict[str, np.ndarray]


def graphdef_of(values: config.Config) -> nnx.GraphDef:
  """The structure of a config's model, without its arrays."""
  create = lambda: make_model(values.model, jax.random.key(0))
  return jax.eval_shape(lambda: split(create()))[0]


def make_report(graphdef, values: config.Config, schedule: Schedule):
  """A jitted (state, batch) -> Report, of the rows of the first microbatch."""

  @jax.jit
  def report(state: TrainState, batch: Batch):
    rows = len(batch.tokens_BL) // values.train.microbatches
    part = jax.tree.map(lambda x: x[:rows], batch)
    count = losses.counts(part.labels_BPL, part.segments_BL)
    prepared = precision.prepare(state.params, values.model, state.precision)
    total_XE = None
    if "batch" in values.model.moe.balancing:
      weights = precision.attach(state.params, values.model, prepared)
      total_XE = count_choices(weights, state.router, part, graphdef=graphdef)
    of_zeros = functools.partial(objective, graphdef=graphdef, values=values)
    found, _ = jax.grad(of_zeros, argnums=1, has_aux=True)(
      state.params,
      {"report": precision.report_zeros(state.params)},
      state,
      prepared,
      part,
      jnp.int32(0),
      count,
      total_XE,
      schedule(state.step),
    )
    return found["report"]

  return lambda state, batch: jax.device_get(report(state, batch))


def rows_of(report: Report) -> list[dict[str, Any]]:
  """One row for each Linear of each layer and each pass."""
  rows = []
  for name, values_XPC in sorted(report.items()):
    for layer, values_PC in enumerate(values_XPC):
      for pass_, operands, values_C in zip(PASSES, OPERANDS, values_PC):
        row = {"linear": precision.layer_name(name, layer), "pass": pass_}
        for column, value in zip(COLUMNS, values_C.tolist()):
          place, _, rest = column.partition("_")
          if rest:  # of the pass's first or second operand
            column = f"{operands['ab'.index(place)]}_{rest}"
          row[column] = value
        rows.append(row)
  return rows


def summary(report: Report) -> dict[str, float]:
  """Scalars of a report: the mean error of each pass, and the worst there are.

  Of what is quantised; what no operand gives is left out.
  """
  values_RPC = np.concatenate([np.asarray(v) for v in report.values()])
  error_RP = values_RPC[..., COLUMNS.index("error")]
  column = lambda name: values_RPC[
    ..., [COLUMNS.index(f"{place}_{name}") for place in "ab"]
  ]
  found = {
    f"fp8/error_{pass_}": (np.mean, error_RP[:, i])
    for i, pass_ in enumerate(PASSES)
  } | {
    "fp8/error_max": (np.max, error_RP),
    "fp8/underflow_max": (np.max, column("underflow")),
    "fp8/saturation_max": (np.max, column("saturation")),
    "fp8/scale_log2_min": (np.min, column("scale_min")),
    "fp8/scale_log2_max": (np.max, column("scale_max")),
  }
  given = {key: (of, x[~np.isnan(x)]) for key, (of, x) in found.items()}
  return {key: of(x) for key, (of, x) in given.items() if x.size}


def over(report: Report, threshold: float) -> dict[str, np.ndarray]:
  """Per Linear, [layers] bool: has a matmul an error over the threshold?

  One that is not finite is over it, one that stays high is not.
  """
  return {name: worst(values) > threshold for name, values in report.items()}


def worst(values_XPC) -> np.ndarray:
  """The largest error of each layer's matmuls; 0 where all stay high."""
  error_XP = np.asarray(values_XPC)[..., COLUMNS.index("error")]
  return np.where(np.isnan(error_XP), 0, error_XP).max(-1)


class Watch:
  """Reports of a run every `precision.report_every` steps, and its guard."""

  def __init__(
    self, graphdef, values: config.Config, schedule: Schedule, workdir
  ):
    self._precision = values.model.precision
    self._path = pathlib.Path(workdir) / "fp8.jsonl"
    self._report = None
    if self._precision.report_every and precision.recipe_of(values.model):
      self._report = make_report(graphdef, values, schedule)

  def is_due(self, done: int) -> bool:
    """After step `done`?"""
    return bool(self._report) and done % self._precision.report_every == 0

  def look(
    self, done: int, state: TrainState, batch: Batch, tell
  ) -> tuple[TrainState, Mapping[str, float]]:
    """Writes the report to fp8.jsonl; the state with the guard's Linears."""
    report = self._report(state, batch)
    with open(self._path, "a") as file:
      for row in rows_of(report):
        file.write(json.dumps({"step": done} | plain(row)) + "\n")
    if self._precision.guard:
      state = self._guard(done, report, state, tell)
    return state, summary(report)

  def _guard(self, done, report, state, tell) -> TrainState:
    found = over(report, self._precision.guard)
    memory, high = state.precision, dict(state.precision.high)
    keep = self._precision.guard_action == "keep_high"
    for name, over_X in found.items():
      already_X = np.asarray(high[name]) if keep else np.zeros_like(over_X)
      for layer in np.flatnonzero(over_X & ~already_X):
        error = worst(report[name])[layer]
        tell(
          f"step {done}: {precision.layer_name(name, int(layer))}: relative "
          f"error {error:.3f}, over precision.guard = {self._precision.guard:g}"
          + ("; high precision from here on" if keep else "")
        )
      if keep:
        high[name] = jnp.asarray(already_X | over_X)
    return state.replace(precision=memory._replace(high=high))


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
  """Strict JSON: null is NaN, what stays high; infinity is a text."""

  def strict(value):
    if not isinstance(value, float) or np.isfinite(value):
      return value
    return None if np.isnan(value) else "Infinity"

  return {key: strict(value) for key, value in row.items()}

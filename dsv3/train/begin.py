"""What a run begins with: its newest checkpoint, given weights, or drawn ones."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.data.batches import Batches
from dsv3.hf import imported
from dsv3.nn import precision
from dsv3.parallel import processes
from dsv3.train import identity, state
from dsv3.train.checkpoint import Checkpoints
from dsv3.train.program import Program
from dsv3.train.restore import start_from
from dsv3.train.trees import abstract, state_of, trees_of


class Begun(NamedTuple):
  """Where a run stands before its first step, or its next."""

  done: int  # steps so far
  sequences: int  # that have been read
  state: state.TrainState
  average: Any  # of the parameters, that the host keeps; else those themselves


def on_host(values: config.Config) -> bool:
  """Is there a moving average in the host's memory?"""
  train_values = values.train
  return train_values.ema_decay > 0 and train_values.ema_place == "host"


def begin(
  values: config.Config,
  workdir: pathlib.Path,
  checkpoints: Checkpoints,
  program: Program,
  data: Batches,
) -> Begun:
  """The newest checkpoint, or what a new run begins with.

  Raises ConfigError for weights that do not fit, or if another process finds
  another step.
  """
  like, shardings = program.like, program.shardings
  host = on_host(values)
  trees = trees_of(like, like.params if host else None)
  where = trees_of(shardings, shardings.params if host else None)
  found = checkpoints.restore_newest(
    abstract(trees, where), print, set_aside=True
  )
  done = found[0] if found else 0
  if processes.largest(done) != done:
    raise ConfigError(
      f"--workdir={workdir}: this process finds step {done} and another a later "
      "one; the folder must be one that all see alike"
    )
  if found is None:
    new = _new(values, workdir, program)
    return Begun(0, 0, new, new.params)
  _, trees, meta = found
  restored = state_of(trees, like)
  restored = _remembering(restored, values, checkpoints, done, meta)
  identity.check_tokenizer(meta, data.tokenizer)
  if change := identity.other_text(meta, data):
    print(f"{change}: from here on the run reads other text")
  return Begun(done, meta["sequences"], restored, trees.get("ema"))


def _new(
  values: config.Config, workdir: pathlib.Path, program: Program
) -> state.TrainState:
  """The state before the first step: with weights that are given, or drawn."""
  model, other = values.model, values.train.start_from
  if other and imported.is_there(workdir):
    raise ConfigError(
      f"config.train.start_from: found {other}, wanted none: "
      f"{workdir} has imported weights"
    )
  where = program.shardings
  place = {"params": where.params, "router": where.router}
  if imported.is_there(workdir):
    _, *weights = imported.parameters(workdir, model, shardings=place)
  elif other:
    weights = start_from(other, model, place)
  else:
    create = lambda: program.create()[1]
    return jax.jit(create, out_shardings=where)()
  make = functools.partial(state.of_weights, values, program.adam)
  return jax.jit(make, out_shardings=where)(*weights)


def _remembering(
  restored: state.TrainState,
  values: config.Config,
  checkpoints: Checkpoints,
  done: int,
  meta: dict[str, Any],
) -> state.TrainState:
  """Tells what a recipe or a guard forgets that was not the run's so far."""
  if restored.precision.history is None:
    print("precision: the recipe's scales start anew")
  restored = state.with_memory(restored, values.model)
  if restored.precision.high:
    return restored
  before = checkpoints.stored(done, "guarded", meta)
  if names := precision.names_of(before):
    print(
      "precision: without a guard that keeps them high, these are quantised "
      f"again unless precision.high names them: {', '.join(names)}"
    )
  return restored

"""The micro model's step, compiled once a process, and batches for it."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3 import config
from dsv3.train import optimizer, schedule, state, step
from tests import micro
from tests.nn import weights

# With an EMA on the device, which changes nothing else.
BASE = {
  "train.ema_decay": 0.9,
  "train.ema_place": "device",
  "schedule.z_weight": 1e-4,
  "model.moe.n_routed": 8,
  "model.moe.n_groups": 4,
  "model.moe.top_groups": 2,
}


class Prepared(NamedTuple):
  """A config, the state before its first step, and its compiled step."""

  values: config.Config
  start: state.TrainState
  step: Any  # (state, batch) -> (state, metrics)


@functools.cache
def _prepared(items) -> Prepared:
  values = micro.config_of({**BASE, **dict(items)})
  made = optimizer.make(values.optimizer)
  box = []

  @jax.jit
  def create():
    graphdef, start = state.create(values, made)
    box.append(graphdef)
    return start

  start = create()
  function = functools.partial(
    step.train_step,
    graphdef=box[0],
    optimizer=made,
    schedule=schedule.make(values),
    values=values,
  )
  return Prepared(values, start, jax.jit(function))


def prepared(diff=None) -> Prepared:
  """The step of the micro config with `diff`."""
  return _prepared(tuple(sorted((diff or {}).items())))


def random_batch(values: config.Config, seed: int = 0, segments=None):
  """Rows of random tokens; `segments` are ids of L + 1 positions, or None."""
  length, size = values.data.seq_len, values.schedule.batch_size
  rng = np.random.default_rng(seed)
  rows = rng.integers(0, values.model.vocab_size, (size, length + 1))
  return weights.batch_of(rows, values.model.mtp.depth, segments)

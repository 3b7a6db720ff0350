"""The compiled step of a run: its function, its state's shapes, where all lies."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from dsv3 import config
from dsv3.train import optimizer, state
from dsv3.train.layout import Layout
from dsv3.train.schedule import Schedule
from dsv3.train.state import TrainState
from dsv3.train.step import train_step


@dataclasses.dataclass(frozen=True)
class Program:
  """A config on a mesh, before anything is compiled or has memory."""

  graphdef: nnx.GraphDef
  adam: optax.GradientTransformation
  create: Callable[[], tuple[nnx.GraphDef, TrainState]]
  like: TrainState  # shapes and types
  shardings: TrainState
  step: Any  # jitted: (state, batch) -> (state, metrics); donates the state


def make(values: config.Config, layout: Layout, schedule: Schedule) -> Program:
  """The Program of a run; ConfigError for what the model cannot be."""
  adam = optimizer.make(values.optimizer)
  create = lambda: state.create(values, adam, layout.placement)
  graphdef, like = jax.eval_shape(create)
  shardings = layout.of_state(like)
  step = jax.jit(
    functools.partial(
      train_step,
      graphdef=graphdef,
      optimizer=adam,
      schedule=schedule,
      values=values,
      placement=layout.placement,
    ),
    in_shardings=(shardings, layout.of_batch()),
    out_shardings=(shardings, layout.everywhere()),
    donate_argnums=0,
  )
  return Program(graphdef, adam, create, like, shardings, step)

"""Everything that training changes, as one pytree."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from dsv3 import config
from dsv3.nn.precision import Memory, check_patterns, first_memory
from dsv3.nn.transformer import make_model, split
from dsv3.ops.placement import ONE_DEVICE, Placement


@struct.dataclass
class TrainState:
  """The state between two steps; `dsv3.train.checkpoint` saves all of it."""

  step: jax.Array  # int32, optimiser steps begun; tokens follow from it
  params: nnx.State  # float32 master weights
  opt_state: optax.OptState
  router: nnx.State  # one bias row per router, the MTP module's included
  ema: nnx.State | None  # of params, or None
  precision: Memory  # of an FP8 recipe; without arrays where it has none
  skipped: jax.Array  # int32, updates left out in a row
  skipped_total: jax.Array  # int32, updates left out in the whole run


def create(
  values: config.Config,
  optimizer: optax.GradientTransformation,
  placement: Placement = ONE_DEVICE,
) -> tuple[nnx.GraphDef, TrainState]:
  """The structure of the model and the state before the first step.

  Under `jax.eval_shape` no memory is taken, at any size.
  """
  key = jax.random.key(values.train.seed)
  model = make_model(values.model, key, placement)
  graphdef, params, router = split(model)
  check_patterns(params, values.model)
  return graphdef, of_weights(values, optimizer, params, router)


def of_weights(
  values: config.Config,
  optimizer: optax.GradientTransformation,
  params: nnx.State,
  router: nnx.State,
) -> TrainState:
  """The state before the first step with these weights."""
  on_device = values.train.ema_decay > 0 and values.train.ema_place == "device"
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    router=router,
    ema=jax.tree.map(jnp.copy, params) if on_device else None,
    precision=first_memory(params, values.model),
    skipped=jnp.int32(0),
    skipped_total=jnp.int32(0),
  )


def with_memory(state: TrainState, model: config.Model) -> TrainState:
  """The state with what a recipe remembers anew where a checkpoint had it not."""
  memory, anew = state.precision, first_memory(state.params, model)
  parts = (new if old is None else old for old, new in zip(memory, anew))
  return state.replace(precision=Memory(*parts))

"""Training steps with recorded routing: what `dsv3 replay` stores and freezes.

A `Trace` has the choices of every router in some steps. Frozen, they are part of
the batch, and given to the routers before its forward pass; all else is the step
of `train/step.py`. Gates, balance losses and gradients are of the router's own
affinities; its bias moves by the loads of the frozen choices.
"""

import dataclasses
import functools
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.lab import routing
from dsv3.nn import moe, precision
from dsv3.nn.transformer import Output, Transformer
from dsv3.train import watch
from dsv3.train.program import Program
from dsv3.train.schedule import Schedule
from dsv3.train.state import TrainState
from dsv3.train.step import Batch, train_step


class Choices(NamedTuple):
  """What the routers chose in a step: the MoE layers, then the MTP modules."""

  experts_BXLK: np.ndarray  # int32, best first
  tokens_BL: np.ndarray  # of which rows
  n_routed: int


Trace = dict[int, Choices]  # by step; the first of a run is 1


def save(path: str | pathlib.Path, trace: Trace) -> None:
  """Writes a NumPy archive (.npz) of arrays STEP/FIELD."""
  arrays = {
    f"{step}/{field}": value
    for step, choices in trace.items()
    for field, value in choices._asdict().items()
  }
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("wb") as file:  # a path would be given a suffix
    np.savez_compressed(file, **arrays)


def load(path: str | pathlib.Path, steps: range) -> Trace:
  """Of a trace that `save` wrote these steps; ConfigError if it lacks one."""
  try:
    with np.load(path) as found:
      known = sorted({int(name.split("/")[0]) for name in found})
      if missing := sorted(set(steps) - set(known)):
        raise ConfigError(
          f"{path}: found steps {known}, wanted {missing[0]} too"
        )
      return {
        step: Choices(*(found[f"{step}/{field}"] for field in Choices._fields))
        for step in steps
      }
  except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
    raise ConfigError(f"{path}: found no trace of steps: {error}") from error


def _stacks(model: Transformer) -> list[moe.Moe]:
  """The stacked MoE layers of the main model, and of its MTP modules."""
  stacks = [model.moe.ffn] if hasattr(model, "moe") else []
  if hasattr(model, "mtp") and isinstance(model.mtp.block.ffn, moe.Moe):
    stacks.append(model.mtp.block.ffn)
  return stacks


class FrozenBatch(NamedTuple):
  """A `Batch` whose tokens have their experts; it goes through the same step."""

  tokens_BL: jax.Array
  labels_BPL: jax.Array
  segments_BL: jax.Array
  experts_BXLK: jax.Array

  dims = *Batch.dims, "BXLK"

  def through(self, model: Transformer) -> Output:
    """`Batch.through`, with the choices made."""
    stacks = _stacks(model)
    sizes = [len(ffn.router.centroid[...]) for ffn in stacks]
    experts_XBLK = jnp.moveaxis(self.experts_BXLK, 1, 0)
    parts = jnp.split(experts_XBLK, np.cumsum(sizes)[:-1])
    for ffn, part in zip(stacks, parts, strict=True):
      experts_XTK = part.reshape(len(part), -1, part.shape[-1])
      ffn.router = routing.Frozen(ffn.router, experts_XTK)
    return Batch.through(self, model)


def give(
  trace: Trace, model: config.Model, rows: Iterable[Batch]
) -> Iterator[FrozenBatch]:
  """Each step's rows with its choices.

  Raises ConfigError for choices of another model or of other rows.
  """
  for (step, choices), batch in zip(trace.items(), rows):
    n_rows, length = batch.tokens_BL.shape
    wanted = n_rows, model.n_routers, length, model.moe.top_k
    found = choices.experts_BXLK.shape
    if found != wanted:
      raise ConfigError(
        f"trace: step {step}: experts_BXLK: found {found}, wanted {wanted} "
        "(sequences, routers, positions, top_k)"
      )
    if choices.n_routed != model.moe.n_routed:
      raise ConfigError(
        f"trace: step {step}: n_routed: found {choices.n_routed}, wanted "
        f"{model.moe.n_routed}"
      )
    if not np.array_equal(choices.tokens_BL, batch.tokens_BL):
      raise ConfigError(
        f"trace: step {step}: tokens_BL: found other rows than the step's"
      )
    yield FrozenBatch(*batch, choices.experts_BXLK)


def frozen_step(
  made: Program, values: config.Config, schedule: Schedule
) -> Callable:
  """The step of a Program over every `FrozenBatch`, on one device."""
  function = functools.partial(
    train_step,
    graphdef=made.graphdef,
    optimizer=made.adam,
    schedule=schedule,
    values=values,
  )
  return jax.jit(function, donate_argnums=0)


class Recorder:
  """A step that first writes down what the routers choose, in `trace`.

  They are those of a forward pass of its own, with layers unrolled and nothing
  recomputed. Where that rounds otherwise than the step, a token between two
  experts can go to the other: by so many choices at least, the metric
  `misrecorded`, the loads are not those of the step.
  """

  def __init__(self, values: config.Config, step: Callable):
    model = dataclasses.replace(values.model, layers="unrolled", remat="none")
    self.trace: Trace = {}
    self._step, self._microbatches = step, values.train.microbatches
    graphdef = watch.graphdef_of(dataclasses.replace(values, model=model))
    self._choose = jax.jit(functools.partial(_choose, graphdef=graphdef))
    self._n_routed = model.moe.n_routed

  def __call__(self, state: TrainState, batch: Batch):
    """As the step: the next state, and the metrics."""
    parts = zip(*(np.split(x, self._microbatches) for x in batch))
    found = [self._choose(state, Batch(*part)) for part in parts]
    experts, load_XE = zip(*jax.device_get(found))
    self.trace[int(state.step) + 1] = Choices(
      np.concatenate(experts), batch.tokens_BL, self._n_routed
    )
    after, metrics = self._step(state, batch)
    differs_XE = np.abs(sum(load_XE) - metrics["load_XE"])
    return after, metrics | {"misrecorded": differs_XE.sum() // 2}


def _choose(state: TrainState, part: Batch, *, graphdef):
  """Choices and loads of a microbatch, under weights as its step has them."""
  model = nnx.merge(graphdef, state.params, state.router).model
  prepared = precision.prepare(state.params, model, state.precision)
  weights = precision.attach(state.params, model, prepared)
  network, found = nnx.merge(graphdef, weights, state.router), []
  for ffn in _stacks(network):
    ffn.router = routing.Recorder(ffn.router, found.append)
  load_XE = part.through(network).traffic.load
  in_rows = lambda x_TK: x_TK.reshape(*part.tokens_BL.shape, -1)
  return jnp.stack([in_rows(r.experts_TK) for r in found], 1), load_XE

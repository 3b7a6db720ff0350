"""A trained model out of a run folder, for evaluation, sampling, notebooks."""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.hf import imported
from dsv3.nn import precision
from dsv3.nn.transformer import Transformer
from dsv3.train import run, state
from dsv3.train.checkpoint import CheckpointError, Checkpoints
from dsv3.train.trees import abstract


class Trained(NamedTuple):
  """The model of a run after `step` steps."""

  values: config.Config
  step: int
  graphdef: nnx.GraphDef
  params: nnx.State
  router: nnx.State
  meta: dict[str, Any]  # of the checkpoint

  @property
  def model(self) -> Transformer:
    return nnx.merge(self.graphdef, self.params, self.router)


def _warn(text: str) -> None:
  print(text, file=sys.stderr)


def restore(
  workdir: str | pathlib.Path,
  step: int | None = None,
  *,
  ema: bool = False,
  as_stored: bool = False,
  tell: Callable[[str], None] = _warn,
  shardings: Mapping[str, Any] | None = None,
) -> Trained:
  """The model at `step`, or at the newest checkpoint that can be read.

  Imported weights are step 0. `ema` gives the moving average of the parameters
  in their place. Optimizer moments stay on disk. `as_stored` keeps parameters
  in the type of an import, where float32 is the rule. `shardings` of "params" and
  "router" say where they are to lie; None: on one device. Raises ConfigError where
  there is no such checkpoint.
  """
  values = run.stored_config(workdir)
  if ema and not values.train.ema_decay:
    raise ConfigError(
      f"--ema: {workdir} has no moving average (train.ema_decay = 0)"
    )
  folder = pathlib.Path(workdir) / "checkpoints"
  checkpoints = Checkpoints(folder, read_only=True) if folder.is_dir() else None
  steps = checkpoints.steps if checkpoints else []
  has_import = imported.is_there(workdir)
  if has_import and step == 0 or not steps:
    return _restore_import(workdir, values, step, ema, as_stored, shardings)
  graphdef, params, router = jax.eval_shape(
    lambda: state.split(state.make_model(values.model, jax.random.key(0)))
  )
  weights = "ema" if ema else "params"
  trees = {weights: params, "router": router}
  where = shardings and {**shardings, weights: shardings["params"]}
  like = abstract({k: t for k, t in trees.items() if jax.tree.leaves(t)}, where)
  if step is None:
    step, found, meta = checkpoints.restore_newest(like, tell)
  elif step in steps:
    try:
      found, meta = checkpoints.restore(step, like)
    except Exception as error:  # Orbax and TensorStore raise many kinds
      reason = str(error).strip().split("\n")[0][:120]
      raise CheckpointError(f"checkpoint {step}: {reason}") from error
  else:
    known = ", ".join(map(str, [0, *steps] if has_import else steps))
    raise ConfigError(f"--step={step}: no such checkpoint; there are {known}")
  if (then := run.config_at(workdir, step)) != values:  # another recipe
    values = then
    graphdef = jax.eval_shape(
      lambda: state.split(state.make_model(values.model, jax.random.key(0)))[0]
    )
  return Trained(
    values, step, graphdef, found[weights], found.get("router", router), meta
  )


def restore_memory(
  workdir: str | pathlib.Path, step: int, params: nnx.State, model: config.Model
) -> precision.Memory:
  """What the recipe of `model` remembers at a step; anew if it has nothing."""
  memory = precision.first_memory(params, model)
  folder = pathlib.Path(workdir) / "checkpoints"
  if not jax.tree.leaves(memory) or not (folder / str(step)).is_dir():
    return memory
  parts = {"amax": memory.history, "guarded": memory.high}
  like = abstract({item: part for item, part in parts.items() if part})
  found, _ = Checkpoints(folder, read_only=True).restore(step, like)
  return precision.Memory(*({**parts, **found}[item] for item in parts))


def _restore_import(
  workdir, values, step, ema, as_stored, shardings
) -> Trained:
  if not imported.is_there(workdir):
    raise ConfigError(f"{workdir}/checkpoints: found no checkpoint yet")
  if ema:
    raise ConfigError(f"--ema: the imported weights of {workdir} have none")
  if step:
    raise ConfigError(f"--step={step}: no such checkpoint; there is 0")
  trees = imported.parameters(
    workdir, values.model, as_stored=as_stored, shardings=shardings
  )
  return Trained(values, 0, *trees, {})


def start_from(
  workdir: str, model: config.Model, shardings: Mapping[str, Any] | None = None
) -> tuple[nnx.State, nnx.State]:
  """The newest weights of another run, for one with parameters of its shapes."""
  try:
    trained = restore(workdir, shardings=shardings)
  except ConfigError as error:
    raise ConfigError(f"config.train.start_from: {error}") from error
  imported.check_fits(model, trained.values.model, workdir)
  return trained.params, trained.router

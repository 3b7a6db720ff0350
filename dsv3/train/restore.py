"""A trained model out of a run folder, for evaluation, sampling, notebooks."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.nn.transformer import Transformer
from dsv3.train import run, state
from dsv3.train.checkpoint import CheckpointError, Checkpoints, abstract


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
) -> Trained:
  """The model at `step`, or at the newest checkpoint that can be read.

  `ema` gives the moving average of the parameters in their place. Optimizer
  moments stay on disk. `as_stored` keeps parameters in the type of an import,
  where float32 is the rule. Raises ConfigError where there is no such checkpoint.
  """
  values = run.stored_config(workdir)
  if ema and not values.train.ema_decay:
    raise ConfigError(
      f"--ema: {workdir} has no moving average (train.ema_decay = 0)"
    )
  key = jax.random.key(0)
  graphdef, params, router = jax.eval_shape(
    lambda: state.split(state.make_model(values.model, key))
  )
  weights = "ema" if ema else "params"
  trees = {weights: params, "router": router}
  like = abstract({k: t for k, t in trees.items() if jax.tree.leaves(t)})
  checkpoints = _open(pathlib.Path(workdir) / "checkpoints")
  if step is None:
    step, found, meta = checkpoints.restore_newest(
      like, tell, as_stored=as_stored
    )
  elif step in checkpoints.steps:
    try:
      found, meta = checkpoints.restore(step, like, as_stored=as_stored)
    except Exception as error:  # Orbax and TensorStore raise many kinds
      reason = str(error).strip().split("\n")[0][:120]
      raise CheckpointError(f"checkpoint {step}: {reason}") from error
  else:
    known = ", ".join(map(str, checkpoints.steps))
    raise ConfigError(f"--step={step}: no such checkpoint; there are {known}")
  return Trained(
    values, step, graphdef, found[weights], found.get("router", router), meta
  )


def _open(folder: pathlib.Path) -> Checkpoints:
  if folder.is_dir():
    checkpoints = Checkpoints(folder, read_only=True)
    if checkpoints.steps:
      return checkpoints
  raise ConfigError(f"{folder}: found no checkpoint yet")

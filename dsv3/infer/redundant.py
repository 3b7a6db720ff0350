"""Copies of busy experts in a model that decodes (Sec. 3.4)."""

import functools

import jax
import numpy as np
from flax import nnx

from dsv3.config import ConfigError
from dsv3.nn import moe
from dsv3.nn.transformer import Transformer
from dsv3.ops import copies
from dsv3.parallel.eplb import Placement


def with_copies(model: Transformer, placed: Placement) -> Transformer:
  """The model with experts in the slots of `placed`; it computes the same.

  Rows of `placed` are the MoE layers, and then, if it has them, the MTP modules.
  Raises ConfigError for another number of rows, or of experts.
  """
  model = nnx.merge(*nnx.split(model))  # another, of the same arrays
  n_layers, n_modules = model.model.n_moe_layers, model.model.mtp.depth
  found, wanted = placed.copies_XE.shape, model.model.moe.n_routed
  if found[0] not in (n_layers, n_layers + n_modules) or found[1] != wanted:
    raise ConfigError(
      f"copies: found {found[1]} experts in {found[0]} layers, wanted {wanted} in "
      f"{n_layers}, and {n_modules} more for MTP modules"
    )
  _give(model.moe.ffn, placed.expert_XS[:n_layers])
  if found[0] > n_layers:
    _give(model.mtp.block.ffn, placed.expert_XS[n_layers:])
  return model


def _give(ffn: moe.Moe, expert_XS: np.ndarray) -> None:
  """Slots to the experts of a stack of layers."""
  experts, n_experts = ffn.experts, ffn.moe.n_routed
  take = jax.vmap(functools.partial(jax.numpy.take, axis=0))
  for name in ("w_gate_up", "w_down"):
    w = getattr(experts, name)
    setattr(experts, name, w.replace(take(w.get_value(), expert_XS)))
  ffn.experts = ffn.placement.gather(experts, jax.numpy.float32)
  tables = [copies.table(row, n_experts) for row in expert_XS]
  width = max(table.shape[1] for table in tables)
  widen = lambda t: np.pad(
    t, ((0, 0), (0, width - t.shape[1])), constant_values=-1
  )
  slot_XEC = jax.numpy.asarray(np.stack([widen(t) for t in tables]))
  ffn.slots = moe.Slots(slot_XEC, n=expert_XS.shape[1])

"""What a step says about itself, computed inside it, at no extra sync."""

import jax
import jax.numpy as jnp
import optax

from dsv3 import config
from dsv3.ops import balance, losses
from dsv3.ops.dispatch import Moved


def of_step(loss, sums, count, grad_norm, hyper, after) -> dict[str, jax.Array]:
  """Metrics of a step, all arrays. Losses in nats a token.

  `loss` is the objective, `loss/NAME` its terms before their weights. The
  rows of `max_vio_X`, `dead_X` and `load_XE` are the MoE layers, then MTP's.
  """
  out = {"loss": loss}
  for name, value in losses.means(sums.terms, count).items():
    out[f"loss/{name}"] = value
  for depth, correct in enumerate(sums.correct_P):
    name = f"accuracy/{'main' if depth == 0 else f'mtp_{depth}'}"
    out[name] = correct / count.tokens
  out |= {
    "grad_norm": grad_norm,
    "param_norm": optax.tree.norm(after.params),
    "lr": hyper.lr,
    "mtp_weight": hyper.mtp_weight,
    "bias_speed": hyper.bias_speed,
    "batch_tokens": count.tokens,
    "skipped": after.skipped,
    "skipped_total": after.skipped_total,
  }
  return out | of_load(sums.load_XE) | of_bias(after.router)


def of_load(load_XE: jax.Array) -> dict[str, jax.Array]:
  """Balance of a batch: MaxVio by layer and on average, experts without a token."""
  if not load_XE.shape[0]:
    return {}
  violation_X = balance.max_violation(load_XE)
  return {
    "max_vio": violation_X.mean(),
    "max_vio_X": violation_X,
    "dead_experts": (load_XE == 0).sum(dtype=jnp.int32),
    "dead_X": (load_XE == 0).sum(-1, dtype=jnp.int32),
    "load_XE": load_XE,
  }


def of_exchange(moved_X: Moved, model: config.Model) -> dict[str, jax.Array]:
  """Gigabytes that activations and their gradients took to experts and back.

  `saved` is what more would have gone between nodes, had a token gone there once
  for every expert and not once for every node (Sec. 3.2.2). `late` went in further
  rounds (`mesh.expert_rows`), and is in the other two. A token goes there and back,
  and so does its gradient; what is recomputed goes there once more (`ways`).
  """
  sent = ways(model) * row_bytes(model)
  return {
    f"exchange_gb/{name}": sent * n_X.astype(jnp.float32).sum() / 1e9
    for name, n_X in moved_X._asdict().items()
  }


def ways(model: config.Model) -> int:
  """That a row goes in a step; the last of five where it is recomputed."""
  return 4 if model.remat == "none" else 5


def row_bytes(model: config.Model) -> int:
  """Of a token's activation, as it goes to an expert or back."""
  return model.dim * jnp.dtype(model.dtype).itemsize


def of_bias(router) -> dict[str, jax.Array]:
  """Range of the routers' biases over all layers."""
  biases = jax.tree.leaves(router)
  if not biases:
    return {}
  return {
    "bias_min": jnp.min(jnp.stack([b.min() for b in biases])),
    "bias_max": jnp.max(jnp.stack([b.max() for b in biases])),
  }

"""AdamW as in the report: clipped, decayed, its moments in BF16 (Sec. 3.3.3, 4.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv3 import config


class AdamState(NamedTuple):
  """Moments in `moment_dtype`; count is int32 updates made."""

  count: jax.Array
  first: optax.Updates
  second: optax.Updates


def scale_by_adam(
  b1: float, b2: float, eps: float, moment_dtype: str
) -> optax.GradientTransformation:
  """Adam's direction with *both* moments stored in `moment_dtype`.

  optax's own keeps the second moment in the type of the parameters. Arithmetic
  is float32; only what is kept between steps is rounded.
  """

  def init(params):
    zeros = lambda p: jnp.zeros(p.shape, moment_dtype)
    moments = lambda: jax.tree.map(zeros, params)
    return AdamState(jnp.int32(0), moments(), moments())

  def update(grads, state, params=None):
    del params
    count = state.count + 1
    fix1 = 1 - b1 ** count.astype(jnp.float32)
    fix2 = 1 - b2 ** count.astype(jnp.float32)
    blend = lambda decay, old, new: (
      decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
    )
    first = jax.tree.map(lambda m, g: blend(b1, m, g), state.first, grads)
    second = jax.tree.map(lambda v, g: blend(b2, v, g * g), state.second, grads)
    updates = jax.tree.map(
      lambda m, v: (m / fix1) / (jnp.sqrt(v / fix2) + eps), first, second
    )
    keep = lambda moments: jax.tree.map(
      lambda m: m.astype(moment_dtype), moments
    )
    return updates, AdamState(count, keep(first), keep(second))

  return optax.GradientTransformation(init, update)


def decay_mask(params) -> optax.Params:
  """True for matrices, False for the gains of norms (unpublished; ours).

  By name: layers are stacked, so a gain is an array of two dims as well.

  Departs: the report does not say that gains are spared from the decay.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "gain" not in jax.tree_util.keystr(path), params
  )


def make(values: config.Optimizer) -> optax.GradientTransformation:
  """Clip, Adam, decay: the update before the learning rate, which the step holds.

  The decay is decoupled: `weight_decay` times the parameter is added to Adam's
  direction, and the learning rate multiplies both (Loshchilov and Hutter).
  """
  clip = values.clip_norm
  return optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    scale_by_adam(values.b1, values.b2, values.eps, values.moment_dtype),
    optax.add_decayed_weights(
      values.weight_decay,
      mask=decay_mask if values.decayed == "matrices" else None,
    ),
  )

"""Keeping the experts equally busy: the bias, the losses and the measure."""

import jax
import jax.numpy as jnp


def update_bias(
  bias_E: jax.Array,
  load_E: jax.Array,
  speed: float | jax.Array,
  step: str = "sign",
) -> jax.Array:
  """Next bias b of Eq. 16: an overloaded expert's falls by `speed` (Sec. 2.1.2).

  `load_E` is int32, the tokens every expert took in the whole global batch; any
  leading dims (layers) are kept apart. Called once per optimiser step, outside
  differentiation and outside the optimizer. float32 in and out.

  Step "sign" is the report's; "proportional" multiplies the speed by how far the
  load is under the mean, in means: 1 for an expert without tokens. (The loss-free
  paper's counts tokens; its speed would depend on the batch.)

  >>> update_bias(jnp.zeros(3), jnp.array([4, 1, 1]), 0.001).tolist()
  [-0.0010000000474974513, 0.0010000000474974513, 0.0010000000474974513]
  """
  n_routed = load_E.shape[-1]
  if step == "proportional":
    mean = load_E.sum(-1, keepdims=True).astype(jnp.float32) / n_routed
    under = jnp.where(mean > 0, 1 - load_E / jnp.maximum(mean, 1e-9), 0)
    return bias_E + speed * under
  # mean(load) - load, times E: exact in integers, where a float32 mean of
  # large counts can take the wrong sign. A count times E passes int32 from
  # 8M tokens (E = 256), so the sign is taken of high and low parts.
  total = load_E.sum(-1, keepdims=True)
  quotient, rest = total // n_routed, total % n_routed
  above = quotient - load_E
  sign = jnp.where(above != 0, jnp.sign(above), jnp.sign(rest))
  # load == quotient and rest > 0: the mean is above the load.
  return bias_E + speed * sign.astype(jnp.float32)


def sequence_statistics(
  affinity_TE: jax.Array, segments_BL: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array]:
  """What the balance losses need of a layer, per sequence (Eq. 18-20).

  Returns count_BE, how many tokens have expert i among the top_k of their
  *unbiased* affinities (the sum of Eq. 18, int32), and mass_BE, the sum of the
  normalised affinities s' (Eq. 19, 20). Padding (segment 0) is in neither.
  """
  n_routed = affinity_TE.shape[-1]
  affinity_BLE = affinity_TE.reshape(*segments_BL.shape, n_routed)
  valid_BL1 = (segments_BL > 0)[..., None]
  _, top_BLK = jax.lax.top_k(jax.lax.stop_gradient(affinity_BLE), top_k)
  chosen_BLE = (top_BLK[..., None] == jnp.arange(n_routed)).any(-2)
  count_BE = (chosen_BLE & valid_BL1).sum(1, dtype=jnp.int32)
  share_BLE = affinity_BLE / (affinity_BLE.sum(-1, keepdims=True) + 1e-20)
  return count_BE, jnp.where(valid_BL1, share_BLE, 0.0).sum(1)


def balance_loss(
  count_BE: jax.Array, mass_BE: jax.Array, top_k: int
) -> jax.Array:
  """Sum over i of f_i P_i for every sequence, without alpha (Eq. 17).

  f_i = E / (K T) count_i (Eq. 18) carries no gradient; P_i = mass_i / T (Eq.
  20). T is the number of valid tokens, found as sum(count) / K. 1 at perfect
  balance, E / K when the same K experts take all. A sequence of padding gives
  0. The batch-wise loss (Sec. 4.5.3) is this over sums over the batch.
  """
  n_routed = count_BE.shape[-1]
  tokens_B = jnp.maximum(count_BE.sum(-1) // top_k, 1).astype(jnp.float32)
  frequency_BE = jax.lax.stop_gradient(count_BE.astype(jnp.float32))
  product_B = jnp.sum(frequency_BE * mass_BE, axis=-1)
  return n_routed / top_k * product_B / tokens_B**2


def max_violation(load_E: jax.Array) -> jax.Array:
  """MaxVio: how far the busiest expert is over the mean (arXiv 2408.15664).

  (max load - mean load) / mean load over the last dim; 0 is balance, E / K - 1
  collapse. 0 where there is no load at all.

  >>> float(max_violation(jnp.array([3, 1, 0, 0])))
  2.0
  """
  load_E = load_E.astype(jnp.float32)
  mean = load_E.mean(-1)
  return jnp.where(mean > 0, load_E.max(-1) / jnp.maximum(mean, 1e-9) - 1, 0.0)

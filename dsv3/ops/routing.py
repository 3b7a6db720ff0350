"""The router of DeepSeekMoE: which experts a token takes, at what weight.

Everything a routing ablation touches is here. Scores, bias and gates are
float32: in bfloat16 the spacing of numbers near 0.7 is four times the step by
which the bias moves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
  """What the router decides for every token."""

  experts_TK: jax.Array  # int32, the chosen experts, best first
  gate_TK: jax.Array  # float32, their weights
  affinity_TE: jax.Array  # float32, all scores, for the balance losses


def affinity(u_TD: jax.Array, centroid_ED: jax.Array, gate: str) -> jax.Array:
  """Token-to-expert affinities s, in float32 (Eq. 15).

  `gate` is the function over the logits: "sigmoid" as in V3, or "softmax" over
  the experts as in V2.
  """
  logits_TE = jnp.einsum(
    "TD,ED->TE",
    u_TD.astype(jnp.float32),
    centroid_ED.astype(jnp.float32),
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  if gate == "sigmoid":
    return jax.nn.sigmoid(logits_TE)
  return jax.nn.softmax(logits_TE, axis=-1)


def limit_groups(
  score_TE: jax.Array, *, n_groups: int, top_groups: int, group_score: str
) -> jax.Array:
  """-inf for experts outside a token's best groups, the nodes (Sec. 2.1.2).

  A group's score is the sum of its two best experts ("top2", V3) or its best
  one ("max", V2). The mask is -inf, not zero: biased scores can be negative.

  Departs: the scores come in with the bias, as in the released code; the report
  speaks of affinities.

  >>> limit_groups(jnp.array([[.9, .1, .6, .5]]), n_groups=2, top_groups=1,
  ...              group_score="top2").tolist()
  [[-inf, -inf, 0.6000000238418579, 0.5]]
  """
  if top_groups == n_groups:
    return score_TE
  n_tokens, n_routed = score_TE.shape
  score_TSE = score_TE.reshape(n_tokens, n_groups, n_routed // n_groups)
  counted = min(2 if group_score == "top2" else 1, score_TSE.shape[-1])
  score_TS = jax.lax.top_k(score_TSE, counted)[0].sum(-1)
  _, kept = jax.lax.top_k(score_TS, top_groups)
  kept_TS = jax.nn.one_hot(kept, n_groups, dtype=jnp.bool).any(1)
  masked_TSE = jnp.where(kept_TS[..., None], score_TSE, -jnp.inf)
  return masked_TSE.reshape(n_tokens, n_routed)


def route(
  u_TD: jax.Array,
  centroid_ED: jax.Array,
  bias_E: jax.Array | None,
  *,
  top_k: int,
  n_groups: int,
  top_groups: int,
  group_score: str,
  gate: str,
  normalize: bool,
  routed_scale: float,
  bias_form: str = "additive",
) -> Routing:
  """The top_k experts of every token and their gates g (Eq. 13-16).

  The bias decides who is chosen and never how much he counts: gates come from
  the affinities without it (Eq. 16). Chosen gates are divided by their sum if
  `normalize` (Eq. 13), then multiplied by `routed_scale`. Of equal scores the
  lower expert index wins. A bias of `bias_form` "multiplicative" chooses by
  s (1 + b) in place of s + b (arXiv 2408.15664).

  Departs: Eq. 13 has no scale; the released code multiplies by 2.5. We
  add 1e-20 to the denominator, for sigmoids that all underflow.
  """
  affinity_TE = affinity(u_TD, centroid_ED, gate)
  choice_TE = affinity_TE
  if bias_E is not None:
    scale_TE = affinity_TE if bias_form == "multiplicative" else 1
    choice_TE = affinity_TE + scale_TE * bias_E
  choice_TE = limit_groups(
    jax.lax.stop_gradient(choice_TE),
    n_groups=n_groups,
    top_groups=top_groups,
    group_score=group_score,
  )
  _, experts_TK = jax.lax.top_k(choice_TE, top_k)
  gate_TK = gates(affinity_TE, experts_TK, normalize, routed_scale)
  return Routing(experts_TK, gate_TK, affinity_TE)


def gates(
  affinity_TE: jax.Array,
  experts_TK: jax.Array,
  normalize: bool,
  routed_scale: float,
) -> jax.Array:
  """The gates g of the chosen experts (Eq. 13), float32 [T, K].

  >>> gates(jnp.array([[0.2, 0.6, 0.2]]), jnp.array([[1, 0]]), True, 2.0).tolist()
  [[1.5, 0.5]]
  """
  gate_TK = jnp.take_along_axis(affinity_TE, experts_TK, axis=-1)
  if normalize:
    # The floor matters when every chosen sigmoid underflows to zero.
    gate_TK = gate_TK / (gate_TK.sum(-1, keepdims=True) + 1e-20)
  return gate_TK * routed_scale

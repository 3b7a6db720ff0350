"""DeepSeekMoE with bias balancing and node limit, Eq. 12-16: one token."""

import numpy as np

from tests.oracle.layers import ffn, sigmoid


def eq15_affinity(centroid_ED, u_D):
  """s_i = Sigmoid(u . e_i) (Eq. 15)."""
  return np.array([sigmoid(float(e_D @ u_D)) for e_D in centroid_ED])


def top(scores, k):
  """Indices of the k largest; of equals the first."""
  return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def limit_to_nodes(score_E, n_groups, top_groups):
  """Scores, with -inf outside the token's best groups (Sec. 2.1.2).

  A group is worth the sum of its two highest scores: K / M of the report.
  As in the released code, the scores are those with the bias.
  """
  size = len(score_E) // n_groups
  worth = []
  for group in range(n_groups):
    members = sorted(score_E[group * size : (group + 1) * size])
    worth.append(sum(members[-2:]))
  kept = top(worth, top_groups)
  return np.array(
    [s if i // size in kept else -np.inf for i, s in enumerate(score_E)]
  )


def eq14_gate(s_E, top_k):
  """g' = s where s is among the top K, else 0 (Eq. 14): no bias, no limit."""
  chosen = top(s_E, top_k)
  return np.array([s if i in chosen else 0.0 for i, s in enumerate(s_E)])


def eq16_gate(s_E, bias_E, top_k, n_groups=1, top_groups=1):
  """g' = s where s + b is among the top K, else 0 (Eq. 16)."""
  score_E = limit_to_nodes(s_E + bias_E, n_groups, top_groups)
  chosen = top(score_E, top_k)
  return np.array([s if i in chosen else 0.0 for i, s in enumerate(s_E)])


def eq13_normalize(gate_E, routed_scale):
  """g = g' / sum g' (Eq. 13), times the released code's scale."""
  return gate_E / sum(gate_E) * routed_scale


def eq12_output(weights, u_D, gate_E):
  """Shared experts plus the gated routed ones (Eq. 12, less the residual)."""
  out_D = np.zeros_like(u_D)
  if "shared" in weights:
    out_D += ffn(weights["shared"], u_D)
  for i, gate in enumerate(gate_E):
    if gate > 0:
      expert = {name: w[i] for name, w in weights["experts"].items()}
      out_D += gate * ffn(expert, u_D)
  return out_D


def moe(weights, u_LD, segments_L, config):
  """The layer on a row: outputs, affinities [L, E], load of the experts [E].

  Padding (segment 0) is computed, as it harms nobody, but not counted.
  """
  moe = config["moe"]
  out_LD, s_LE = np.zeros_like(u_LD), []
  load_E = np.zeros(moe["n_routed"], dtype=np.int64)
  for i, u_D in enumerate(u_LD):
    s_E = eq15_affinity(weights["centroid"], u_D)
    gate_E = eq16_gate(
      s_E, weights["bias"], moe["top_k"], moe["n_groups"], moe["top_groups"]
    )
    out_LD[i] = eq12_output(
      weights, u_D, eq13_normalize(gate_E, moe["routed_scale"])
    )
    s_LE.append(s_E)
    if segments_L[i] != 0:
      load_E += gate_E > 0
  return out_LD, np.array(s_LE), load_E

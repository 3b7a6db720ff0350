"""Load balance: the sequence-wise loss, Eq. 17-20, and the bias update.

`s_TE` are the affinities of the T tokens of one sequence, padding left out.
"""

import numpy as np

from tests.oracle.moe import top


def eq18_share(s_TE, top_k):
  """f_i = N / (K T) x tokens with s_i among their top K (Eq. 18).

  As printed: of s without bias, and without the limit to nodes.
  """
  n_tokens, n_routed = s_TE.shape
  f_E = np.zeros(n_routed)
  for s_E in s_TE:
    for i in top(s_E, top_k):
      f_E[i] += n_routed / (top_k * n_tokens)
  return f_E


def eq19_normalize(s_E):
  """s'_i = s_i / sum_j s_j over all routed experts (Eq. 19)."""
  return s_E / sum(s_E)


def eq20_probability(s_TE):
  """P_i = mean over the tokens of s'_i (Eq. 20)."""
  return sum(eq19_normalize(s_E) for s_E in s_TE) / len(s_TE)


def eq17_loss(s_TE, top_k, alpha):
  """alpha sum_i f_i P_i, of one sequence and layer (Eq. 17)."""
  f_E, p_E = eq18_share(s_TE, top_k), eq20_probability(s_TE)
  return alpha * sum(f * p for f, p in zip(f_E, p_E))


def algorithm1_bias(bias_E, load_E, speed):
  """b_i += speed sign(mean load - load_i) (arXiv 2408.15664, Algorithm 1).

  The load is of the whole batch of a step: all rows, all microbatches.
  """
  mean = sum(int(c) for c in load_E) / len(load_E)
  return np.array(
    [b + speed * np.sign(mean - c) for b, c in zip(bias_E, load_E)]
  )

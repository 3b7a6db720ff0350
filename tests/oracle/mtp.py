"""Multi-token prediction, Eq. 21-25, and who predicts what.

A row holds L + 1 tokens t_0 .. t_L. Depth 0 is the main model: position i
reads t_i and predicts t_{i+1}. The module of depth k joins position i of the
depth below with Emb(t_{i+k}) and predicts t_{i+k+1}. Segment 0 is padding.
"""

import numpy as np

from tests.oracle.layers import cross_entropy, rms_norm


def label(row, segments, i, depth):
  """t_{i+depth+1}, or None past the row, on padding, or across segments."""
  last = i + depth + 1
  if last >= len(row) or segments[i] == 0:
    return None
  if any(segments[j] != segments[i] for j in range(i, last + 1)):
    return None
  return row[last]


def module_segments(segments, depth):
  """Segments of the L - k positions of module k (Eq. 22).

  A position whose t_{i+1} .. t_{i+k} are of another segment has nothing to
  join: it is padding to the module, so no load counts it.
  """
  n_inputs = len(segments) - 1
  return [
    segments[i]
    if all(segments[i + j] == segments[i] for j in range(depth + 1))
    else 0
    for i in range(n_inputs - depth)
  ]


def eq21_join(weights, h_D, embedding_D, eps):
  """h' = M_k [RMSNorm(h); RMSNorm(Emb(t))]: hidden first (Eq. 21)."""
  h_D = rms_norm(h_D, weights["hnorm"], eps)
  embedding_D = rms_norm(embedding_D, weights["enorm"], eps)
  return np.concatenate([h_D, embedding_D]) @ weights["proj"]


def eq22_hidden(weights, block, hidden_LD, embed_WD, row, segments, depth, eps):
  """h^k = TRM_k(h'^k) over the L - k positions (Eq. 22).

  `block(weights, x_LD, segments_L)` is a transformer block; what it returns
  (output, affinities, load) is returned.
  """
  at = module_segments(segments, depth)
  joined_LD = np.array(
    [
      eq21_join(weights, hidden_LD[i], embed_WD[row[i + depth]], eps)
      for i in range(len(at))
    ]
  )
  return block(weights["block"], joined_LD, at)


def eq23_logits(normed_LD, head_DW):
  """Logits of P^k = OutHead(h^k); the head is the main model's (Eq. 23).

  h^k comes normed: by the final norm, or by the module's own (as released).
  """
  return np.array([h_D @ head_DW for h_D in normed_LD])


def loss_sum(rows, segments, logits, depth):
  """Sum of -log P over the labels of a depth, and their number."""
  total, count = 0.0, 0
  for row, segments_row, logits_LW in zip(rows, segments, logits):
    for i, logits_W in enumerate(logits_LW):
      wanted = label(row, segments_row, i, depth)
      if wanted is not None:
        total += cross_entropy(logits_W, wanted)
        count += 1
  return total, count


def eq24_loss(total, main_count):
  """L^k = -1/T sum log P^k: T - k terms over the main model's T (Eq. 24)."""
  return total / main_count


def eq25_loss(losses, weight):
  """lambda / D sum_k L^k (Eq. 25)."""
  return weight / len(losses) * sum(losses)

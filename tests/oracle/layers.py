"""What the report takes as known: RMSNorm, SwiGLU, cross-entropy.

One token at a time. `weights` is a dict of arrays with the names of the
README; x @ w with w of shape [in, out] is the report's W x.
"""

import math

import numpy as np


def rms_norm(x_I, weight_I, eps):
  """x over its root mean square, times a weight a channel."""
  mean_square = sum(float(x) ** 2 for x in x_I) / len(x_I)
  return x_I / math.sqrt(mean_square + eps) * weight_I


def sigmoid(x):
  """The logistic function of a number."""
  return 1 / (1 + math.exp(-x))


def ffn(weights, x_D):
  """SwiGLU: W_down (silu(W_gate x) * W_up x)."""
  gate_F = x_D @ weights["w_gate"]
  up_F = x_D @ weights["w_up"]
  silu_F = np.array([g * sigmoid(g) for g in gate_F])
  return (silu_F * up_F) @ weights["w_down"]


def cross_entropy(logits_W, label):
  """-log softmax(logits)[label], with the largest logit taken out."""
  top = max(logits_W)
  log_sum = top + math.log(sum(math.exp(x - top) for x in logits_W))
  return log_sum - logits_W[label]

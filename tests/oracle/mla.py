"""Multi-head latent attention, Eq. 1-11: one token, one head at a time."""

import math

import numpy as np

from tests.oracle import rope
from tests.oracle.layers import rms_norm


def eq1_kv_latent(w_dkv_DC, h_D):
  """c_KV = W_DKV h (Eq. 1)."""
  return h_D @ w_dkv_DC


def eq2_content_key(w_uk_CHN, c_kv_C, head):
  """k_C = W_UK c_KV, of one head (Eq. 2)."""
  return c_kv_C @ w_uk_CHN[:, head]


def eq3_rope_key(w_kr_DR, h_D, position, frequencies):
  """k_R = RoPE(W_KR h), one for all heads (Eq. 3)."""
  return rope.rotate(h_D @ w_kr_DR, position, frequencies)


def eq4_key(k_content_N, k_rope_R):
  """k = [k_C; k_R], of one head (Eq. 4)."""
  return np.concatenate([k_content_N, k_rope_R])


def eq5_value(w_uv_CHV, c_kv_C, head):
  """v_C = W_UV c_KV, of one head (Eq. 5)."""
  return c_kv_C @ w_uv_CHV[:, head]


def eq6_query_latent(w_dq_DQ, h_D):
  """c_Q = W_DQ h (Eq. 6)."""
  return h_D @ w_dq_DQ


def eq7_content_query(w_uq_QHN, c_q_Q, head):
  """q_C = W_UQ c_Q, of one head (Eq. 7)."""
  return c_q_Q @ w_uq_QHN[:, head]


def eq8_rope_query(w_qr_QHR, c_q_Q, head, position, frequencies):
  """q_R = RoPE(W_QR c_Q), of one head (Eq. 8)."""
  return rope.rotate(c_q_Q @ w_qr_QHR[:, head], position, frequencies)


def eq9_query(q_content_N, q_rope_R):
  """q = [q_C; q_R], of one head (Eq. 9)."""
  return np.concatenate([q_content_N, q_rope_R])


def eq10_attend(q_I, keys, values, scale):
  """o = sum_j softmax_j(q k_j scale) v_j, of one query and head (Eq. 10)."""
  logits = [scale * float(q_I @ k_I) for k_I in keys]
  top = max(logits)
  weights = [math.exp(x - top) for x in logits]
  total = sum(weights)
  return sum(w / total * v_V for w, v_V in zip(weights, values))


def eq11_output(w_o_HVD, o_HV):
  """u = W_O [o_1; ...; o_H] (Eq. 11)."""
  return sum(o_HV[i] @ w_o_HVD[i] for i in range(len(o_HV)))


def mla(weights, h_LD, segments_L, config):
  """Attention of a row: each position sees its segment's past and itself.

  The latents are normalised after Eq. 1 and Eq. 6 (Sec. 4.2); the rope key
  is not. Without a query rank the hidden state stands for c_Q. Positions of
  segment 0 are padding and get zeros.
  """
  heads = config["attention"]["n_heads"]
  rope_dim = config["attention"]["rope_dim"]
  head_dim = config["attention"]["nope_dim"] + rope_dim
  turns = rope.frequencies(rope_dim, config["rope"])
  scale = rope.softmax_scale(head_dim, config["rope"])
  queries, keys, values = [], [], []
  for i, h_D in enumerate(h_LD):
    c_q_Q = h_D
    if "w_dq" in weights:
      c_q_Q = eq6_query_latent(weights["w_dq"], h_D)
      c_q_Q = rms_norm(c_q_Q, weights["q_norm"], config["norm_eps"])
    c_kv_C = eq1_kv_latent(weights["w_dkv"], h_D)
    c_kv_C = rms_norm(c_kv_C, weights["kv_norm"], config["norm_eps"])
    k_rope_R = eq3_rope_key(weights["w_kr"], h_D, i, turns)
    query_of, key_of, value_of = [], [], []
    for head in range(heads):
      q_content_N = eq7_content_query(weights["w_uq"], c_q_Q, head)
      q_rope_R = eq8_rope_query(weights["w_qr"], c_q_Q, head, i, turns)
      query_of.append(eq9_query(q_content_N, q_rope_R))
      k_content_N = eq2_content_key(weights["w_uk"], c_kv_C, head)
      key_of.append(eq4_key(k_content_N, k_rope_R))
      value_of.append(eq5_value(weights["w_uv"], c_kv_C, head))
    queries.append(query_of)
    keys.append(key_of)
    values.append(value_of)
  u_LD = np.zeros_like(h_LD)
  for i in range(len(h_LD)):
    seen = [j for j in range(i + 1) if segments_L[j] == segments_L[i] != 0]
    if not seen:
      continue
    o_HV = [
      eq10_attend(
        queries[i][head],
        [keys[j][head] for j in seen],
        [values[j][head] for j in seen],
        scale,
      )
      for head in range(heads)
    ]
    u_LD[i] = eq11_output(weights["w_o"], o_HV)
  return u_LD

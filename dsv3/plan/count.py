"""Parameters and FLOPs of a model: from the model itself, and by formula.

`parameters` evaluates the real model without memory; `by_formula` adds up the
sizes of its matrices in a microsecond, and a test holds the two equal.
"""

import math
from typing import NamedTuple

from dsv3 import config


class Parameters(NamedTuple):
  """How many numbers a model holds; router biases are counted, as released."""

  main: int  # all of the main model
  mtp: int  # the MTP modules' own: embedding and head are the main model's
  active: int  # used by a token, embedding and head included
  active_head: int  # without the embedding, which is a look-up
  active_body: int  # without both
  by_part: dict[str, int]


def parameters(model: config.Model) -> Parameters:
  """Counts of a model by abstract evaluation: exact at any size, no memory."""
  import jax  # two seconds, which those who count by formula do not wait

  from dsv3.nn.transformer import make_model, split

  built = jax.eval_shape(lambda: make_model(model, jax.random.key(0)))
  _, params, router = split(built)
  by_part, idle = {}, 0
  for path, leaf in jax.tree_util.tree_leaves_with_path((params, router)):
    names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
    size = math.prod(leaf.shape)
    part = _part(names)
    by_part[part] = by_part.get(part, 0) + size
    if "experts" in names and part != "mtp":
      n_routed = model.moe.n_routed
      idle += size // n_routed * (n_routed - model.moe.top_k)
  return _totals(model, by_part, idle)


def _part(names: list[str]) -> str:
  if "mtp" in names:
    return "mtp"
  if "gain" in names and "attention" not in names:
    return "norms"
  for part in ("attention", "experts", "shared", "router", "dense"):
    if part in names:
      return part
  return names[1]


def _totals(model, by_part: dict[str, int], idle: int) -> Parameters:
  mtp = by_part.get("mtp", 0)
  main = sum(by_part.values()) - mtp
  table = model.vocab_size * model.dim
  active = main - idle
  return Parameters(
    main, mtp, active, active - table, active - 2 * table, by_part
  )


class Sizes(NamedTuple):
  """Numbers in one of each part; gains of norms stand apart from matrices."""

  attention: int  # matrices of a layer
  attention_gains: int  # of the norms on its latents
  ffn: int  # a dense layer's
  expert: int  # one routed expert
  shared: int  # all shared experts of a layer
  centroids: int  # of a router
  table: int  # embedding, and again the output head
  joint: int  # the projection of an MTP module (Eq. 21)
  up: int  # MLA's up-projections, which the report recomputes (Sec. 3.2.3)


def sizes(model: config.Model) -> Sizes:
  """The matrices of Sec. 2, from the widths alone."""
  a, m, d = model.attention, model.moe, model.dim
  head, q_in = a.nope_dim + a.rope_dim, a.q_rank or d
  q_up, gains = q_in * a.n_heads * head, a.q_rank
  attention = q_up + (d * a.q_rank if a.q_rank else 0)
  if a.kind == "mla":
    kv_up = a.kv_rank * a.n_heads * (a.nope_dim + a.v_dim)
    attention += d * (a.kv_rank + a.rope_dim) + kv_up
    gains += a.kv_rank
  else:
    kv_up = 0
    attention += d * kv_heads(model) * (head + a.v_dim)
  attention += a.n_heads * a.v_dim * d
  return Sizes(
    attention,
    gains,
    3 * d * model.dense_hidden,
    3 * d * m.hidden,
    3 * d * m.hidden * m.n_shared,
    m.n_routed * d,
    model.vocab_size * d,
    2 * d * d,
    (q_up if a.q_rank else 0) + kv_up,
  )


def kv_heads(model: config.Model) -> int:
  """Heads of keys and values that a cache without a latent holds."""
  a = model.attention
  return a.n_kv_heads if a.kind == "gqa" else a.n_heads


def by_formula(model: config.Model) -> Parameters:
  """`parameters`, without building the model."""
  s, m, d = sizes(model), model.moe, model.dim
  n_moe, depth, moe = model.n_moe_layers, model.mtp.depth, model.ffn == "moe"
  n_dense = model.n_layers - n_moe
  router = s.centroids + m.n_routed * m.has_bias
  ffn = m.n_routed * s.expert + s.shared + router if moe else s.ffn
  block = s.attention + s.attention_gains + 2 * d + ffn
  by_part = {
    "attention": model.n_layers * (s.attention + s.attention_gains),
    "dense": n_dense * s.ffn,
    "embed": s.table,
    "experts": n_moe * m.n_routed * s.expert,
    "head": s.table,
    "mtp": depth * (block + s.joint + 3 * d),
    "norms": model.n_layers * 2 * d + d,
    "router": n_moe * router,
    "shared": n_moe * s.shared,
  }
  by_part = {part: n for part, n in by_part.items() if n}
  idle = n_moe * (m.n_routed - m.top_k) * s.expert
  return _totals(model, by_part, idle)


class Flops(NamedTuple):
  """FLOPs of a token's forward pass, by kind of kernel."""

  dense: float  # products of Linears, which FP8 recipes speed up
  experts: float  # grouped products, likewise
  attention: float  # q.k and p.v
  high: float  # head, routers, Eq. 21: never in FP8 (Sec. 3.3.1)

  @property
  def total(self) -> float:
    return sum(self)


def forward_flops(
  model: config.Model, seq_len: int, *, mtp: bool = True, causal: bool = True
) -> Flops:
  """2 a matrix element, and half of the keys on average if causal.

  `mtp` adds the MTP modules and their passes through the output head. Nothing
  is counted for the embedding look-up and for element-wise work.
  """
  s, m, a = sizes(model), model.moe, model.attention
  depth = model.mtp.depth if mtp else 0
  layers = model.n_layers + depth
  n_moe = model.n_moe_layers + (depth if model.ffn == "moe" else 0)
  keys = seq_len / 2 if causal else seq_len
  scores = a.n_heads * (a.nope_dim + a.rope_dim + a.v_dim) * keys
  linear = layers * s.attention + (layers - n_moe) * s.ffn + n_moe * s.shared
  return Flops(
    2.0 * linear,
    2.0 * n_moe * m.top_k * s.expert,
    2.0 * layers * scores,
    2.0 * ((1 + depth) * s.table + n_moe * s.centroids + depth * s.joint),
  )


def recompute_flops(
  model: config.Model, seq_len: int, *, mtp: bool = True
) -> Flops:
  """What the policy `model.remat` computes a second time (Sec. 3.2.3).

  The report's recomputes MLA's up-projections; norms and SwiGLU are no
  products. "full" runs every block again, attention included.
  """
  if model.remat == "none":
    return Flops(0.0, 0.0, 0.0, 0.0)
  forward = forward_flops(model, seq_len, mtp=mtp)
  if model.remat == "full":
    return forward._replace(high=0.0)
  layers = model.n_layers + (model.mtp.depth if mtp else 0)
  return Flops(2.0 * layers * sizes(model).up, 0.0, 0.0, 0.0)


def flops_per_token(
  model: config.Model,
  seq_len: int,
  *,
  mtp: bool = True,
  causal: bool = True,
  recompute: bool = False,
) -> float:
  """Training FLOPs of a token: three forward passes, and what is recomputed.

  V3 at 4096, causal, without MTP and recomputation: 250.45e9, the figure of
  arXiv 2505.09343, Table 2.
  """
  flops = 3 * forward_flops(model, seq_len, mtp=mtp, causal=causal).total
  if recompute:
    flops += recompute_flops(model, seq_len, mtp=mtp).total
  return flops


ITEM_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}


def cache_bytes_per_token(
  model: config.Model, dtype: str = "bfloat16"
) -> dict[str, int]:
  """Bytes that decoding keeps of a token in all layers, by kind of attention.

  MLA keeps the latent and the rotated key; the others keys and values of their
  heads, MQA those of one (Sec. 2.1.1). GQA has `n_kv_heads`, or where those are
  all heads the eight of DeepSeek-V2, Appendix D (all, if there are fewer).
  """
  a, size = model.attention, ITEM_BYTES[dtype] * model.n_layers
  grouped = a.n_kv_heads if a.n_kv_heads < a.n_heads else min(8, a.n_heads)
  head = a.nope_dim + a.rope_dim + a.v_dim
  return {
    "mla": (a.kv_rank + a.rope_dim) * size,
    "mha": a.n_heads * head * size,
    "gqa": grouped * head * size,
    "mqa": head * size,
  }

"""Which tensor of a released checkpoint holds which part of which parameter.

One table for both directions. A tensor is a matrix [out, in], as torch keeps
a Linear; most of its rows, or the rows of each head, are a slice of one of our
stacked arrays, transposed. Everything else about names is here as well.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dsv3 import config


class Part(NamedTuple):
  """Rows of a tensor, and where they stand in a parameter.

  The tensor's rows are `heads` times equally many; of each head's, those in
  [begin, end) are this part. `path[at]` is the part, its dims in our order.
  """

  path: str  # moe/ffn/experts/w_gate_up, as in a checkpoint's params or router
  at: tuple = ()  # (layer,), (layer, expert), (layer, slice(None), 0), ...
  heads: int = 1
  begin: int = 0
  end: int | None = None
  transposed: bool = True
  flipped: bool = False  # the two halves of the columns change places

  def of(self, tensor: np.ndarray) -> np.ndarray:
    """The part of a tensor as [in, heads, rows], or as it is."""
    if not self.transposed:
      return tensor
    rows = tensor.reshape(self.heads, -1, tensor.shape[-1])
    part = np.moveaxis(rows[:, self.begin : self.end], -1, 0)
    if self.flipped:  # a view as well: `put` writes through it
      part = part.reshape(2, -1, *part.shape[1:])[::-1]
    return part

  def put(self, tensor: np.ndarray, value: np.ndarray) -> None:
    """The inverse of `of`: writes our slice into the tensor."""
    place = self.of(tensor)
    place[...] = value.reshape(place.shape)


class Tensor(NamedTuple):
  """A tensor of the release."""

  name: str
  shape: tuple[int, ...]
  dtype: str  # in an FP8 release: F8_E4M3 (with scales), BF16 or F32
  parts: tuple[Part, ...]
  is_copy: bool = False  # on disk for the MTP layer, and the main model's

  @property
  def scale_name(self) -> str:
    return f"{self.name}_scale_inv"

  @property
  def scale_shape(self) -> tuple[int, ...]:
    """One float32 for every block of 128 x 128, edges included."""
    return tuple(-(-n // 128) for n in self.shape)


def tensors(model: config.Model) -> Iterator[Tensor]:
  """All tensors of a checkpoint of this model, without the scales."""
  table = (model.vocab_size, model.dim)
  embed = (Part("embed", transposed=False),)
  head = (Part("head"),)
  yield Tensor("model.embed_tokens.weight", table, "BF16", embed)
  for i in range(model.n_layers + model.mtp.depth):
    prefix = f"model.layers.{i}."
    for tensor in _layer(model, i):
      yield tensor._replace(name=prefix + tensor.name)
    if i >= model.n_layers:
      for name, parts in (
        ("embed_tokens", embed),
        ("shared_head.head", head),
      ):
        name = f"{prefix}{name}.weight"
        yield Tensor(name, table, "BF16", parts, is_copy=True)
  yield Tensor("model.norm.weight", (model.dim,), "BF16", _gain("norm"))
  yield Tensor("lm_head.weight", table, "BF16", head)


def _gain(path: str, *at) -> tuple[Part, ...]:
  return (Part(f"{path}/gain", at, transposed=False),)


def _layer(model: config.Model, i: int) -> Iterator[Tensor]:
  """The tensors of layer `i`; the MTP modules come after the main layers."""
  n_dense = model.n_layers - model.n_moe_layers
  ffn = "moe" if model.ffn == "moe" else "dense"
  if i >= model.n_layers:
    k = i - model.n_layers
    yield from _mtp(model, k)
    stack, at = "mtp/block", k
  elif i < n_dense:
    ffn, stack, at = "dense", "dense", i
  else:
    stack, at = "moe", i - n_dense
  dim = (model.dim,)
  gain = lambda name: _gain(f"{stack}/{name}", at)
  yield Tensor("input_layernorm.weight", dim, "BF16", gain("attention_norm"))
  yield Tensor("post_attention_layernorm.weight", dim, "BF16", gain("ffn_norm"))
  yield from _attention(model, f"{stack}/attention", at)
  if ffn == "dense":
    yield from _ffn("mlp", model.dim, model.dense_hidden, f"{stack}/ffn", (at,))
    return
  m = model.moe
  router, experts = f"{stack}/ffn/router", f"{stack}/ffn/experts"
  centroid = (Part(f"{router}/centroid", (at,), transposed=False),)
  yield Tensor("mlp.gate.weight", (m.n_routed, model.dim), "BF16", centroid)
  if m.has_bias:
    bias = (Part(f"{router}/bias", (at,), transposed=False),)
    name = "mlp.gate.e_score_correction_bias"
    yield Tensor(name, (m.n_routed,), "F32", bias)
  for e in range(m.n_routed):
    name = f"mlp.experts.{e}"
    yield from _ffn(name, model.dim, m.hidden, experts, (at, e))
  if m.n_shared:
    name, hidden = "mlp.shared_experts", m.n_shared * m.hidden
    yield from _ffn(name, model.dim, hidden, f"{stack}/ffn/shared", (at,))


def _ffn(
  name: str, dim: int, hidden: int, path: str, at: tuple
) -> Iterator[Tensor]:
  for i, which in enumerate(("gate", "up")):
    part = Part(f"{path}/w_gate_up", (*at, slice(None), i))
    shape = (hidden, dim)
    yield Tensor(f"{name}.{which}_proj.weight", shape, "F8_E4M3", (part,))
  part = Part(f"{path}/w_down", at)
  yield Tensor(f"{name}.down_proj.weight", (dim, hidden), "F8_E4M3", (part,))


def _attention(model: config.Model, path: str, at: int) -> Iterator[Tensor]:
  """MLA. A head's rows are [content | rotated], in kv_b [key | value]."""
  a, dim = model.attention, model.dim
  n, r, v, c, heads = a.nope_dim, a.rope_dim, a.v_dim, a.kv_rank, a.n_heads

  def linear(name, shape, *parts):
    parts = tuple(
      Part(f"{path}/{p}", (at,), h, begin, end) for p, h, begin, end in parts
    )
    return Tensor(f"self_attn.{name}.weight", shape, "F8_E4M3", parts)

  queries = (
    ("queries/w_uq", heads, 0, n),
    ("queries/w_qr", heads, n, n + r),
  )
  if a.q_rank:
    rank = (a.q_rank,)
    down = ("queries/w_dq", 1, 0, a.q_rank)
    yield linear("q_a_proj", (a.q_rank, dim), down)
    gain = _gain(f"{path}/queries/norm", at)
    yield Tensor("self_attn.q_a_layernorm.weight", rank, "BF16", gain)
    yield linear("q_b_proj", (heads * (n + r), a.q_rank), *queries)
  else:
    yield linear("q_proj", (heads * (n + r), dim), *queries)
  yield linear(
    "kv_a_proj_with_mqa",
    (c + r, dim),
    ("w_dkv", 1, 0, c),
    ("w_kr", 1, c, c + r),
  )
  gain = _gain(f"{path}/kv_norm", at)
  yield Tensor("self_attn.kv_a_layernorm.weight", (c,), "BF16", gain)
  yield linear(
    "kv_b_proj",
    (heads * (n + v), c),
    ("w_uk", heads, 0, n),
    ("w_uv", heads, n, n + v),
  )
  yield linear("o_proj", (dim, heads * v), ("w_o", 1, 0, dim))


def _mtp(model: config.Model, k: int) -> Iterator[Tensor]:
  dim = (model.dim,)
  yield Tensor("enorm.weight", dim, "BF16", _gain("mtp/enorm", k))
  yield Tensor("hnorm.weight", dim, "BF16", _gain("mtp/hnorm", k))
  shape = (model.dim, 2 * model.dim)
  # On disk the embedding comes first. High precision: there are no scales.
  flipped = model.mtp.concat == "hidden_embedding"
  part = Part("mtp/proj", (k,), flipped=flipped)
  yield Tensor("eh_proj.weight", shape, "BF16", (part,))
  yield Tensor("shared_head.norm.weight", dim, "BF16", _gain("mtp/norm", k))


def n_bytes(tensor: Tensor, fp8: bool) -> int:
  """Bytes of a tensor in a file, with its scales."""
  size = math.prod(tensor.shape)
  if tensor.dtype == "F8_E4M3":
    scales = 4 * math.prod(tensor.scale_shape)
    return size + scales if fp8 else 2 * size
  return size * {"BF16": 2, "F32": 4}[tensor.dtype]

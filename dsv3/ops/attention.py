"""Causal attention over heads whose keys and values differ in width (Eq. 10).

`naive` is the equation. `flash` computes the same block by block, rescaling
the softmax as keys arrive (Milakov and Gimelshein 2018; Dao et al. 2022):
memory grows with the length, not with its square, and blocks of keys that lie
wholly in the future are never visited.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

KERNELS = ("auto", "naive", "flash")
BLOCK = 64  # positions; the least time of 64 .. 256 on a CPU, L 256 to 4096
MASKED = -1e30  # a score that softmax turns into 0; -inf would make NaN
LOWEST = -1e29  # below any real score, and exp(MASKED - LOWEST) is 0


def attention(
  q_BLHX: jax.Array,
  k_BMHX: jax.Array,
  v_BMHV: jax.Array,
  *,
  scale: float,
  segments_BL: jax.Array | None = None,
  segments_BM: jax.Array | None = None,
  start: jax.Array | int | None = None,
  kernel: str = "auto",
) -> jax.Array:
  """Softmax of q.k times scale over the past of the same document (Eq. 10).

  The last query stands at the last key: query i sees keys 0 .. i + M - L, or
  with `start` keys 0 .. i + start. Keys
  and values may have fewer heads than queries; query head h then reads head
  h // (H / H_keys).

  Args:
    q_BLHX: queries; X is the width of a key, N + R in MLA.
    k_BMHX: keys.
    v_BMHV: values; V need not be X.
    scale: 1 / sqrt(N + R), times YaRN's mscale^2 where that is used.
    segments_BL: ids of the queries' documents. A query attends only where the
      ids are equal; id 0 is padding, whose output is zero. None: one document.
    segments_BM: ids of the keys' documents; None takes segments_BL.
    start: position of the first query among the keys; may be traced.
    kernel: "naive" (the equation; also has jvp), "flash", or "auto" = flash.

  Returns:
    o_BLHV in the dtype of v_BMHV; scores and softmax are float32.

  Raises:
    ValueError: unknown kernel, heads that do not divide, segments of another
      shape than what they describe.

  >>> one_BLHX = jnp.ones((1, 3, 1, 2))
  >>> v_BMHV = jnp.array([0.0, 2.0, 7.0]).reshape(1, 3, 1, 1)
  >>> attention(one_BLHX, one_BLHX, v_BMHV, scale=1.0).ravel().tolist()
  [0.0, 1.0, 3.0]
  """
  if segments_BM is None:
    segments_BM = segments_BL
  if segments_BL is None:
    segments_BL = jnp.ones(q_BLHX.shape[:2], jnp.int32)
  if segments_BM is None:
    segments_BM = jnp.ones(k_BMHX.shape[:2], jnp.int32)
  _check(q_BLHX, k_BMHX, segments_BL, segments_BM, kernel)
  run = _naive if kernel == "naive" else _flash
  if start is None:
    start = k_BMHX.shape[1] - q_BLHX.shape[1]
  return run(q_BLHX, k_BMHX, v_BMHV, segments_BL, segments_BM, start, scale)


def _check(q_BLHX, k_BMHX, segments_BL, segments_BM, kernel):
  if kernel not in KERNELS:
    raise ValueError(
      f"attention: kernel {kernel!r}, want one of {', '.join(KERNELS)}"
    )
  if q_BLHX.shape[2] % k_BMHX.shape[2]:
    raise ValueError(
      f"attention: {k_BMHX.shape[2]} key heads do not divide"
      f" {q_BLHX.shape[2]} query heads"
    )
  for ids, wanted in (
    (segments_BL, q_BLHX.shape[:2]),
    (segments_BM, k_BMHX.shape[:2]),
  ):
    if ids.shape != wanted:
      raise ValueError(f"attention: segments {ids.shape}, want {wanted}")


def _naive(q_BLHX, k_BMHX, v_BMHV, segments_BL, segments_BM, start, scale):
  repeat = q_BLHX.shape[2] // k_BMHX.shape[2]
  k_BMHX = jnp.repeat(k_BMHX, repeat, axis=2)
  v_BMHV = jnp.repeat(v_BMHV, repeat, axis=2)
  n_queries, n_keys = q_BLHX.shape[1], k_BMHX.shape[1]
  past_LM = jnp.arange(n_queries)[:, None] + start >= jnp.arange(n_keys)
  same_BLM = segments_BL[:, :, None] == segments_BM[:, None, :]
  sees_BLM = past_LM & same_BLM & (segments_BL > 0)[:, :, None]
  score_BHLM = scale * _dot("BLHX,BMHX->BHLM", q_BLHX, k_BMHX)
  score_BHLM = jnp.where(sees_BLM[:, None], score_BHLM, MASKED)
  weight_BHLM = jax.nn.softmax(score_BHLM).astype(v_BMHV.dtype)
  o_BLHV = _dot("BHLM,BMHV->BLHV", weight_BHLM, v_BMHV).astype(v_BMHV.dtype)
  return jnp.where(sees_BLM.any(-1)[:, :, None, None], o_BLHV, 0)


def _dot(subscripts, a, b):
  return jnp.einsum(
    subscripts,
    a,
    b,
    precision="highest" if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


# Flash. Positions are cut into blocks [n, B, H, c, X]: n blocks, H key heads,
# and rows c = position x query heads of that key head. Without suffix below:
# q, k, v, o of one block; qs, ks, vs, os all of them.


def _blocks(x_BLHX, n_groups):
  """Cuts positions into blocks, padded with zeros to whole ones."""
  n_seqs, length, n_heads, width = x_BLHX.shape
  size = min(BLOCK, length)
  x = jnp.pad(x_BLHX, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
  x = x.reshape(n_seqs, -1, size, n_groups, n_heads // n_groups, width)
  x = x.transpose(1, 0, 3, 4, 2, 5)
  return x.reshape(*x.shape[:3], -1, width)


def _unblock(x, like_BLHX):
  """The inverse of `_blocks`, in the shape and dtype of like_BLHX."""
  n_seqs, length, n_heads, width = like_BLHX.shape
  n_blocks, _, n_groups, _, _ = x.shape
  x = x.reshape(n_blocks, n_seqs, n_groups, n_heads // n_groups, -1, width)
  x = x.transpose(1, 0, 4, 2, 3, 5).reshape(n_seqs, -1, n_heads, width)
  return x[:, :length].astype(like_BLHX.dtype)


def _places(segments_BL, segments_BM, start, repeat):
  """(positions, documents) of the queries' rows, then of the keys' rows."""

  def rows(ids, repeat):
    return _blocks(jnp.repeat(ids[:, :, None, None], repeat, axis=2), 1)

  n_queries, n_keys = segments_BL.shape[1], segments_BM.shape[1]
  positions_1M = jnp.arange(n_keys)[None]
  positions_1L = jnp.arange(n_queries)[None] + start
  # Padding gets an id that no key has, so that it sees nothing.
  documents_BL = jnp.where(segments_BL > 0, segments_BL, -1)
  q_places = rows(positions_1L, repeat), rows(documents_BL, repeat)
  return q_places, (rows(positions_1M, 1), rows(segments_BM, 1))


def _bias(q_places, k_places, i, j):
  """0 where query block i sees key block j, else MASKED: [B, 1, c_q, c_k].

  The barrier lets XLA make it once, not once for every head.
  """
  (q_position, q_document), (k_position, k_document) = (
    (position[n], document[n])
    for (position, document), n in ((q_places, i), (k_places, j))
  )
  past = q_position >= k_position.swapaxes(-1, -2)
  same = q_document == k_document.swapaxes(-1, -2)
  return lax.optimization_barrier(jnp.where(past & same, 0.0, MASKED))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(q_BLHX, k_BMHX, v_BMHV, segments_BL, segments_BM, start, scale):
  args = q_BLHX, k_BMHX, v_BMHV, segments_BL, segments_BM, start
  return _flash_forward(*args, scale)[0]


def _flash_forward(
  q_BLHX, k_BMHX, v_BMHV, segments_BL, segments_BM, start, scale
):
  n_heads, n_groups = q_BLHX.shape[2], k_BMHX.shape[2]
  qs, ks = _blocks(q_BLHX, n_groups), _blocks(k_BMHX, n_groups)
  vs = _blocks(v_BMHV, n_groups)
  q_places, k_places = _places(
    segments_BL, segments_BM, start, n_heads // n_groups
  )
  size_q, size_k = min(BLOCK, q_BLHX.shape[1]), min(BLOCK, k_BMHX.shape[1])

  def attend(block):
    i, q = block

    def add(j, carry):
      o, top, total = carry
      score = scale * _dot("BHLX,BHMX->BHLM", q, ks[j])
      score += _bias(q_places, k_places, i, j)
      new_top = jnp.maximum(top, score.max(-1, keepdims=True))
      weight, shrink = jnp.exp(score - new_top), jnp.exp(top - new_top)
      total = shrink * total + weight.sum(-1, keepdims=True)
      o = shrink * o + _dot("BHLM,BHMV->BHLV", weight.astype(vs.dtype), vs[j])
      return o, new_top, total

    zero = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    o = jnp.zeros((*q.shape[:-1], vs.shape[-1]), jnp.float32)
    seen = jnp.clip(-(-((i + 1) * size_q + start) // size_k), 0, len(ks))
    o, top, total = lax.fori_loop(0, seen, add, (o, zero + LOWEST, zero))
    total = jnp.where(total == 0, 1, total)  # rows that see nothing give zero
    return (o / total).astype(vs.dtype), top + jnp.log(total)

  os, log_sums = lax.map(attend, (jnp.arange(len(qs)), qs))
  like_o = jax.ShapeDtypeStruct((*q_BLHX.shape[:3], v_BMHV.shape[3]), vs.dtype)
  # The names let recomputation of a block keep these and run no loop again.
  o_BLHV = checkpoint_name(_unblock(os, like_o), "attention_out")
  log_sums = checkpoint_name(log_sums, "attention_lse")
  args = q_BLHX, k_BMHX, v_BMHV, segments_BL, segments_BM, start
  return o_BLHV, (*args, o_BLHV, log_sums)


def _flash_backward(scale, saved, do_BLHV):
  q_BLHX, k_BMHX, v_BMHV, segments_BL, segments_BM, start = saved[:6]
  o_BLHV, log_sums = saved[6:]
  n_heads, n_groups = q_BLHX.shape[2], k_BMHX.shape[2]
  qs, ks = _blocks(q_BLHX, n_groups), _blocks(k_BMHX, n_groups)
  vs, dos = _blocks(v_BMHV, n_groups), _blocks(do_BLHV, n_groups)
  q_places, k_places = _places(
    segments_BL, segments_BM, start, n_heads // n_groups
  )
  size_q, size_k = min(BLOCK, q_BLHX.shape[1]), min(BLOCK, k_BMHX.shape[1])
  # The softmax's own gradient takes the mean of dweight, which is o.do.
  mean_BLH1 = jnp.sum(
    do_BLHV.astype(jnp.float32) * o_BLHV, axis=-1, keepdims=True
  )
  means = _blocks(mean_BLH1, n_groups)

  def differentiate(dqs, block):
    j, k, v = block

    def add(i, carry):
      dqs, dk, dv = carry
      score = scale * _dot("BHLX,BHMX->BHLM", qs[i], k)
      score += _bias(q_places, k_places, i, j)
      weight = jnp.exp(score - log_sums[i])
      dv += _dot("BHLM,BHLV->BHMV", weight.astype(v.dtype), dos[i])
      dweight = _dot("BHLV,BHMV->BHLM", dos[i], v)
      dscore = (scale * weight * (dweight - means[i])).astype(k.dtype)
      dk += _dot("BHLM,BHLX->BHMX", dscore, qs[i])
      return dqs.at[i].add(_dot("BHLM,BHMX->BHLX", dscore, k)), dk, dv

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    first = jnp.clip((j * size_k - start) // size_q, 0, len(qs))
    dqs, dk, dv = lax.fori_loop(first, len(qs), add, (dqs, *zeros))
    return dqs, (dk, dv)

  dqs, (dks, dvs) = lax.scan(
    differentiate,
    jnp.zeros(qs.shape, jnp.float32),
    (jnp.arange(len(ks)), ks, vs),
  )
  dq_BLHX, dk_BMHX = _unblock(dqs, q_BLHX), _unblock(dks, k_BMHX)
  return dq_BLHX, dk_BMHX, _unblock(dvs, v_BMHV), None, None, None


_flash.defvjp(_flash_forward, _flash_backward)

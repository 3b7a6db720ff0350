"""MLA equation by equation, Eq. 1-11, against the oracle."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3.nn.gqa import Gqa
from dsv3.nn.mla import Mla, rope_frequencies
from dsv3.ops import gemm, rope
from dsv3.ops.attention import attention
from tests.nn import weights
from tests.oracle import layers
from tests.oracle import mla as oracle
from tests.oracle import rope as oracle_rope

B, L = 2, 6
DIMS = json.loads(str(np.load(weights.GOLDEN / "hf_q_rank.npz")["config"]))
# Q is H x N, so that w_uq can be the identity and show the latent.
VALUES = weights.golden_config(DIMS, {"model.attention.q_rank": 16})
H, N, R, V, C, Q = 2, 8, 4, 6, 9, 16
D, EPS = 12, 1e-6


@pytest.fixture(scope="module")
def mla():
  """Our module's intermediates, its weights, and its input, in float64."""
  rng = np.random.default_rng(0)
  build = lambda key: Mla(VALUES.model, gemm=gemm.plain("float32"), key=key)
  graphdef, state = nnx.split(build(jax.random.key(0)))
  state = jax.tree.map(
    lambda x: jnp.asarray(0.5 + rng.normal(size=x.shape), jnp.float32), state
  )
  h_BLD = rng.normal(size=(B, L, D)).astype(np.float32)

  @jax.jit
  def compute(state, h_BLD):
    module = nnx.merge(graphdef, state)
    turns = rope_frequencies(VALUES.model)
    c_kv_BLC, k_r_BLR = module.latent(h_BLD, turns)
    k, v_BLHV = module.expand(c_kv_BLC, k_r_BLR)
    q = module.queries(h_BLD, turns)
    u_BLD = module(h_BLD, jnp.ones((B, L), jnp.int32))
    module.queries.w_uq.set_value(jnp.eye(Q).reshape(Q, H, N))
    bare = module.queries(h_BLD, turns)
    return dict(
      c_kv=c_kv_BLC, k_r=k_r_BLR, k=k, v=v_BLHV, q=q, bare=bare, u=u_BLD
    )

  module = nnx.merge(graphdef, state)
  names = dict(
    w_dkv=module.w_dkv,
    kv_norm=module.kv_norm.gain,
    w_uk=module.w_uk,
    w_kr=module.w_kr,
    w_uv=module.w_uv,
    w_o=module.w_o,
    w_dq=module.queries.w_dq,
    q_norm=module.queries.norm.gain,
    w_uq=module.queries.w_uq,
    w_qr=module.queries.w_qr,
  )
  weight = {k: np.asarray(v[...], np.float64) for k, v in names.items()}
  found = {k: np.asarray(v) for k, v in compute(state, h_BLD).items()}
  return found, weight, h_BLD.astype(np.float64)


def places():
  return np.ndindex(B, L)


def close(found, wanted):
  np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def turns():
  return oracle_rope.frequencies(R, vars(VALUES.model.rope))


def latent(weight, h_D):
  c_kv_C = oracle.eq1_kv_latent(weight["w_dkv"], h_D)
  return layers.rms_norm(c_kv_C, weight["kv_norm"], EPS)


def query_latent(weight, h_D):
  c_q_Q = oracle.eq6_query_latent(weight["w_dq"], h_D)
  return layers.rms_norm(c_q_Q, weight["q_norm"], EPS)


def test_eq1_latent_of_keys_and_values_is_normed(mla):
  found, weight, h_BLD = mla
  for b, i in places():
    close(found["c_kv"][b, i], latent(weight, h_BLD[b, i]))


def test_eq2_content_keys_from_the_normed_latent(mla):
  found, weight, h_BLD = mla
  for (b, i), head in ((p, h) for p in places() for h in range(H)):
    c_kv_C = latent(weight, h_BLD[b, i])
    wanted_N = oracle.eq2_content_key(weight["w_uk"], c_kv_C, head)
    close(found["k"][b, i, head, :N], wanted_N)


def test_eq3_rope_key_from_the_hidden_state_without_norm(mla):
  found, weight, h_BLD = mla
  for b, i in places():
    wanted_R = oracle.eq3_rope_key(weight["w_kr"], h_BLD[b, i], i, turns())
    close(found["k_r"][b, i], wanted_R)


def test_eq4_every_head_has_the_one_rope_key_last(mla):
  found, weight, h_BLD = mla
  for (b, i), head in ((p, h) for p in places() for h in range(H)):
    k_c_N = oracle.eq2_content_key(
      weight["w_uk"], latent(weight, h_BLD[b, i]), head
    )
    k_r_R = oracle.eq3_rope_key(weight["w_kr"], h_BLD[b, i], i, turns())
    close(found["k"][b, i, head], oracle.eq4_key(k_c_N, k_r_R))


def test_eq5_values_from_the_normed_latent(mla):
  found, weight, h_BLD = mla
  for (b, i), head in ((p, h) for p in places() for h in range(H)):
    c_kv_C = latent(weight, h_BLD[b, i])
    wanted_V = oracle.eq5_value(weight["w_uv"], c_kv_C, head)
    close(found["v"][b, i, head], wanted_V)


def test_eq6_latent_of_queries_is_normed(mla):
  found, weight, h_BLD = mla
  for b, i in places():
    c_q_HN = found["bare"][b, i, :, :N]
    close(c_q_HN.reshape(-1), query_latent(weight, h_BLD[b, i]))


def test_eq7_eq8_eq9_queries_content_first_then_rotated(mla):
  found, weight, h_BLD = mla
  for (b, i), head in ((p, h) for p in places() for h in range(H)):
    c_q_Q = query_latent(weight, h_BLD[b, i])
    q_c_N = oracle.eq7_content_query(weight["w_uq"], c_q_Q, head)
    q_r_R = oracle.eq8_rope_query(weight["w_qr"], c_q_Q, head, i, turns())
    close(found["q"][b, i, head], oracle.eq9_query(q_c_N, q_r_R))


def test_eq10_softmax_over_the_past_with_both_parts_in_the_scale(mla):
  found, _, _ = mla
  q, k, v = (jnp.asarray(found[name]) for name in "qkv")
  scale = rope.softmax_scale(N + R)
  o_BLHV = attention(q, k, v, scale=scale)
  for (b, i), head in ((p, h) for p in places() for h in range(H)):
    wanted_V = oracle.eq10_attend(
      found["q"][b, i, head].astype(np.float64),
      found["k"][b, : i + 1, head],
      found["v"][b, : i + 1, head],
      oracle_rope.softmax_scale(N + R, vars(VALUES.model.rope)),
    )
    close(o_BLHV[b, i, head], wanted_V)


def test_eq11_output_joins_the_heads(mla):
  found, weight, h_BLD = mla
  fields = {
    "attention": vars(VALUES.model.attention),
    "rope": vars(VALUES.model.rope),
    "norm_eps": EPS,
  }
  for b in range(B):
    wanted_LD = oracle.mla(weight, h_BLD[b], [1] * L, fields)
    np.testing.assert_allclose(
      found["u"][b], wanted_LD, rtol=1e-4, atol=1e-4 * np.abs(wanted_LD).max()
    )


def test_gqa_with_a_key_head_for_every_head_is_mha():
  """And with one key head it is MHA whose heads share their keys."""
  rng = np.random.default_rng(0)
  h_BLD = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
  ones_BL = jnp.ones((B, L), jnp.int32)
  make = lambda n: Gqa(
    VALUES.model, n, gemm=gemm.plain("float32"), key=jax.random.key(1)
  )
  mha, one = make(H), make(1)
  for name in ("w_k", "w_kr", "w_v"):
    shared = getattr(one, name)[...]
    getattr(mha, name).set_value(jnp.repeat(shared, H, axis=1))
  for name in ("queries", "w_o"):
    setattr(mha, name, getattr(one, name))
  run = jax.jit(lambda module: module(h_BLD, ones_BL))
  np.testing.assert_allclose(run(mha), run(one), rtol=1e-5, atol=1e-6)

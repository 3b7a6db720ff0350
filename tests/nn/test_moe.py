"""DeepSeekMoE as a module: Eq. 12, shared experts, padding, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3.nn.moe import Moe, RouterBias
from dsv3.ops import gemm
from tests import micro
from tests.oracle import moe as oracle

B, L, D = 2, 6, 12
DIFF = {
  "model.dim": D,
  "model.moe.n_routed": 8,
  "model.moe.n_groups": 4,
  "model.moe.top_groups": 2,
  "model.moe.hidden": 8,
  "model.moe.n_shared": 2,
}
SEGMENTS_BL = np.array([[1] * L, [1, 1, 1, 0, 0, 0]], np.int32)


def make(diff=None):
  """Structure and weights of order one of a layer."""
  model = micro.config_of({**DIFF, **(diff or {})}).model
  build = lambda key: Moe(model, gemm=gemm.plain(model.dtype), key=key)
  graphdef, params, router = nnx.split(
    build(jax.random.key(0)), nnx.Param, RouterBias
  )
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32)
  return model, graphdef, jax.tree.map(draw, params), jax.tree.map(draw, router)


def run(graphdef, params, router, u_BLD):
  function = lambda *trees: nnx.merge(graphdef, *trees)(u_BLD, SEGMENTS_BL)
  return jax.jit(function)(params, router)


def test_eq12_shared_plus_gated_routed_experts():
  model, graphdef, params, router = make()
  u_BLD = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
  y_BLD, traffic = run(graphdef, params, router, u_BLD)
  module = nnx.merge(graphdef, params, router)
  matrices = lambda part: dict(
    w_gate=np.asarray(part.w_gate_up[..., 0, :], np.float64),
    w_up=np.asarray(part.w_gate_up[..., 1, :], np.float64),
    w_down=np.asarray(part.w_down[...], np.float64),
  )
  theirs = {
    "centroid": np.asarray(module.router.centroid[...], np.float64),
    "bias": np.asarray(module.router.bias[...], np.float64),
    "experts": matrices(module.experts),
    "shared": matrices(module.shared),
  }
  load_E = 0
  for b in range(B):
    wanted_LD, _, load = oracle.moe(
      theirs,
      u_BLD[b].astype(np.float64),
      SEGMENTS_BL[b],
      {"moe": vars(model.moe)},
    )
    real = SEGMENTS_BL[b] > 0
    np.testing.assert_allclose(
      y_BLD[b][real], wanted_LD[real], rtol=2e-5, atol=2e-5
    )
    load_E = load_E + load
  np.testing.assert_array_equal(traffic.load, load_E)
  assert traffic.load.sum() == 9 * model.moe.top_k


def test_no_token_is_dropped_when_all_go_to_the_same_experts():
  model, graphdef, params, router = make()
  router = jax.tree.map(lambda b: b.at[2:4].set(50.0), router)
  u_BLD = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
  _, traffic = run(graphdef, params, router, u_BLD)
  assert traffic.load.tolist() == [0, 0, 9, 9, 0, 0, 0, 0]


def test_router_is_float32_under_bfloat16_activations():
  """The loads of rounded inputs are those of a float32 router on them."""
  model, graphdef, params, router = make({"model.dtype": "bfloat16"})
  u_BLD = np.random.default_rng(1).normal(size=(B, L, D))
  u_BLD = jnp.asarray(u_BLD, jnp.bfloat16)
  y_BLD, traffic = run(graphdef, params, router, u_BLD)
  assert y_BLD.dtype == jnp.bfloat16
  module = nnx.merge(graphdef, params, router)
  assert module.router.bias[...].dtype == jnp.float32
  wanted_E = np.zeros(8, int)
  for u_D, segment in zip(
    np.asarray(u_BLD, float).reshape(-1, D), SEGMENTS_BL.ravel()
  ):
    s_E = oracle.eq15_affinity(np.asarray(module.router.centroid[...]), u_D)
    gate_E = oracle.eq16_gate(s_E, np.asarray(module.router.bias[...]), 2, 4, 2)
    wanted_E += (gate_E > 0) * (segment > 0)
  np.testing.assert_array_equal(traffic.load, wanted_E)


@pytest.mark.parametrize("balancing", ["sequence", "batch", "none"])
def test_without_bias_there_is_no_bias_variable(balancing):
  _, _, _, router = make({"model.moe.balancing": balancing})
  assert not jax.tree.leaves(router)

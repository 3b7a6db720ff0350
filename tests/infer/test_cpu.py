"""Products of a model on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.infer import cpu
from dsv3.nn.moe import Experts
from dsv3.ops.gemm import plain
from tests import micro


@pytest.mark.parametrize("n_rows", [1, 2, cpu.MANY_ROWS - 1, cpu.MANY_ROWS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_operands_are_rounded_where_that_is_fast_and_sums_are_not(
  n_rows, dtype
):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(n_rows, 1, 24)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(24, 3, 2)), dtype)
  rounded = dtype == "bfloat16" or n_rows >= cpu.MANY_ROWS
  exact = lambda a: np.asarray(
    a.astype("bfloat16") if rounded else a, np.float64
  )
  found = cpu.dot(x, w)
  assert found.dtype == jnp.float32
  wanted = np.tensordot(exact(x), exact(w), 1)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("load", [(0, 1, 3, 0), (4, 0, 0, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("n_rows", [4, cpu.ROWS * 4, cpu.ROWS * 4 + 1])
def test_experts_apart_are_the_same_experts(load, n_rows):
  """One row at a time and in tiles; rows past the load give zeros."""
  model, gemm = micro.config_of().model, plain("float32", "tiles")
  experts = Experts(model, gemm=gemm, key=jax.random.key(1))
  rng = np.random.default_rng(0)
  x_AD = jnp.asarray(rng.normal(size=(n_rows, model.dim)), jnp.float32)
  gate_A = jnp.asarray(rng.uniform(size=n_rows), jnp.float32)
  args = x_AD, gate_A, jnp.asarray(load, jnp.int32)
  found, wanted = cpu.Apart(experts)(*args), experts(*args)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
  assert not np.asarray(found[sum(load) :]).any()


def test_many_experts_stay_together_and_those_of_bfloat16():
  with_experts = lambda n: micro.config_of({"model.moe.n_routed": n}).model
  n_layers = 2 + 1  # and that of the MTP module
  most = cpu.BRANCHES // n_layers // 2 * 2  # of two groups
  assert cpu.keeps_apart(with_experts(most))
  assert not cpu.keeps_apart(with_experts(most + 2))
  assert not cpu.keeps_apart(micro.config_of({"model.dtype": "bfloat16"}).model)

"""Products of a model on a CPU, with kernels of our own and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.infer import cpu
from dsv3.nn import mla
from tests.infer.test_few_rows import has_compiler

MANY = cpu.MANY_ROWS


@pytest.fixture(params=[True, False], ids=["kernels", "xla"])
def alone(request):
  if request.param and not has_compiler():
    pytest.skip("no C++ compiler here")
  return request.param


def operands(shape_x, shape_w, dtype, *, rounded):
  """x, w as kept for that dtype, and both as they should be multiplied."""
  rng = np.random.default_rng(0)
  x, w = (
    jnp.asarray(rng.normal(size=s), "float32") for s in (shape_x, shape_w)
  )
  exact = lambda a, short: np.asarray(
    a.astype("bfloat16") if short else a, np.float64
  )
  short = dtype == "bfloat16"
  in_float64 = exact(x, rounded), exact(w, short)
  if short:
    w = jax.lax.bitcast_convert_type(w.astype("bfloat16"), jnp.uint16)
  return x, w, in_float64


@pytest.mark.parametrize("n_rows", [1, 2, MANY - 1, MANY])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_operands_are_rounded_where_that_is_fast_and_sums_are_not(
  n_rows, dtype, alone
):
  rounded = dtype == "bfloat16" and (n_rows == MANY or not alone)
  shapes = (n_rows, 1, 24), (24, 3, 2)
  x, w, exact = operands(*shapes, dtype, rounded=rounded)
  found = cpu.gemm(dtype, alone=alone).dot(x, w)
  assert found.dtype == jnp.float32
  wanted = np.tensordot(*exact, 1)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_rows", [6, 4 * cpu.ROWS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_of_experts(n_rows, dtype, alone):
  """Of four, in a few rows and in many; rows past the load give zeros."""
  rounded = dtype == "bfloat16" and (n_rows > 6 or not alone)
  shapes = (n_rows, 24), (4, 24, 2, 3)
  x, w, (x_AI, w_EIPO) = operands(*shapes, dtype, rounded=rounded)
  load = np.array([0, 1, n_rows - 3, 1])
  found = cpu.gemm(dtype, alone=alone).grouped_dot(x, w, jnp.asarray(load))
  expert_A = np.repeat(np.arange(4), load)
  wanted = np.zeros(found.shape)
  for row, expert in enumerate(expert_A):
    wanted[row] = np.tensordot(x_AI[row], w_EIPO[expert], 1)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_products_of_absorbed_attention_are_those_of_xla(dtype, alone):
  """Whatever the cache is kept in."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x_GRI, y_GMI = draw(3, 5, 16), draw(3, 9, 16).astype(dtype)
  weight_GRM = draw(3, 5, 9)
  ours, xla = cpu.products(alone=alone), mla.PRODUCTS
  for found, wanted in (
    (ours.scores(x_GRI, y_GMI), xla.scores(x_GRI, y_GMI)),
    (ours.dot(weight_GRM, y_GMI), xla.dot(weight_GRM, y_GMI)),
  ):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

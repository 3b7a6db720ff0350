"""The plain Gemm: types of operands, sums and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import gemm


def arrays(dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 3, 8)), dtype)
  return x, jnp.asarray(rng.normal(size=(8, 4, 5)), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dot_contracts_last_with_first_in_its_type(dtype):
  x, w = arrays(dtype)
  found = gemm.plain(dtype).dot(x, w)
  assert found.dtype == dtype
  rounded = np.asarray(w.astype(dtype), np.float64)
  wanted = np.tensordot(np.asarray(x, np.float64), rounded, 1)
  relative = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
  np.testing.assert_allclose(found.astype("float32"), wanted, relative, 1e-2)


def test_gradient_is_that_of_einsum():
  x, w = arrays("float32")
  plain = lambda x, w: jnp.einsum("ABI,IHO->ABHO", x, w, precision="highest")
  y, pull = jax.vjp(gemm.plain("float32").dot, x, w)
  for mine, theirs in zip(
    pull(jnp.sin(y)), jax.vjp(plain, x, w)[1](jnp.sin(y))
  ):
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_sec331_wgrad_of_bfloat16_stays_float32():
  """257 ones summed in bfloat16 stop at 256; the weight's gradient must not."""
  x, w = jnp.ones((257, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.float32)
  dot = gemm.plain("bfloat16").dot
  dx, dw = jax.grad(lambda x, w: dot(x, w).sum(), (0, 1))(x, w)
  assert dx.dtype == jnp.bfloat16
  assert dw.dtype == jnp.float32
  assert float(dw[0, 0]) == 257


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_dot_multiplies_rows_by_their_expert(dtype):
  x_AI = jnp.ones((5, 2), dtype)
  w_EIO = jnp.array([1.0, 10.0]).reshape(2, 1, 1) * jnp.ones((2, 2, 3))
  load_E = jnp.array([2, 3], jnp.int32)
  y_AO = gemm.plain(dtype).grouped_dot(x_AI, w_EIO, load_E)
  assert y_AO.dtype == dtype
  assert y_AO[:, 0].tolist() == [2, 2, 20, 20, 20]

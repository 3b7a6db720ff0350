"""Products of a bfloat16 model on a CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.infer import cpu


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

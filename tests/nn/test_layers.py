"""SwiGLU and its gradient, written by hand to keep less (Sec. 3.2.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.nn.layers import swiglu


def plain(gate, up):
  return jax.nn.silu(gate) * up


@pytest.mark.parametrize("argument", [0, 1])
def test_gradient_of_swiglu_is_that_of_autodiff(argument):
  keys = jax.random.split(jax.random.key(0), 2)
  gate, up = (4 * jax.random.normal(key, (64, 8)) for key in keys)
  sine = lambda f: jax.grad(lambda *a: jnp.sin(f(*a)).sum(), argument)
  np.testing.assert_allclose(swiglu(gate, up), plain(gate, up), rtol=1e-6)
  np.testing.assert_allclose(
    sine(swiglu)(gate, up), sine(plain)(gate, up), rtol=2e-5, atol=1e-6
  )


def test_swiglu_of_bfloat16_is_computed_in_float32():
  gate, up = jnp.bfloat16(1.9), jnp.bfloat16(3.1)
  wanted = plain(jnp.float32(gate), jnp.float32(up)).astype(jnp.bfloat16)
  assert swiglu(gate, up) == wanted
  dgate, dup = jax.grad(swiglu, (0, 1))(gate, up)
  assert dgate.dtype == dup.dtype == jnp.bfloat16

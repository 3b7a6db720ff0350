"""SwiGLU and its gradient, written by hand to keep less (Sec. 3.2.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops.swiglu import swiglu


def plain(gate_up, weight=None):
  hidden = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
  return hidden if weight is None else hidden * weight[..., None]


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_swiglu_is_that_of_autodiff(weighted):
  keys = jax.random.split(jax.random.key(0), 2)
  args = [4 * jax.random.normal(keys[0], (64, 2, 8))]
  args += [jax.random.normal(keys[1], (64,))] if weighted else []
  np.testing.assert_allclose(swiglu(*args), plain(*args), rtol=1e-6)
  sine = lambda f: jax.grad(lambda *a: jnp.sin(f(*a)).sum(), range(len(args)))
  for ours, theirs in zip(sine(swiglu)(*args), sine(plain)(*args), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_swiglu_of_bfloat16_is_computed_in_float32():
  gate_up, weight = jnp.bfloat16([[1.9], [3.1]]), jnp.float32(1.7)
  wanted = plain(gate_up.astype(jnp.float32), weight).astype(jnp.bfloat16)
  assert swiglu(gate_up, weight) == wanted
  pull = jax.grad(lambda *a: swiglu(*a).sum(), (0, 1))
  dgate_up, dweight = pull(gate_up, weight)
  assert (dgate_up.dtype, dweight.dtype) == (jnp.bfloat16, jnp.float32)

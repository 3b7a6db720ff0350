"""SwiGLU and its gradient by hand: kept are its inputs alone (Sec. 3.2.3)."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(gate_up: jax.Array, weight: jax.Array | None = None) -> jax.Array:
  """silu(gate) * up, times a row's weight; kept are its inputs (Sec. 3.2.3).

  Autodiff would keep the sigmoid and the silu as well.

  Args:
    gate_up: [..., 2, F], the gates and what they open.
    weight: [...], float32, one a row; None is one.

  Returns:
    [..., F] in the type of gate_up, computed in float32 and rounded once.

  >>> swiglu(jnp.array([[0.0, 100.0], [3.0, 3.0]])).tolist()
  [0.0, 300.0]
  """
  gate, up = (gate_up[..., i, :].astype(jnp.float32) for i in (0, 1))
  hidden = gate * jax.nn.sigmoid(gate) * up
  if weight is not None:
    hidden *= weight[..., None]
  return hidden.astype(gate_up.dtype)


def _swiglu_forward(gate_up, weight):
  return swiglu(gate_up, weight), (gate_up, weight)


def swiglu_gradient(gate_up, weight, gradient):
  """Gradients of gate_up and weight from that of the output."""
  gate, up = (gate_up[..., i, :].astype(jnp.float32) for i in (0, 1))
  gradient = gradient.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(gate)
  dweight = None
  if weight is not None:
    dweight = jnp.sum(gradient * gate * sigmoid * up, axis=-1)
    gradient *= weight[..., None]
  dgate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
  dup = gradient * gate * sigmoid
  return jnp.stack([dgate, dup], axis=-2).astype(gate_up.dtype), dweight


def _swiglu_backward(saved, gradient):
  return swiglu_gradient(*saved, gradient)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)

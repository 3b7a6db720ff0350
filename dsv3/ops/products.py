"""The three matmuls of a Linear on quantised operands, on any platform.

Canonical dims: rows x_MI, a weight w_IPO of P panels side by side (gate and up
of SwiGLU, else one), outputs and their gradients g_MPO. With `load_E` the rows
are those of experts, sorted, and weights have E in front.

An operand is a `Quantised`, or an array that stays high. The reference
dequantises to float32 and multiplies there, high operands too: a CPU has no
bfloat16 product inside a branch. A product of two FP8 numbers is
exact in float32, so this is the report's product up to the rounding of scales
and the order of float32 sums: below 1e-6 of the sum of magnitudes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dsv3.ops import grouped
from dsv3.ops.fp8 import Quantised

Matrix = jax.Array | Quantised


@dataclasses.dataclass(frozen=True)
class Products:
  """How the matmuls are computed; all return float32."""

  kernel: str = "auto"  # of `grouped.grouped_matmul`

  def fprop(self, x_MI: Matrix, w_IPO: Matrix, load_E=None) -> jax.Array:
    """y_MPO = x w."""
    x_MI, w_IPO = high(x_MI), high(w_IPO)
    if load_E is None:
      y_MN = _dot(x_MI, _beside(w_IPO), 1, 0)
    else:
      y_MN = self._grouped(x_MI, _beside(w_IPO), load_E)
    return y_MN.reshape(len(x_MI), *w_IPO.shape[-2:])

  def dgrad(self, g_MPO: Matrix, w_IPO: Matrix, load_E=None) -> jax.Array:
    """dx_MI = g w'."""
    g_MN, w_IN = _beside(high(g_MPO)), _beside(high(w_IPO))
    if load_E is None:
      return _dot(g_MN, w_IN, 1, 1)
    return self._grouped(g_MN, jnp.swapaxes(w_IN, 1, 2), load_E)

  def wgrad(self, x_MI: Matrix, g_MPO: Matrix, load_E=None) -> jax.Array:
    """dw_IPO = x' g, summed over the rows (of every expert)."""
    x_MI, g_MPO = high(x_MI), high(g_MPO)
    if load_E is None:
      dw_IN = _dot(x_MI, _beside(g_MPO), 0, 0)
    else:
      dw_IN = grouped.grouped_wgrad(
        x_MI, _beside(g_MPO), load_E, kernel=self.kernel
      )
    return dw_IN.reshape(*dw_IN.shape[:-1], *g_MPO.shape[-2:])

  def _grouped(self, x_MI, w_EIN, load_E):
    return grouped.grouped_matmul(x_MI, w_EIN, load_E, kernel=self.kernel)


def high(a: Matrix) -> jax.Array:
  """An operand's numbers, float32."""
  return a.dequantise() if isinstance(a, Quantised) else a.astype(jnp.float32)


def _beside(a):
  """[..., P, O] as [..., P x O]."""
  return a.reshape(*a.shape[:-2], -1)


def _dot(a, b, dim_a, dim_b):
  return lax.dot_general(
    a,
    b,
    (((dim_a,), (dim_b,)), ((), ())),
    precision="highest",
    preferred_element_type=jnp.float32,
  )

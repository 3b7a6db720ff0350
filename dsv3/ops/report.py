"""What quantisation costs a Linear: errors of its matmuls, by operand and pass.

Read off on the way: `watch` returns its input, and the "gradient" of an array
of zeros is the report. So a report is of the tensors that training has, the
gradients included, and costs nothing where no zeros come in.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dsv3.ops.fp8 import FORMATS, Operand, Quantised, tile_max
from dsv3.ops.linear import G, Operands, Passes, Weight, X, activation
from dsv3.ops.products import Products, high

PASSES = ("fprop", "dgrad", "wgrad")
OPERANDS = (("x", "w"), ("g", "w"), ("x", "g"))  # of each pass
# Of an operand: shares of its numbers that became 0, or were cut to the largest
# value; log2 of its smallest and largest scale, of tiles that are not all zeros.
# NaN of one that stays high.
OF_OPERAND = ("underflow", "saturation", "scale_min", "scale_max")
# And of a pass: the relative error of the product against operands in `dtype`;
# NaN where both stay high, infinity where it is not finite.
COLUMNS = (
  "error",
  *(f"{place}_{name}" for place in "ab" for name in OF_OPERAND),
)
SHAPE = (len(PASSES), len(COLUMNS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def watch(
  passes: Passes, y_MPO, inputs, weight: Weight, zeros, load_E
) -> jax.Array:
  """y. The "gradient" of `zeros`, of SHAPE, is the report of its Linear."""
  return y_MPO


def _forward(passes, y_MPO, inputs, weight, zeros, load_E):
  return y_MPO, (inputs, weight, load_E)


def _backward(passes, saved, dy_MPO):
  inputs, weight, load_E = saved
  exact = Products(passes.products.kernel)
  operands = Operands.of(passes, weight)
  x, w = activation(passes, inputs), weight.master
  p, low = passes, passes.products
  x_low = operands.rows(x, p.fprop_x, X, load_E)
  g_low = operands.rows(dy_MPO, p.dgrad_g, G, load_E)
  kept = operands.keep(inputs, x_low, load_E)
  source = high(g_low) if passes.sent else dy_MPO
  x_along, g_along, load_along = operands.wgrad(kept, source, load_E)
  x_source, g_source = operands.wgrad_sources(kept, source, load_E)
  if isinstance(x_source, Quantised):  # made when x came in, of x
    x_source = x if p.kept else operands.lay_out(x, load_E)

  as_high = lambda a: a.astype(passes.dtype)
  x_high, w_high, g_high = map(as_high, (x, w, dy_MPO))
  tiled = lambda *rows: _operand(*operands.in_tiles(*rows, load_E)[:2], rows[1])
  rows = [
    _row(
      low.fprop(x_low, operands.fprop_w, load_E),
      exact.fprop(x_high, w_high, load_E),
      tiled(x, p.fprop_x, X) + _operand(w, operands.fprop_w, p.fprop_w),
    ),
    _row(
      low.dgrad(g_low, operands.dgrad_w, load_E),
      exact.dgrad(g_high, w_high, load_E),
      tiled(dy_MPO, p.dgrad_g, G) + _operand(w, operands.dgrad_w, p.dgrad_w),
    ),
    _row(
      low.wgrad(x_along, g_along, load_along),
      exact.wgrad(x_high, g_high, load_E),
      _operand(x_source, x_along, p.wgrad_x)
      + _operand(g_source, g_along, p.wgrad_g),
    ),
  ]
  return dy_MPO, None, None, jnp.stack(rows), None


watch.defvjp(_forward, _backward)


@jax.custom_vjp
def nothing(y_MPO, zeros) -> jax.Array:
  """y. The "gradient" of `zeros` is the report of a Linear that stays high."""
  return y_MPO


nothing.defvjp(
  lambda y_MPO, zeros: (y_MPO, None),
  lambda _, dy_MPO: (dy_MPO, jnp.full(SHAPE, jnp.nan)),
)


def _row(low, exact, operands) -> jax.Array:
  norm = lambda a: jnp.sqrt(jnp.sum(jnp.square(a)))
  error = norm(low - exact) / jnp.maximum(norm(exact), 1e-30)
  error = jnp.where(jnp.isfinite(error), error, jnp.inf)
  is_high = jnp.isnan(jnp.stack(operands)).all()
  return jnp.stack([jnp.where(is_high, jnp.nan, error), *operands])


def _operand(x, low, how: Operand | None) -> list[jax.Array]:
  """OF_OPERAND of x and what became of it."""
  if not isinstance(low, Quantised):
    return [jnp.float32(jnp.nan)] * len(OF_OPERAND)
  x = jnp.abs(x.astype(jnp.float32))
  ones = jnp.ones(low.values.shape, jnp.float32)
  limit = dataclasses.replace(low, values=ones).dequantise()
  limit *= FORMATS[how.format].largest * (1 + 2.0**-20)  # of rounded scales
  count = lambda mask: jnp.sum(mask, dtype=jnp.float32)
  lost = (x != 0) & (low.values.astype(jnp.float32) == 0)
  some = jnp.maximum(count(x != 0), 1)
  held = tile_max(x, low.tile) > 0
  log_scale = jnp.where(held, jnp.log2(low.scale), jnp.nan)
  return [
    count(lost) / some,
    count(x > limit) / some,
    jnp.nanmin(log_scale),
    jnp.nanmax(log_scale),
  ]

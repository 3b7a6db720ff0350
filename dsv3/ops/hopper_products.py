"""A Linear's three matmuls by the kernels for Hopper (`hopper.py`).

The same meaning as `products.py`: operands of other formats or tiles than those
of Sec. 3.3.2 go there. What the kernels want, and what is done for it here: the
contraction last, sizes that are multiples of 128, experts at multiples of 128
rows.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp

from dsv3.ops import aligned, hopper
from dsv3.ops.fp8 import Quantised
from dsv3.ops.products import Matrix, Products
from dsv3.ops.recipes import Recipe

BLOCK = hopper.BLOCK


@dataclasses.dataclass(frozen=True)
class HopperProducts(Products):
  """Products on FP8 tensor cores.

  Fprop and Dgrad come in `dtype`, and not in float32, which saves the tensor
  cores' results half of their way. `plain` computes the same in plain JAX.
  """

  dtype: str = "float32"
  plain: bool = False

  def fprop(self, x_MI: Matrix, w_IPO: Matrix, load_E=None) -> jax.Array:
    if not _tiled(x_MI, (1, BLOCK)) or not _tiled(w_IPO, (BLOCK, 1, BLOCK)):
      return super().fprop(x_MI, w_IPO, load_E)
    panels = w_IPO.values.shape[-2:]
    w = _filled(w_IPO)
    turned = lambda a: jnp.swapaxes(_beside(a), -1, -2)
    y_MN = self._rows(x_MI, turned(w.values), turned(w.scale), load_E)
    return y_MN.reshape(len(y_MN), panels[0], -1)[..., : panels[1]]

  def dgrad(self, g_MPO: Matrix, w_IPO: Matrix, load_E=None) -> jax.Array:
    tiles = (1, 1, BLOCK), (BLOCK, 1, BLOCK)
    if not _tiled(g_MPO, tiles[0]) or not _tiled(w_IPO, tiles[1]):
      return super().dgrad(g_MPO, w_IPO, load_E)
    n_in = w_IPO.values.shape[-3]
    w, g = _filled(w_IPO), _filled(g_MPO, rows=False)
    g = Quantised(_beside(g.values), _beside(g.scale), (1, BLOCK))
    dx_MI = self._rows(g, _beside(w.values), _beside(w.scale), load_E)
    return dx_MI[:, :n_in]

  def wgrad(self, x_MI: Matrix, g_MPO: Matrix, load_E=None) -> jax.Array:
    if not _tiled(x_MI, (BLOCK, 1)) or not _tiled(g_MPO, (BLOCK, 1, 1)):
      return super().wgrad(x_MI, g_MPO, load_E)
    n_in, panels = x_MI.values.shape[1], g_MPO.values.shape[1:]
    x, g = _filled(x_MI), _filled(g_MPO)
    operands = x.values.T, x.scale, _beside(g.values).T, _beside(g.scale)
    if load_E is None:
      dw_IN = self._call("matmul", *operands, out_dtype=jnp.float32)
    else:
      dw_IN = self._call("grouped_wgrad", *operands, load_E)
    dw_IPO = dw_IN.reshape(*dw_IN.shape[:-1], panels[0], -1)
    return dw_IPO[..., :n_in, :, : panels[1]]

  def _rows(self, a: Quantised, b, b_scale, load_E):
    """Rows of a by b', or by the b' of their expert."""
    dtype = jnp.dtype(self.dtype)
    if load_E is None:
      n_rows, a = len(a.values), _filled(a)
      operands = a.values, a.scale.T, b, b_scale
      return self._call("matmul", *operands, out_dtype=dtype)[:n_rows]
    places = aligned.align(load_E, len(a.values))
    a = _filled(
      Quantised(
        aligned.spread(a.values, places),
        aligned.spread(a.scale, places),
        a.tile,
      )
    )
    operands = a.values, a.scale.T, b, b_scale, load_E
    y_ZN = self._call("grouped_matmul", *operands, out_dtype=dtype)
    return aligned.gather(y_ZN, places)

  def _call(self, name, *args, **kwargs):
    function = getattr(hopper, f"plain_{name}" if self.plain else name)
    return function(*args, **kwargs)


def choose(
  grouped_kernel: str, wanted: str, dtype: str, recipe: Recipe
) -> Products:
  """The products of `precision.kernel`: auto, reference or hopper.

  "auto" takes the kernels for Hopper where there is one, and says in one line
  where it does not, and for which matmuls. Raises ValueError where "hopper" is
  wanted and cannot do all of them.
  """
  if wanted == "reference":
    return Products(grouped_kernel)
  reason = hopper.why_not(BLOCK)
  others = emulated(recipe)
  if others and not reason and wanted == "hopper":
    reason = f"its kernels do not multiply {recipe.name}'s {', '.join(others)}"
  if reason and wanted == "hopper":
    raise ValueError(f"precision.kernel: found hopper, but {reason}")
  if reason:
    _tell_once(f"FP8 is emulated, with the same operands: {reason}")
    return Products(grouped_kernel)
  if others:
    _tell_once(
      f"FP8 of {recipe.name} is emulated in {', '.join(others)}: tiles, formats "
      "or sums that the kernels for Hopper do not have"
    )
  return HopperProducts(grouped_kernel, dtype)


def emulated(recipe: Recipe) -> list[str]:
  """The matmuls of a recipe that no kernel for Hopper computes.

  >>> from dsv3.ops.recipes import recipe
  >>> emulated(recipe("deepseek_v3")), emulated(recipe("blockwise_128"))
  ([], ['dgrad'])
  """
  row, block, column = (1, BLOCK), (BLOCK, BLOCK), (BLOCK, 1)
  r = recipe
  wanted = {
    "fprop": ((r.fprop_x, row), (r.fprop_w, block)),
    "dgrad": ((r.dgrad_g, row), (r.dgrad_w, block)),
    "wgrad": ((r.wgrad_x, column), (r.wgrad_g, column)),
  }
  return [
    name
    for name, operands in wanted.items()
    if r.accumulation != "float32"
    or any(o and (o.format, o.tile) != ("e4m3", tile) for o, tile in operands)
  ]


@functools.cache
def _tell_once(text: str) -> None:
  logging.warning(text)


def _tiled(a: Matrix, tile: tuple[int, ...]) -> bool:
  """E4M3 in such tiles?"""
  is_e4m3 = isinstance(a, Quantised) and a.values.dtype == jnp.float8_e4m3fn
  return is_e4m3 and a.tile == tile


def _filled(a: Quantised, *, rows: bool = True) -> Quantised:
  """Columns, and rows, filled up with zeros to multiples of 128."""
  fill = [(0, 0)] * a.values.ndim
  scale_fill = list(fill)
  for dim in (-len(a.tile), -1) if rows else (-1,):  # panels lie between
    beyond = -a.values.shape[dim] % BLOCK
    fill[dim] = (0, beyond)
    if a.tile[dim] == 1:
      scale_fill[dim] = (0, beyond)
  values = jnp.pad(a.values, fill)
  scale = jnp.pad(a.scale, scale_fill, constant_values=1)
  return Quantised(values, scale, a.tile)


def _beside(a):
  """[..., P, O] as [..., P x O]."""
  return a.reshape(*a.shape[:-2], -1)

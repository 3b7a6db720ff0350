"""A Linear under a recipe: three matmuls, each with its quantised operands.

Pure: scales of earlier steps come in beside the weight, and what the next step
needs goes out as the "gradient" of an input that is zero (`amax_of`). Nothing
is kept between steps here.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3.ops import aligned
from dsv3.ops.fp8 import Operand, Quantised, quantise, scale_of
from dsv3.ops.products import Matrix, Products, high
from dsv3.ops.swiglu import swiglu, swiglu_gradient

X, W, G = range(3)  # places of the tensors of a Linear in its amaxes


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields="master fprop dgrad past amax report high seed".split(),
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Weight:
  """The matrix of a Linear, and what a recipe has beside it; None: nothing.

  Canonical dims are [I, P, O], of P panels side by side, and [E, I, P, O].
  """

  master: jax.Array  # float32; it gets the gradient
  fprop: Quantised | None = None  # copies of this step, for Fprop
  dgrad: Quantised | None = None  # and Dgrad; None where it is the same
  past: jax.Array | None = None  # [3] amax of earlier steps (delayed scaling)
  amax: jax.Array | None = None  # [3] zeros; the gradient is this step's amax
  report: jax.Array | None = None  # zeros; the gradient is of `report.errors`
  high: jax.Array | None = None  # bool: stays high in this step
  seed: jax.Array | None = None  # uint32, of stochastic rounding


@dataclasses.dataclass(frozen=True)
class Passes:
  """What a Linear of one role does, of a recipe; None stays high."""

  fprop_x: Operand | None
  fprop_w: Operand | None
  dgrad_g: Operand | None
  dgrad_w: Operand | None
  wgrad_x: Operand | None
  wgrad_g: Operand | None
  kept: Operand | None  # what Wgrad's x is made of; None: of x itself
  sent: bool  # gradients come as dgrad_g: Wgrad has no others either
  stochastic: bool  # rounding of gradients
  products: Products
  dtype: str  # of results, and of operands that stay high
  swiglu: bool  # x is SwiGLU's output, whose inputs are kept


@jax.custom_vjp
def unread(master: jax.Array) -> jax.Array:
  """NaN in the place of a weight, which gets its gradient.

  For one whose copies are all that products read: nothing of it is then gathered,
  and reading it after all is not overlooked.
  """
  return jnp.full_like(master, jnp.nan)


unread.defvjp(lambda master: (unread(master), None), lambda _, dw: (dw,))


def weight_copies(
  passes: Passes, master: jax.Array, past=None
) -> tuple[Quantised | None, Quantised | None]:
  """Copies of a weight for Fprop and Dgrad; None for the same as Fprop's."""
  copy = lambda how: (
    how
    and quantise(master, how, panels=1, scale=_delayed(past, W, how, master))
  )
  same = passes.dgrad_w == passes.fprop_w
  return copy(passes.fprop_w), None if same else copy(passes.dgrad_w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(passes: Passes, inputs, weight: Weight, load_E) -> jax.Array:
  """x w with the operands of a recipe (Sec. 3.3).

  Args:
    passes: what is quantised, and how.
    inputs: (x_MI,); for SwiGLU (gate_up_M2I, weights of the rows or None).
    weight: canonical. Its copies are used where they are there.
    load_E: rows of each expert, sorted; None: one matrix for all rows.

  Returns:
    [M, P, O] in `dtype`. The gradient of `weight.master` is float32.
  """
  return _forward(passes, inputs, weight, load_E)[0]


def _forward(passes, inputs, weight, load_E):
  operands = Operands.of(passes, weight)
  x_MI = activation(passes, inputs)
  x_low = operands.rows(x_MI, passes.fprop_x, X, load_E)
  y_MPO = passes.products.fprop(x_low, operands.fprop_w, load_E)
  kept = operands.keep(inputs, x_low, load_E)
  if passes.swiglu:
    kept = jax.tree.map(lambda a: checkpoint_name(a, "ffn_gate_up"), kept)
  like = jnp.zeros((), inputs[0].dtype), jnp.zeros((), weight.master.dtype)
  return y_MPO.astype(passes.dtype), (kept, operands.arrays, load_E, like)


def _backward(passes, saved, dy_MPO):
  kept, arrays, load_E, (like_x, like_w) = saved
  operands = Operands(passes, *arrays)
  g = operands.rows(dy_MPO, passes.dgrad_g, G, load_E)
  dx_MI = passes.products.dgrad(g, operands.dgrad_w, load_E)
  if passes.swiglu:
    dx, *dweight = swiglu_gradient(high(kept[0]), *kept[1:], dx_MI)
    dinputs = dx.astype(like_x.dtype), *dweight
  else:
    dinputs = (dx_MI.astype(like_x.dtype),)
  source = high(g) if passes.sent else dy_MPO
  dw_IPO = passes.products.wgrad(*operands.wgrad(kept, source, load_E))
  dweight = Weight(dw_IPO.astype(like_w.dtype), *[None] * 7)
  return dinputs, dweight, None


linear.defvjp(_forward, _backward)


def activation(passes: Passes, inputs) -> jax.Array:
  """The rows that the weight multiplies."""
  return swiglu(*inputs) if passes.swiglu else inputs[0]


class Operands(NamedTuple):
  """Makes the operands of a Linear's three matmuls."""

  passes: Passes
  fprop_w: Matrix
  dgrad_w: Matrix
  past: jax.Array | None  # as in Weight
  seed: jax.Array | None

  @classmethod
  def of(cls, passes: Passes, weight: Weight) -> "Operands":
    copies = weight.fprop, weight.dgrad
    if copies == (None, None):
      copies = weight_copies(passes, weight.master, weight.past)
    fprop, dgrad = copies
    if passes.dgrad_w == passes.fprop_w:
      dgrad = fprop
    stays = lambda copy: (
      weight.master.astype(passes.dtype) if copy is None else copy
    )
    return cls(passes, stays(fprop), stays(dgrad), weight.past, weight.seed)

  @property
  def arrays(self):
    return self[1:]

  def rows(self, x, how, place, load_E) -> Matrix:
    """An operand whose rows stay where they are: x of Fprop, g of Dgrad."""
    _, low, places = self.in_tiles(x, how, place, load_E)
    if places is None:
      return low
    values = aligned.gather(low.values, places)
    if how.tile[0] == 0:
      return dataclasses.replace(low, values=values)
    # Rows of a block part: each has the scale of its block.
    scale_Z = jnp.repeat(low.scale, low.tile[0], axis=0)
    scale = aligned.gather(scale_Z, places)
    return Quantised(values, scale, (1, *low.tile[1:]))

  def in_tiles(self, x, how, place, load_E):
    """x laid out as its tiles need it, the operand, and where rows now are.

    The last is None where they stay: a tile has one expert's rows, and rows past
    the last expert's are in none.
    """
    if how is None:
      return x, x.astype(self.passes.dtype), None
    places = None
    if load_E is not None and how.tile[0] != 1:
      places = aligned.align(load_E, len(x))
      x = aligned.spread(x, places)
    return x, self._quantise(x, how, place), places

  def keep(self, inputs, x_low, load_E):
    """What stays of a Linear's inputs until Wgrad (Sec. 3.3.3)."""
    x, how = inputs[0], self.passes.kept
    if how is not None:
      if how == self.passes.fprop_x and not self.passes.swiglu:
        return (x_low,)
      if self.passes.swiglu:  # what is remembered is the amax of its output
        return quantise(x, how, panels=x.ndim - 2), *inputs[1:]
      return (self._quantise(x, how, X),)
    if self.passes.swiglu:
      return inputs
    x = self.lay_out(x, load_E)
    return (self._along_rows(x, self.passes.wgrad_x, X),)

  def wgrad(self, kept, dy_MPO, load_E):
    """Operands of Wgrad, and the rows of each expert among them."""
    x, g = self.wgrad_sources(kept, dy_MPO, load_E)
    if load_E is not None and self._in_blocks:
      load_E = aligned.align(load_E, len(dy_MPO)).load_E
    x = self._along_rows(x, self.passes.wgrad_x, X)
    return x, self._along_rows(g, self.passes.wgrad_g, G), load_E

  def wgrad_sources(self, kept, dy_MPO, load_E):
    """What the operands of Wgrad are made of, laid out as they are.

    An x that was quantised along the rows when it was kept is the operand itself.
    """
    p, x = self.passes, kept[0]
    g = self.lay_out(dy_MPO, load_E)
    if p.swiglu:
      x = swiglu(high(x), *kept[1:])
    elif isinstance(x, Quantised) and p.kept in (None, p.wgrad_x):
      return x, g
    return self.lay_out(high(x), load_E), g

  def _along_rows(self, x, how, place) -> Matrix:
    """Tiles go along the rows, of one expert each."""
    if isinstance(x, Quantised):
      return x
    if how is None:
      return x.astype(self.passes.dtype)
    return self._quantise(x, how, place, last=True)

  def lay_out(self, x, load_E) -> jax.Array:
    """Rows as Wgrad has them: in blocks of one expert where tiles need it."""
    if load_E is None or not self._in_blocks:
      return x
    return aligned.spread(x, aligned.align(load_E, len(x)))

  @property
  def _in_blocks(self) -> bool:
    both = self.passes.wgrad_x, self.passes.wgrad_g
    return any(how is not None and how.tile[0] > 1 for how in both)

  def _quantise(self, x, how, place, last=False) -> Quantised:
    key = None
    if place == G and self.passes.stochastic:
      key = jax.random.key(0 if self.seed is None else self.seed)
      key = jax.random.fold_in(key, last)  # another draw for Wgrad
    scale = _delayed(self.past, place, how, x)
    return quantise(x, how, panels=x.ndim - 2, scale=scale, key=key)


def _delayed(past, place, how, x):
  """The scale of tensor `place` by its earlier amax; None: by its own."""
  if past is None or how is None:
    return None
  own = lambda: tensor_max(x)
  amax = jax.lax.cond(past[place] > 0, lambda: past[place], own)
  panels = x.shape[-2:-1] if x.ndim > 2 else ()
  shape = *x.shape[: x.ndim - 2 - len(panels)], 1, *panels, 1
  return jnp.broadcast_to(scale_of(amax, how), shape)


def tensor_max(x: jax.Array) -> jax.Array:
  """The largest finite magnitude, float32."""
  x = x.astype(jnp.float32)
  return jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0)


@jax.custom_vjp
def record_amax(y_MPO, x_MI, w_IPO, amax) -> jax.Array:
  """y. The "gradient" of amax, three zeros, is the amax of x, w and dy."""
  return y_MPO


def _record_forward(y_MPO, x_MI, w_IPO, amax):
  return y_MPO, (tensor_max(x_MI), tensor_max(w_IPO))


def _record_backward(saved, dy_MPO):
  return dy_MPO, None, None, jnp.stack([*saved, tensor_max(dy_MPO)])


record_amax.defvjp(_record_forward, _record_backward)

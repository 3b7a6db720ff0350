"""How a Linear multiplies: one value, handed to the model.

The model knows `dot` and `grouped_dot`, and both behind a SwiGLU. What they do
(types, kernels, quantisation) is decided here, so that an ablation of precision
swaps a value and touches no module.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3.ops import grouped, report
from dsv3.ops.fp8 import Operand
from dsv3.ops.limited import LimitedProducts
from dsv3.ops.linear import Passes, Weight, activation, linear, record_amax
from dsv3.ops.placement import ONE_DEVICE, Placement
from dsv3.ops.products import Products
from dsv3.ops.recipes import Recipe
from dsv3.ops.swiglu import swiglu

# What a Linear is to a recipe; "" has no rule of its own.
ROLES = ("", "attention_out", "expert_in", "expert_out")


@dataclasses.dataclass(frozen=True)
class Gemm:
  """The matrix products of every Linear; all return `dtype`.

  dot(x, w, role): x[..., I] by a weight [I, P, O] of P panels: [..., P, O].
  grouped_dot(x_AI, w_EIPO, load_E, role): rows of each expert by its matrix.
  swiglu_dot(gate_up, w, role), grouped_swiglu_dot((gate_up_A2F, gate_A), w,
  load_E, role): the same of SwiGLU's output, of which the inputs are kept; rows
  of experts times their gates.

  A weight is an array or a `Weight`. `recipe` is None where nothing is quantised.
  `of_part` is what a function that every device runs on its own part multiplies
  by (`Placement.spread`); None where that is the same.
  """

  dtype: str
  dot: Callable[..., jax.Array]
  grouped_dot: Callable[..., jax.Array]
  swiglu_dot: Callable[..., jax.Array]
  grouped_swiglu_dot: Callable[..., jax.Array]
  recipe: Recipe | None = None
  of_part: "Gemm | None" = None


def make(
  recipe: Recipe,
  dtype: str,
  kernel: str = "auto",
  products: Products | None = None,
) -> Gemm:
  """The Gemm of a recipe; `kernel` is that of `grouped.grouped_matmul`."""
  if not recipe.quantises:
    return plain(dtype, kernel)
  return fp8(recipe, dtype, kernel, products)


def deal(gemm: Gemm, placement: Placement) -> Gemm:
  """The Gemm with which every device multiplies the tokens that it has.

  Where nothing is quantised the compiler sees to that itself. A kernel it cannot
  cut: it would give all tokens to all devices. Nor does a tile then lie on two.
  """
  if gemm.recipe is None or placement is ONE_DEVICE:
    return gemm

  def dealt(product):
    def run(x_BLI, w, role=""):
      dims = "BL" + "_" * (x_BLI.ndim - 2)
      of_part = lambda _, x, w: product(x, w, role)
      return placement.spread(of_part, (dims, ""), "BL__")(x_BLI, w)

    return run

  return dataclasses.replace(
    gemm,
    dot=dealt(gemm.dot),
    swiglu_dot=dealt(gemm.swiglu_dot),
    of_part=gemm,
  )


def plain(dtype: str, kernel: str = "auto") -> Gemm:
  """Operands in `dtype`, sums in float32 (Sec. 3.3.1 without FP8).

  float32 means it: TPUs and GPUs would shorten float32 operands unless told
  "highest".
  """

  return of_products(
    dtype,
    lambda x, w: _dot(x, w, dtype),
    lambda x_AI, w, load_E: _grouped_dot(x_AI, w, load_E, dtype, kernel),
  )


def of_products(dtype: str, dot: Callable, grouped_dot: Callable) -> Gemm:
  """The Gemm of two products of arrays, whatever the role."""

  def any_dot(x, w, role=""):
    return dot(x, _array(w))

  def any_grouped_dot(x_AI, w_EIPO, load_E, role=""):
    return grouped_dot(x_AI, _array(w_EIPO), load_E)

  def swiglu_dot(gate_up, w, role=""):
    return any_dot(swiglu(checkpoint_name(gate_up, "ffn_gate_up")), w)

  def grouped_swiglu_dot(inputs, w_EIPO, load_E, role=""):
    gate_up_A2F, gate_A = inputs
    gate_up_A2F = checkpoint_name(gate_up_A2F, "ffn_gate_up")
    return any_grouped_dot(swiglu(gate_up_A2F, gate_A), w_EIPO, load_E)

  return Gemm(dtype, any_dot, any_grouped_dot, swiglu_dot, grouped_swiglu_dot)


def fp8(
  recipe: Recipe,
  dtype: str,
  kernel: str = "auto",
  products: Products | None = None,
) -> Gemm:
  """Operands quantised as the recipe says (Sec. 3.3); results in `dtype`.

  `products` multiply them; None is the reference.
  """
  products = products or Products(kernel)
  if recipe.accumulation != "float32":
    promoted = recipe.accumulation == "promoted"
    products = LimitedProducts(kernel, promoted=promoted)

  def under(role, inputs, w, load_E, *, swiglu=False):
    weight = w if isinstance(w, Weight) else Weight(w)
    passes = passes_of(recipe, role, dtype, products, swiglu=swiglu)
    low = lambda: _observed(passes, inputs, weight, load_E)
    if weight.high is None:
      return low()
    high = lambda: _unobserved(passes, inputs, weight, load_E)
    return jax.lax.cond(weight.high, high, low)

  def dot(x, w, role=""):
    y_MPO = under(role, (x.reshape(-1, x.shape[-1]),), w, None)
    return y_MPO.reshape(*x.shape[:-1], *y_MPO.shape[1:])

  def grouped_dot(x_AI, w, load_E, role=""):
    return under(role, (x_AI,), w, load_E)

  def swiglu_dot(gate_up, w, role=""):
    rows = gate_up.reshape(-1, *gate_up.shape[-2:])
    y_MPO = under(role, (rows, None), w, None, swiglu=True)
    return y_MPO.reshape(*gate_up.shape[:-2], *y_MPO.shape[1:])

  def grouped_swiglu_dot(inputs, w, load_E, role=""):
    return under(role, inputs, w, load_E, swiglu=True)

  return Gemm(dtype, dot, grouped_dot, swiglu_dot, grouped_swiglu_dot, recipe)


def passes_of(
  recipe: Recipe, role: str, dtype: str, products: Products, *, swiglu: bool
) -> Passes:
  """What a Linear does under a recipe in one of ROLES (Sec. 3.3.3).

  Departs: the report has the inputs of the Linear after attention in E5M6, which
  no tensor core reads: they are kept in it, and Fprop reads E4M3 with the same
  kind of scales.
  """
  assert role in ROLES, role
  r = recipe
  fprop_x, kept, dgrad_g = r.fprop_x, r.kept_x, r.dgrad_g
  if role == "attention_out":
    fprop_x, kept = r.attention_x, r.attention_kept
  elif role == "expert_in":
    fprop_x = r.dispatch_x
    kept = kept and r.dispatch_x
  elif role == "expert_out":
    dgrad_g = r.dispatch_g
  sent = role == "expert_out" and r.dispatch_g is not None
  kept = r.swiglu_kept if swiglu else kept
  return Passes(
    fprop_x=fprop_x,
    fprop_w=r.fprop_w,
    dgrad_g=dgrad_g,
    dgrad_w=r.dgrad_w,
    wgrad_x=r.wgrad_x if swiglu else _turned(r.wgrad_x, kept),
    wgrad_g=_turned(r.wgrad_g, dgrad_g if sent else None),
    kept=kept,
    sent=sent,
    stochastic=r.rounding == "stochastic",
    products=products,
    dtype=dtype,
    swiglu=swiglu,
  )


def _turned(how: Operand | None, source: Operand | None) -> Operand | None:
  """Along the rows what was along the columns, with the same kind of scales.

  Powers of two, so that turning adds next to no error (Sec. 3.3.3).
  """
  if how is None or source is None or source.scale != "power2":
    return how
  return dataclasses.replace(how, scale="power2")


def high_of(passes: Passes) -> Passes:
  """The same Linear with no operand quantised."""
  products = Products(passes.products.kernel)
  operands = [f.name for f in dataclasses.fields(passes) if "_" in f.name]
  none = dict.fromkeys([*operands, "kept"])
  return dataclasses.replace(passes, **none, sent=False, products=products)


def _observed(passes, inputs, weight: Weight, load_E):
  """`linear`, and what is to be learned of it on the way."""
  alone = dataclasses.replace(weight, amax=None, report=None, high=None)
  y_MPO = linear(passes, inputs, alone, load_E)
  if weight.amax is not None:
    x_MI = activation(passes, inputs)
    y_MPO = record_amax(y_MPO, x_MI, weight.master, weight.amax)
  if weight.report is not None:
    y_MPO = report.watch(passes, y_MPO, inputs, alone, weight.report, load_E)
  return y_MPO


def _unobserved(passes, inputs, weight: Weight, load_E):
  """`linear` with nothing quantised."""
  y_MPO = linear(high_of(passes), inputs, Weight(weight.master), load_E)
  if weight.report is not None:
    y_MPO = report.nothing(y_MPO, weight.report)
  return y_MPO


def _array(w):
  return w.master if isinstance(w, Weight) else w


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, w: jax.Array, dtype: str) -> jax.Array:
  return _product(x, w, dtype, (x.ndim - 1,), (0,)).astype(dtype)


def _dot_forward(x, w, dtype):
  return _dot(x, w, dtype), (x, w)


def _dot_backward(dtype, residuals, gradient):
  """Dgrad in the type of x; Wgrad stays float32, as it is summed up later."""
  x, w = residuals
  rows, outs = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
  dx = _product(gradient, w, dtype, outs, tuple(range(1, w.ndim)))
  dw = _product(x, gradient, dtype, rows, rows)
  return dx.astype(x.dtype), dw.astype(w.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def _product(a, b, dtype, dims_a, dims_b) -> jax.Array:
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    ((dims_a, dims_b), ((), ())),
    precision="highest" if dtype == "float32" else None,
    preferred_element_type=jnp.float32,
  )


def _grouped_dot(x_AI, w_EIPO, load_E, dtype: str, kernel: str) -> jax.Array:
  # The weights go in as they are: cast inside, their gradient stays float32.
  w_EIO = w_EIPO.reshape(*w_EIPO.shape[:2], -1)
  y_AO = grouped.grouped_matmul(
    x_AI.astype(dtype), w_EIO, load_E, kernel=kernel
  )
  return y_AO.reshape(-1, *w_EIPO.shape[2:]).astype(dtype)

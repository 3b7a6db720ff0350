"""The three matmuls of a Linear under a recipe, in slow NumPy (Sec. 3.3).

A recipe is a dict from the name of an operand to (format, tile, scale), or None
for high precision. Weights are [I, P, O]; a panel is a matrix of its own.
"""

import numpy as np

from tests.oracle import fp8

BLOCK = 128


def low(x, how):
  """x, a matrix, as its quantised numbers; float64."""
  if how is None:
    return np.float64(x)
  form, tile, scale = how
  values, scales = fp8.quantise(np.float32(x), form, tile, scale)
  return np.float64(fp8.dequantise(values, scales, tile))


def by_panel(function, w_IPO):
  return np.stack(
    [function(w_IPO[:, p]) for p in range(w_IPO.shape[1])], axis=1
  )


def swiglu(gate_up, weight):
  gate, up = gate_up[:, 0], gate_up[:, 1]
  return gate / (1 + np.exp(-gate)) * up * weight[:, None]


def swiglu_gradient(gate_up, weight, dh):
  gate, up = gate_up[:, 0], gate_up[:, 1]
  s = 1 / (1 + np.exp(-gate))
  dweight = np.sum(dh * gate * s * up, axis=1)
  dh = dh * weight[:, None]
  dgate = dh * up * (s + gate * s * (1 - s))
  return np.stack([dgate, dh * gate * s], axis=1), dweight


def linear(recipe, x, w_IPO, dy_MPO):
  """y, dx and dw of one matrix: all rows are of it."""
  y = np.einsum(
    "mi,ipo->mpo",
    low(x, recipe["fprop_x"]),
    by_panel(lambda w: low(w, recipe["fprop_w"]), w_IPO),
  )
  dx = np.einsum(
    "mpo,ipo->mi",
    by_panel(lambda g: low(g, recipe["dgrad_g"]), dy_MPO),
    by_panel(lambda w: low(w, recipe["dgrad_w"]), w_IPO),
  )
  if recipe.get("sent"):  # an expert's device has no other gradient
    dy_MPO = by_panel(lambda g: low(g, recipe["dgrad_g"]), dy_MPO)
  kept = low(x, recipe["kept"]) if recipe["kept"] else x
  dw = np.einsum(
    "mi,mpo->ipo",
    low(kept, recipe["wgrad_x"]),
    by_panel(lambda g: low(g, recipe["wgrad_g"]), dy_MPO),
  )
  return y, dx, dw


def ffn_out(recipe, gate_up, weight, w_IPO, dy_MPO):
  """The same of SwiGLU's output, whose inputs are kept (Sec. 3.3.3)."""
  hidden = swiglu(np.float64(gate_up), weight)
  y, dh, _ = linear(recipe | {"kept": None}, hidden, w_IPO, dy_MPO)
  kept = gate_up
  if recipe["kept"]:
    kept = by_panel(lambda x: low(x, recipe["kept"]), gate_up)
  again = swiglu(np.float64(kept), weight)
  _, _, dw = linear(recipe | {"kept": None}, again, w_IPO, dy_MPO)
  dgate_up, dweight = swiglu_gradient(np.float64(kept), weight, dh)
  return y, dgate_up, dweight, dw

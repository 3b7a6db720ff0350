"""FP8 recipes as data: what is quantised, how, and how products are summed.

A recipe is a named set of values; a new one is a named one with changes:

>>> recipe("deepseek_v3", ["dgrad_g=e4m3 128x128"]).dgrad_g.tile
(128, 128)

Every Linear has three matmuls. Rows x columns of a tile are tokens x channels
for activations `x` and their gradients `g`, in x out for weights `w`:

  fprop  y  = x w     along the columns of x and the rows of w
  dgrad  dx = g w'    along the columns of g and the columns of w
  wgrad  dw = x' g    along the rows of x and of g
"""

import dataclasses
import difflib
from collections.abc import Iterable

from dsv3.ops import aligned, limited
from dsv3.ops.fp8 import Operand, operand


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Quantisation of all Linears. An operand that is None stays high."""

  name: str
  fprop_x: Operand | None
  fprop_w: Operand | None
  dgrad_g: Operand | None
  dgrad_w: Operand | None
  wgrad_x: Operand | None
  wgrad_g: Operand | None
  # What a Linear keeps of its input for Wgrad, which is turned from there into
  # wgrad_x; None: wgrad_x of the input itself.
  kept_x: Operand | None
  attention_x: Operand | None  # fprop_x of the Linear after attention
  attention_kept: Operand | None  # and what it keeps (Sec. 3.3.3)
  swiglu_kept: Operand | None  # SwiGLU's inputs; its output is recomputed
  dispatch_x: Operand | None  # rows sent to the routed experts (Sec. 3.3.3)
  dispatch_g: Operand | None  # gradients sent to them
  # float32: sums as exact as float32. hopper: of the 14 bits that Hopper's
  # tensor cores align to. promoted: those, moved to float32 every N_C terms.
  accumulation: str = "float32"
  scaling: str = "online"  # or delayed: by the amax of the last steps
  history: int = 16  # steps, of delayed scaling
  rounding: str = "nearest"  # or stochastic, of gradients

  @property
  def quantises(self) -> bool:
    return any(isinstance(v, Operand) for v in vars(self).values())


_OF_ROWS = (
  "fprop_x dgrad_g wgrad_x wgrad_g kept_x dispatch_x dispatch_g".split()
)
_CHOICES = {
  "accumulation": ("float32", "hopper", "promoted"),
  "scaling": ("online", "delayed"),
  "rounding": ("nearest", "stochastic"),
}


def _all(name, x, w, g, **more) -> Recipe:
  """One format and tile for each of x, w and g, in all of their matmuls."""
  x, w, g = operand(x), operand(w), operand(g)
  same = dict(
    fprop_x=x,
    fprop_w=w,
    dgrad_g=g,
    dgrad_w=w,
    wgrad_x=x,
    wgrad_g=g,
    kept_x=x,
    attention_x=x,
    attention_kept=x,
    swiglu_kept=None,
    dispatch_x=x,
    dispatch_g=g,
  )
  return Recipe(name, **same | more)


_DEEPSEEK_V3 = Recipe(
  "deepseek_v3",
  fprop_x=operand("e4m3 1x128"),  # Sec. 3.3.2, Fig. 7 (a)
  fprop_w=operand("e4m3 128x128"),  # Sec. 3.3.2
  dgrad_g=operand("e4m3 1x128"),  # App. B.2: blocks diverge
  dgrad_w=operand("e4m3 128x128"),  # Sec. 3.3.2: the copy of Fprop
  wgrad_x=operand("e4m3 128x1"),  # Sec. 3.3.3
  wgrad_g=operand("e4m3 128x1"),  # along the contraction; the report is silent
  kept_x=operand("e4m3 1x128"),  # Sec. 3.3.3: the operand of Fprop
  attention_x=operand("e4m3 1x128 power2"),  # Sec. 3.3.3
  attention_kept=operand("e5m6 1x128 power2"),  # Sec. 3.3.3
  swiglu_kept=operand("e4m3 1x128"),  # Sec. 3.3.3
  dispatch_x=operand("e4m3 1x128 power2"),  # Sec. 3.3.3
  dispatch_g=operand("e4m3 1x128 power2"),  # Sec. 3.3.3
)

_BF16 = _all("bf16", "bf16", "bf16", "bf16")

RECIPES = {
  r.name: r
  for r in (
    _BF16,
    _DEEPSEEK_V3,
    # One scale a tensor, of its own amax.
    _all("per_tensor", "e4m3 *x*", "e4m3 *x*", "e4m3 *x*"),
    # As widely used on Hopper: scales of the last steps, wider gradients.
    _all("delayed", "e4m3 *x*", "e4m3 *x*", "e5m2 *x*", scaling="delayed"),
    # App. B.2: blocks for the operands of Dgrad as well. It diverged.
    dataclasses.replace(
      _DEEPSEEK_V3,
      name="blockwise_128",
      dgrad_g=operand("e4m3 128x128"),
      dispatch_g=operand("e4m3 128x128"),
    ),
    # OCP microscaling: 32 elements along the contraction, power-of-two scales.
    _all(
      "mxfp8",
      "e4m3 1x32 e8m0",
      "e4m3 32x1 e8m0",
      "e4m3 1x32 e8m0",
      dgrad_w=operand("e4m3 1x32 e8m0"),
      wgrad_x=operand("e4m3 32x1 e8m0"),
      wgrad_g=operand("e4m3 32x1 e8m0"),
      kept_x=None,
      attention_kept=None,
    ),
  )
}


def recipe(name: str, changes: Iterable[str] = ()) -> Recipe:
  """The recipe of that name, with `field=value` changes.

  Raises ValueError that names the nearest recipe or field.
  """
  if name not in RECIPES:
    raise ValueError(
      f"precision.recipe: found {name!r}, wanted one of {', '.join(RECIPES)}"
      + _nearest(name, RECIPES)
    )
  found = RECIPES[name]
  fields = {f.name: f.type for f in dataclasses.fields(Recipe)}
  del fields["name"]
  for text in changes:
    field, equals, value = (part.strip() for part in text.partition("="))
    where = f"precision.changes: {text!r}"
    if not equals or field not in fields:
      raise ValueError(
        f"{where}: wanted FIELD=VALUE of the fields {', '.join(fields)}"
        + _nearest(field, fields)
      )
    found = dataclasses.replace(found, **{field: _read(field, value, where)})
  _check(found)
  return found


def _read(field: str, value: str, where: str):
  if field in _CHOICES:
    if value not in _CHOICES[field]:
      wanted = ", ".join(_CHOICES[field])
      raise ValueError(f"{where}: found {value!r}, wanted one of {wanted}")
    return value
  if field == "history":
    if not value.isdecimal() or int(value) < 1:
      raise ValueError(f"{where}: found {value!r}, wanted steps, 1 or more")
    return int(value)
  try:
    return operand(value)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _check(found: Recipe) -> None:
  _check_rows(found)
  _check_moves(found)
  reasons = {
    ("scaling", "delayed"): "for the history holds one amax a tensor",
    ("accumulation", "hopper"): "for no scale can join a sum that never moves",
  }
  for (field, value), reason in reasons.items():
    if getattr(found, field) != value:
      continue
    for name, how in vars(found).items():
      if isinstance(how, Operand) and any(how.tile):
        raise ValueError(
          f"precision.changes: {field}={value} with {name}={how}: wanted tiles "
          f"of *x*, {reason}"
        )


def _check_rows(found: Recipe) -> None:
  """An expert's rows are filled up to blocks, of which tiles are whole parts."""
  for name in _OF_ROWS:
    how = getattr(found, name)
    if how and how.tile[0] and aligned.BLOCK % how.tile[0]:
      raise ValueError(
        f"precision.changes: {name}={how}: wanted rows that divide "
        f"{aligned.BLOCK}, or *: a tile would have rows of two experts"
      )


def _check_moves(found: Recipe) -> None:
  """Promoted sums move between tiles, never inside one (Sec. 3.3.2)."""
  if found.accumulation != "promoted":
    return
  f, along = found, lambda how, dim: how.tile[dim] if how else 0
  for name, *tiles in (
    ("fprop", along(f.fprop_x, 1), along(f.fprop_w, 0)),
    ("fprop of attention", along(f.attention_x, 1), along(f.fprop_w, 0)),
    ("fprop of experts", along(f.dispatch_x, 1), along(f.fprop_w, 0)),
    ("dgrad", along(f.dgrad_g, 1), along(f.dgrad_w, 1)),
    ("dgrad of experts", along(f.dispatch_g, 1), along(f.dgrad_w, 1)),
    ("wgrad", along(f.wgrad_x, 0), along(f.wgrad_g, 0)),
  ):
    if not limited.moves(*tiles):
      raise ValueError(
        f"precision.changes: accumulation=promoted with tiles of "
        f"{' and '.join(map(str, tiles))} along the sums of {name}: wanted "
        "multiples of 32 of which each is one of the smallest, or of 128"
      )


def _nearest(name: str, known) -> str:
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]}?" if close else ""

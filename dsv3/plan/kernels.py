"""Seconds of compute, by kind of kernel: the rates that are really reached.

A kind's rate is the chip's peak, times how kinds differ (stated here), times
one fitted number for a family of chips and a precision (`fitted.py`).
"""

from typing import NamedTuple

from dsv3 import config
from dsv3.plan import count, fitted
from dsv3.plan.chips import Chip

# Relative to a large dense product of the same precision. Experts: rows come
# in tiles of 128 and loads differ (DeepGEMM's grouped products reach 0.85 to
# 0.95 of its dense ones). Attention: FlashAttention-3 reaches 0.75 of the peak
# forward, less backward, where good products reach 0.8 to 0.85.
RELATIVE = {"dense": 1.0, "experts": 0.9, "attention": 0.8, "high": 1.0}
MEMORY = 0.8  # of the HBM rate, by streaming kernels
# The chips whose anchors the shares are fitted on: H100/H800, GB200.
REFERENCE_WATTS = {"hopper": 700.0, "blackwell": 1200.0}
BACKWARD_SCORES = (
  2.5  # flash attention's backward pass over its forward: 5 of 2
)


class Seconds(NamedTuple):
  """Time by kind; `memory` is of kernels that only move bytes."""

  dense: float
  experts: float
  attention: float
  high: float
  memory: float

  @property
  def total(self) -> float:
    return sum(self)

  def times(self, factor: float) -> "Seconds":
    return Seconds(*(factor * s for s in self))

  def plus(self, other: "Seconds") -> "Seconds":
    return Seconds(*(a + b for a, b in zip(self, other)))


def rates(chip: Chip, precision: str, shares=fitted.SHARE) -> dict[str, float]:
  """FLOP/s reached by kind. FP8 is for Linears alone (Sec. 3.3.1).

  Of chips with one die and several power limits, the limit sets the clock.
  """
  clock = chip.watts / REFERENCE_WATTS.get(chip.family, chip.watts)
  plain = clock * chip.bf16 * shares[chip.family, "bf16"]
  low = plain
  if precision == "fp8":
    low = clock * chip.fp8 * shares[chip.family, "fp8"]
  base = {"dense": low, "experts": low, "attention": plain, "high": plain}
  return {kind: base[kind] * RELATIVE[kind] for kind in base}


def seconds(
  flops: count.Flops,
  n_bytes: float,
  chip: Chip,
  precision: str,
  shares=fitted.SHARE,
) -> Seconds:
  """Time of so many FLOPs by kind and so many bytes moved."""
  rate = rates(chip, precision, shares)
  by_kind = {k: getattr(flops, k) / rate[k] for k in flops._fields}
  return Seconds(**by_kind, memory=n_bytes / (chip.hbm_rate * MEMORY))


def moved_bytes(model: config.Model, *, mtp: bool = True) -> float:
  """Bytes that norms, rotations, SwiGLU, sorting move for a token's forward.

  Two norms and two residual sums read and write five streams of width D; the
  rotated queries, keys and values are written and read once more; a row per
  expert is gathered and summed; SwiGLU reads two and writes one.
  """
  a, m, d = model.attention, model.moe, model.dim
  size = count.ITEM_BYTES[model.dtype]
  heads = a.n_heads * (2 * (a.nope_dim + a.rope_dim) + a.v_dim)
  base = 10 * d + 2 * heads
  routed = 2 * (1 + m.top_k) * d + 3 * m.hidden * (m.top_k + m.n_shared)
  depth = model.mtp.depth if mtp else 0
  n_moe = model.n_moe_layers + (depth if model.ffn == "moe" else 0)
  layers = model.n_layers + depth
  dense = (layers - n_moe) * 3 * model.dense_hidden
  return size * (layers * base + n_moe * routed + dense)


class Pass(NamedTuple):
  """A token's forward, backward and weight-gradient work, in seconds."""

  forward: Seconds
  backward: Seconds  # input and weight gradients, and what is recomputed
  weights: Seconds  # the part of `backward` that a schedule may put off


def training(
  model: config.Model,
  seq_len: int,
  chip: Chip,
  precision: str,
  *,
  mtp: bool,
  shares=fitted.SHARE,
) -> Pass:
  """Compute of one token, all layers, on a chip alone."""
  forward = count.forward_flops(model, seq_len, mtp=mtp)
  again = count.recompute_flops(model, seq_len, mtp=mtp)
  moved = moved_bytes(model, mtp=mtp)
  twice = count.Flops(*(2 * f for f in forward))
  twice = twice._replace(attention=BACKWARD_SCORES * forward.attention)
  backward = count.Flops(*(a + b for a, b in zip(twice, again)))
  moved_again = {"none": 0.0, "paper": 0.5, "full": 1.0}[model.remat] * moved
  weights = forward._replace(attention=0.0)
  return Pass(
    seconds(forward, moved, chip, precision, shares),
    seconds(backward, 2 * moved + moved_again, chip, precision, shares),
    seconds(weights, moved / 2, chip, precision, shares),
  )

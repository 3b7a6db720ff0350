"""The devices that serve one copy of a model, and the bytes that each holds.

On one device equal to XLA's own account of the compiled decoder within 15%
(`tests/plan/test_plan_memory.py`).
"""

import dataclasses

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.plan import count, network
from dsv3.plan.memory import Memory
from dsv3.plan.mesh import Mesh

# Bytes of a weight of Linears, and of tables, router and absorbed matrices.
WEIGHT_BYTES = {"fp8": (1, 2), "bf16": (2, 2), "float32": (4, 4)}


@dataclasses.dataclass(frozen=True)
class Unit:
  """Devices that hold one copy of the model between them (Sec. 3.4)."""

  chips: int
  tensor: int = 1  # attention's (TP), with sequences dealt over the rest (DP)
  redundant: int = 0  # routed experts held a second time
  overlap: bool = True  # two microbatches: one computes, the other exchanges
  precision: str = "fp8"  # of Linears, and of their weights
  cache: str = "bfloat16"

  def mesh(self) -> Mesh:
    return Mesh(expert=self.chips)


def check(unit: Unit, model: config.Model) -> None:
  """Raises ConfigError for a unit that cannot be."""
  if unit.chips % unit.tensor:
    raise ConfigError(
      f"--unit_tensor: found {unit.tensor}, wanted a divisor of {unit.chips} chips"
    )
  if model.attention.n_heads % unit.tensor:
    raise ConfigError(
      f"--unit_tensor: found {unit.tensor}, wanted a divisor of "
      f"model.attention.n_heads = {model.attention.n_heads}"
    )
  experts = model.moe.n_routed + unit.redundant
  if model.ffn == "moe" and unit.chips > experts:
    raise ConfigError(
      f"--unit: found {unit.chips} chips, wanted at most the {experts} experts "
      "of a layer, redundant ones included: the others would hold none"
    )
  if model.attention.kind != "mla":
    raise ConfigError(
      f"config.model.attention.kind: found {model.attention.kind}, wanted mla: "
      "decoding is planned for the latent cache"
    )


def slots(model: config.Model, unit: Unit) -> int:
  """Routed experts of a layer on the fullest device."""
  if model.ffn != "moe":
    return 0
  return -(-(model.moe.n_routed + unit.redundant) // unit.chips)


def weight_bytes(
  model: config.Model, unit: Unit, drafts: bool = True
) -> dict[str, float]:
  """Of the fullest device: its experts, attention's share, all that is shared.

  `drafts`: with the MTP module that drafts, if there is one (Sec. 5.4.3). W_UK and W_UV are held a second time, by head, as `Mla.absorbed` reads them.
  """
  s, a = count.sizes(model), model.attention
  low, high = WEIGHT_BYTES[unit.precision]
  layers, n_moe = model.n_layers, model.n_moe_layers
  here = slots(model, unit) * s.expert
  moe = s.attention / unit.tensor + s.shared + here
  dense = s.attention / unit.tensor + s.ffn
  small = count.by_formula(model).main - 2 * s.table - layers * s.attention
  small -= (layers - n_moe) * s.ffn + n_moe * s.shared
  small -= n_moe * model.moe.n_routed * s.expert
  by_head = layers * a.n_heads * a.kv_rank * (a.nope_dim + a.v_dim)
  parts = {
    "weights": low * (n_moe * moe + (layers - n_moe) * dense)
    + high * ((2 * s.table + by_head) / unit.tensor + small)
  }
  if drafts and model.mtp.depth:
    block = moe if model.ffn == "moe" else dense
    parts["MTP module"] = low * (block + 2 * model.dim**2)
  return parts


def cache_bytes(model: config.Model, unit: Unit, context: int) -> float:
  """Of a sequence, on a device: heads share the latent, so TP keeps it whole."""
  token = count.cache_bytes_per_token(model, unit.cache)["mla"]
  return token * context * unit.tensor


def memory(
  model: config.Model,
  unit: Unit,
  *,
  sequences: float,
  context: int,
  chunk: int = 1,
  drafts: bool = True,
  on_cpu: bool = False,
  capacity: float | None = None,
) -> Memory:
  """Bytes of a device that decodes (`infer.Decoder`): MLA, absorbed.

  Args:
    sequences: of a device; a device holds all those whose attention it shares.
    context: tokens that each has room for.
    chunk: over 1 a step of prefill, which makes keys and values of the whole
      past, a layer at a time.
    drafts: with an MTP module and its cache.
    on_cpu: adds what is particular to XLA's CPU.
    capacity: bytes of the device.
  """
  a, m = model.attention, model.moe
  parts = weight_bytes(model, unit, drafts)
  parts["cache"] = sequences * cache_bytes(model, unit, context)
  if "MTP module" in parts:
    parts["cache"] *= 1 + 1 / model.n_layers
  head, tokens = a.nope_dim + a.rope_dim, sequences * chunk
  if unit.chips > 1 and model.ffn == "moe":
    # Room for every token at every expert, as low-latency exchanges have it;
    # in prefill for as many as there are.
    rows = slots(model, unit) * unit.chips if chunk == 1 else m.top_k
    sent = network.DISPATCH["fp8" if unit.precision == "fp8" else "bf16"]
    parts["exchange"] = tokens * rows * model.dim * (sent + network.COMBINE)
  if chunk == 1:
    working = 3 * sequences * a.n_heads * context
  else:
    # Keys, values and their blocks; queries and outputs; rows of experts.
    past = sequences * context * a.n_heads * (head + a.v_dim)
    rows = tokens * m.top_k * (model.dim + 3 * m.hidden)
    if model.ffn == "dense":
      rows = 3 * tokens * model.dense_hidden
    own = tokens * a.n_heads * (head + a.v_dim)
    working = 1.4 * past + 2.2 * own + 2.1 * rows + 4 * tokens * model.dim
  working *= 4
  if on_cpu and "float8" in unit.cache and chunk == 1:
    # A layer's cache is widened before it is multiplied; bfloat16 is read as it is.
    wide = count.cache_bytes_per_token(model, "float32")["mla"]
    working += sequences * context * wide / model.n_layers
  parts["working"] = working
  parts["logits"] = 4 * sequences * model.vocab_size if chunk == 1 else 0
  return Memory(parts, capacity)


def fitting(model: config.Model, unit: Unit, context: int, hbm: float) -> float:
  """Sequences a device that its memory holds, a twentieth to spare."""
  of = lambda n: memory(model, unit, sequences=n, context=context).total
  return max(0.0, (0.95 * hbm - of(0)) / (of(1) - of(0)))

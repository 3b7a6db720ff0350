"""Inference on a deployment unit: prefill, decode, the batch that fits.

A roofline: every part takes the longer of its bytes and its FLOPs, exchange
overlaps compute where the unit runs two microbatches (Sec. 3.4), and a layer
costs a fixed time besides (launches, synchronisation). `fitted.SERVED` is the
share of the roofline that servers reach, `fitted.LAYER` the fixed time.
"""

import dataclasses

from dsv3 import config
from dsv3.plan import count, fitted, kernels, network
from dsv3.plan.chips import Chip
from dsv3.plan.memory import Memory
from dsv3.plan.mesh import Mesh
from dsv3.plan.unit import (
  WEIGHT_BYTES,
  Unit,
  cache_bytes,
  fitting,
  memory,
  slots,
)

DRAFT_ACCEPTED = 0.85  # Sec. 5.4.3: 85% to 90% of second tokens are kept


@dataclasses.dataclass(frozen=True)
class Decode:
  """One step of decoding at a context, with a batch a chip."""

  context: int
  batch: float  # sequences a chip
  fitting: float  # the most that its memory holds
  memory: Memory  # of a chip
  seconds: dict[str, float]  # by term, of a step
  binds: str
  intensity: float  # FLOPs of absorbed attention a byte of cache

  @property
  def latency(self) -> float:
    return sum(self.seconds.values())

  @property
  def tokens_chip(self) -> float:
    return self.batch / self.latency

  @property
  def tokens_user(self) -> float:
    return 1 / self.latency


def absorbed_flops(model: config.Model) -> float:
  """Of one query token, cached token and layer: scores and sums of latents.

  >>> from dsv3 import config, overlay
  >>> v3 = config.build(overlay.load("v3_671b")).model
  >>> absorbed_flops(v3)
  278528.0
  """
  a = model.attention
  return 2.0 * a.n_heads * (2 * a.kv_rank + a.rope_dim)


def decode(
  model: config.Model,
  chip: Chip,
  unit: Unit,
  context: int,
  batch: float,
  *,
  queries: int = 1,
  served: float = fitted.SERVED,
  layer: float = fitted.LAYER,
) -> Decode:
  """A step of `queries` tokens for each of `batch` sequences a chip."""
  rates = kernels.rates(chip, unit.precision)
  stream = chip.hbm_rate * kernels.MEMORY
  s, m = count.sizes(model), model.moe
  size, _ = WEIGHT_BYTES[unit.precision]
  layers, n_moe = model.n_layers, model.n_moe_layers
  tokens = batch * queries
  group = tokens * unit.tensor  # of the devices that share their attention

  linear = layers * s.attention + (layers - n_moe) * s.ffn + n_moe * s.shared
  read = layers * s.attention / unit.tensor
  read += (layers - n_moe) * s.ffn + n_moe * s.shared
  dense = max(size * read / stream, 2 * tokens * linear / rates["dense"])
  if model.ffn == "moe":
    woken = network.expected_experts(model, tokens * unit.chips) / m.n_routed
    read = woken * slots(model, unit) * n_moe * s.expert
    # Of the fullest device: where experts do not divide it has more of them.
    more = slots(model, unit) * unit.chips / (m.n_routed + unit.redundant)
    work = 2 * tokens * more * m.top_k * n_moe * s.expert
    experts = max(size * read / stream, work / rates["experts"])
  else:
    experts = 0.0
  head = max(
    2 * s.table / unit.tensor / stream, 2 * tokens * s.table / rates["high"]
  )
  cached = cache_bytes(model, unit, context) * batch
  flops = absorbed_flops(model) * layers * context * group / unit.tensor
  attention = max(cached / stream, flops / rates["attention"])

  exchange = n_moe * exchange_seconds(model, chip, unit, tokens)
  if unit.tensor > 1:
    reduced = 4 * group * model.dim * 2
    exchange += layers * network.ring_seconds(
      reduced, Mesh(tensor=unit.tensor), "tensor", chip
    )
  compute = dense + experts + head + attention
  seconds = {
    "dense weights": dense,
    "experts": experts,
    "head": head,
    "attention": attention,
    "exchange": max(0.0, exchange - compute) if unit.overlap else exchange,
  }
  seconds = {k: v / served for k, v in seconds.items()}
  seconds["layers' fixed time"] = layers * layer
  parts = {k: v for k, v in seconds.items() if k != "exchange"}
  parts["exchange"] = exchange / served
  return Decode(
    context,
    batch,
    fitting(model, unit, context, chip.hbm),
    memory(model, unit, sequences=batch, context=context, capacity=chip.hbm),
    {k: v for k, v in seconds.items() if v > 0},
    max(parts, key=parts.get),
    absorbed_flops(model)
    * queries
    * layers
    / count.cache_bytes_per_token(model, unit.cache)["mla"],
  )


def exchange_seconds(model, chip: Chip, unit: Unit, tokens: float) -> float:
  """Of a layer, every copy sent point to point to its device (Sec. 3.4.2)."""
  if unit.chips == 1 or model.ffn != "moe":
    return 0.0
  mesh = unit.mesh()
  _, near = network.exchange_bytes(model, mesh, chip, unit.precision)
  outside = mesh.domains("expert", chip.domain) > 1
  rate = chip.network_rate if outside else chip.link_rate
  hops = 1.0
  if chip.torus:
    hops = max(1.0, chip.torus * unit.chips ** (1 / chip.torus) / 4)
  return tokens * near * hops / (rate * network.REACHED)


def bound_of_exchange(model: config.Model, tokens: int, rate: float) -> float:
  """The report's authors' bound on a token's time, exchange alone.

  Dispatch in one byte and combine in two, routed and shared expert, two
  microbatches in turn (arXiv 2505.09343, Sec. 2.3.2). 32 tokens at 50 GB/s:
  15.1 ms; 14.76 there, where 7168 is 7K.
  """
  copies = model.moe.top_k + model.moe.n_shared
  one = 3 * tokens * copies * model.dim / rate
  return 2 * one * model.n_layers


@dataclasses.dataclass(frozen=True)
class Prefill:
  """Reading prompts of one length."""

  context: int
  tokens_chip: float  # a second
  latency: float  # of a prompt on the devices that share its attention
  binds: str


def prefill(model: config.Model, chip: Chip, unit: Unit, context: int):
  """Throughput of prompts of `context` tokens, and the time of one of them.

  Keys and values of all heads are made (the plain form); the group limit caps
  the exchange, as in training.
  """
  forward = count.forward_flops(model, context, mtp=False)
  last = 2.0 * count.sizes(model).table * (1 - 1 / context)
  forward = forward._replace(high=forward.high - last)  # logits of one token
  moved = kernels.moved_bytes(model, mtp=False)
  time = kernels.seconds(forward, moved, chip, unit.precision)
  mesh = unit.mesh()
  exchange = model.n_moe_layers * network.exchange_seconds(
    model, mesh, chip, unit.precision, 1.0
  )
  if unit.tensor > 1:  # a gather and a scatter around attention
    exchange += model.n_layers * network.ring_seconds(
      4 * model.dim * 2, Mesh(tensor=unit.tensor), "tensor", chip
    )
  terms = {**time._asdict(), "exchange": exchange}
  token = max(time.total, exchange) if unit.overlap else sum(terms.values())
  fixed = model.n_layers * fitted.LAYER
  latency = context * token / unit.tensor + fixed
  # At least 8192 tokens are read together, so short prompts share fixed time.
  together = max(context, 8192) * token / unit.tensor + fixed
  rate = max(context, 8192) / together / unit.tensor
  return Prefill(context, rate, latency, max(terms, key=terms.get))


def speculation(
  model: config.Model,
  chip: Chip,
  unit: Unit,
  context: int,
  batch: float,
  accepted: float = DRAFT_ACCEPTED,
) -> tuple[float, float]:
  """Speed-up that one MTP module brings, (1 + p) / (1 + c), and c.

  c is what a round costs beyond a plain step: two query tokens a sequence, and
  the module's own block and head.
  """
  plain = decode(model, chip, unit, context, batch)
  both = decode(model, chip, unit, context, batch, queries=2)
  module = (plain.latency - plain.seconds["head"]) / model.n_layers
  cost = (both.latency + module + plain.seconds["head"]) / plain.latency - 1
  return (1 + accepted) / (1 + cost), cost

"""Bytes of a device in a training step, by part; of decoding see `unit.py`.

One device on XLA's CPU backend: equal to XLA's own account of the compiled step
within 15% (`tests/plan/test_plan_memory.py`). `on_cpu` adds what is particular to
that backend, `widens` what its bfloat16 takes in jaxlib 0.10 and no more in 0.12.
Over a mesh every part is divided by the axes that shard it.
"""

from typing import NamedTuple

from dsv3 import config
from dsv3.plan import count, pipeline
from dsv3.plan.mesh import Mesh

# Beside the kept activations, while one block goes backward: gradients of its
# activations, float32 results before they are rounded, transposed operands.
# In units of all that autodiff keeps of the block in float32, by FFN and by
# whether the block is computed again. Measured on XLA's CPU backend, jaxlib
# 0.10.2, over widths, heads, ranks, experts: 1.6 to 1.9, 1.5 to 1.75 with
# recomputation, which frees what it has made as it goes; dense 1.1 and 0.5.
WORKING = {
  ("moe", False): 1.75,
  ("moe", True): 1.6,
  ("dense", False): 1.1,
  ("dense", True): 0.5,
}
# The same for an MTP module, whose backward pass is no scan.
WORKING_MODULE = 0.75


class Memory(NamedTuple):
  """Bytes by part, and those that the chip has."""

  parts: dict[str, float]
  capacity: float | None

  @property
  def total(self) -> float:
    return sum(self.parts.values())

  @property
  def fits(self) -> bool:
    """With a twentieth to spare: allocators fragment, libraries take some."""
    return self.capacity is None or self.total <= 0.95 * self.capacity


def kept_of_norm(width: int, size: int) -> int:
  """What autodiff keeps of a float32 RMSNorm over `width` values, in bytes.

  Its input, twice the input, the scaled input, the output (`layers.RmsNorm`).
  """
  return (16 if size == 4 else 14) * width


def kept(model: config.Model, kind: str, remat: str, dtype: str) -> float:
  """Bytes that a token leaves of a block for its backward pass (Sec. 3.2.3).

  `kind` is the block's FFN. "paper" keeps `block.KEPT` and the block's input,
  "full" the input alone, "none" all that autodiff asks for.
  """
  a, m, d = model.attention, model.moe, model.dim
  size, out = count.ITEM_BYTES[dtype], a.n_heads * a.v_dim
  latent = a.kv_rank + a.rope_dim if a.kind == "mla" else 0
  if remat == "full":
    return d * size
  if remat == "paper":
    wide = 2 * m.hidden * (m.top_k + m.n_shared)
    wide = wide if kind == "moe" else 2 * model.dense_hidden
    return size * (2 * d + a.q_rank + latent + out + wide) + 4 * a.n_heads
  head, heads = a.nope_dim + a.rope_dim, count.kv_heads(model)
  norms = 2 * kept_of_norm(d, size) + kept_of_norm(a.q_rank, size)
  norms += kept_of_norm(a.kv_rank, size) if a.kind == "mla" else 0
  core = a.n_heads * head + heads * (head + a.v_dim) + 2 * out
  total = norms + size * core + 4 * a.n_heads
  if kind == "dense":
    return total + size * 3 * model.dense_hidden
  # Of the router: its input, scores three times and a mask, indices and gates.
  router = 4 * d + 13 * m.n_routed + 20 * m.top_k
  rows = m.top_k * (d + 3 * m.hidden) + 3 * m.hidden * m.n_shared
  return total + router + size * rows


def state_bytes(optimizer: config.Optimizer, train: config.Train) -> int:
  """Of a parameter, between steps: master weight, moments, average."""
  moments = 2 * count.ITEM_BYTES[optimizer.moment_dtype]
  on_device = train.ema_decay > 0 and train.ema_place == "device"
  return 4 + moments + 4 * on_device


class Shares(NamedTuple):
  """Parameters that the fullest device holds: its experts, all others."""

  experts: float
  others: float
  tables: float  # of the others: embedding and head, which stay BF16

  @property
  def total(self) -> float:
    return self.experts + self.others

  def low_bytes(self, precision: str) -> float:
    """Bytes of the copies that products read (Sec. 3.3.1)."""
    size = 1 if precision == "fp8" else 2
    return size * self.total + (2 - size) * self.tables


def shares(model: config.Model, mesh: Mesh) -> Shares:
  """Parameters of one copy of a stage, before fsdp divides them."""
  found, s = count.by_formula(model), count.sizes(model)
  n_moe = model.n_routers
  experts = n_moe * model.moe.n_routed * s.expert
  tables = 2 * s.table
  others = found.main + found.mtp - experts - tables
  layers = model.n_layers + model.mtp.depth
  fullest = pipeline.layers_of_fullest(layers, mesh) / layers
  # Embedding and head are on two stages; DualPipe's first and last are one.
  tables /= min(mesh.stage, 2) if mesh.stage > 1 else 1
  cut = mesh.tensor
  return Shares(
    experts * fullest / cut / mesh.expert,
    (others * fullest + tables) / cut,
    tables / cut,
  )


def training(
  values: config.Config,
  *,
  mesh: Mesh = Mesh(),
  microbatches: int | None = None,
  batch: int | None = None,
  schedule: str = "none",
  virtual: int = 1,
  precision: str = "bf16",
  capacity: float | None = None,
  on_cpu: bool = False,
  widens: bool = True,
) -> Memory:
  """Bytes of the fullest device at the peak of a step."""
  model = values.model
  microbatches = microbatches or values.train.microbatches
  batch = batch or values.schedule.batch_size
  rows = batch / mesh.ranks / microbatches
  tokens = rows * values.data.seq_len / mesh.context
  held, copies = shares(model, mesh), pipeline.copies(schedule)
  held = Shares(*(copies * n for n in held))

  # Master weights and moments are over all replicas (ZeRO-1), and fsdp.
  cut = mesh.data * mesh.fsdp
  sharded = held.experts / cut + held.others / (cut * mesh.expert)
  sharded /= copies
  one_device = mesh.size == 1
  parts = {"weights": 4 * sharded}
  of_state = state_bytes(values.optimizer, values.train)
  parts["optimizer"] = (of_state - 4) * sharded
  if not one_device:
    # What products read: rounded weights, gathered from their master copies.
    low = held.low_bytes(precision)
    parts["weights"] += low / mesh.fsdp
    if mesh.fsdp > 1:
      layers = pipeline.layers_of_fullest(
        model.n_layers + model.mtp.depth, mesh
      )
      parts["weights"] += 2 * low / copies / layers
  accumulated = microbatches > 1 and (mesh.stage == 1)
  unrolled = on_cpu and model.layers == "unrolled"
  parts["gradients"] = 4 * held.total / mesh.fsdp * (1 + accumulated + unrolled)

  at_work, stored = _activations(model, tokens, mesh, precision, on_cpu, widens)
  flying = pipeline.in_flight(schedule, mesh.stage, microbatches, virtual)
  parts["activations"] = flying * stored
  parts["working"] = at_work
  if on_cpu and model.remat == "none" and model.moe.kernel == "auto":
    # The choice of a kernel by platform keeps a copy of the weights it reads.
    parts["activations"] += 4 * held.experts
  parts["logits"] = _logits(values, rows, tokens, mesh)
  if mesh.expert > 1:
    dispatched = tokens * model.moe.top_k * model.dim
    parts["exchange"] = dispatched * (3 if precision == "fp8" else 4)
  depths = 1 + model.mtp.depth
  parts["batch"] = 4 * batch / mesh.ranks * values.data.seq_len * (2 + depths)
  return Memory(parts, capacity)


def _activations(
  model, tokens, mesh, precision, on_cpu, widens
) -> tuple[float, float]:
  """Bytes at work on one block, and kept of all blocks of a microbatch."""
  kind = "moe" if model.ffn == "moe" else "dense"
  dtype, remat, depth = model.dtype, model.remat, model.mtp.depth
  unrolled = on_cpu and model.layers == "unrolled"
  if unrolled:
    remat = "none"  # XLA's CPU computes all blocks again before it goes back
  of = lambda kind: kept(model, kind, remat, dtype)
  n_moe = model.n_moe_layers
  body = n_moe * of("moe") + (model.n_layers - n_moe) * of("dense")
  if precision == "fp8" and remat == "paper" and kind == "moe":
    # SwiGLU's inputs are cached in FP8 (Sec. 3.3.2).
    body -= (
      n_moe * 2 * model.moe.hidden * (model.moe.top_k + model.moe.n_shared)
    )
  remade = remat != "none"
  again = kept(model, kind, "none", dtype) - of(kind) if remade else 0
  # A CPU computes in float32.
  single = kept(model, kind, "none", "float32" if on_cpu and widens else dtype)
  work = again + WORKING[kind, remade] * single
  # A CPU widens what was kept in bfloat16 before it multiplies.
  widened = on_cpu and widens and dtype == "bfloat16"
  wider = of(kind) if widened and not remade else 0
  size = count.ITEM_BYTES[dtype]
  module = of(kind) + 3 * kept_of_norm(model.dim, size) + 3 * model.dim * size
  # An MTP module is done with before the main model goes backward.
  peak = body + work + wider
  if depth:
    at_module = WORKING_MODULE * single
    if remade or unrolled:  # modules are never scanned: all are made again
      at_module = work + (depth - 1) * again
    peak = max(peak, body + depth * module + at_module + 1.5 * wider)
  layers = model.n_layers + depth
  fullest = pipeline.layers_of_fullest(layers, mesh) / layers
  stored = tokens * (peak - work) * fullest / mesh.tensor
  return tokens * work / mesh.tensor, stored


def _logits(values, rows, tokens, mesh) -> float:
  """Of the cross-entropy: chunks of logits, gradients of hidden states."""
  model = values.model
  chunk = min(128, values.data.seq_len)  # ops/cross_entropy.py
  size = count.ITEM_BYTES[model.dtype]
  logits = 3 * 4 * rows * chunk * model.vocab_size / mesh.tensor
  return logits + (1 + model.mtp.depth) * size * tokens * model.dim

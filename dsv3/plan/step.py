"""A training step over a mesh: its time by term, and what follows from it."""

import dataclasses

from dsv3 import config
from dsv3.plan import count, fitted, kernels, memory, network, pipeline
from dsv3.plan.chips import Chip
from dsv3.plan.mesh import Mesh
from dsv3.plan.network import Collective

NAMES = {
  "dense": "dense products",
  "experts": "expert products",
  "attention": "attention",
  "high": "head and router",
  "memory": "memory traffic",
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a step is spread over devices."""

  mesh: Mesh
  batch: int  # sequences of a step
  microbatches: int  # that a rank's sequences are cut into
  schedule: str = "none"  # of the pipeline
  virtual: int = 1  # chunks of layers a stage, for "interleaved"
  precision: str = "bf16"  # of Linears; fp8 is the report's recipe (Sec. 3.3)


@dataclasses.dataclass(frozen=True)
class Step:
  """What a step takes. Seconds are the expected ones unless a name says other."""

  chip: Chip
  layout: Layout
  seconds: dict[str, float]  # by term; they add up to the step
  collectives: tuple[Collective, ...]
  tokens: int  # of the step
  flops_token: float  # model FLOPs: causal, MTP included, nothing twice
  factors: tuple[float, float]  # tokens/s of low and high over the expected
  chunk: pipeline.Chunk  # of a microbatch and stage

  @property
  def step_seconds(self) -> float:
    return sum(self.seconds.values())

  @property
  def tokens_chip(self) -> float:
    """Tokens a second and chip."""
    return self.tokens / self.step_seconds / self.layout.mesh.size

  @property
  def mfu(self) -> float:
    """Of the BF16 dense peak, whatever the precision: rows compare."""
    return self.tokens_chip * self.flops_token / self.chip.bf16

  @property
  def binds(self) -> str:
    """The term that takes most of the step."""
    return max(self.seconds, key=self.seconds.get)

  def range(self) -> tuple[float, float, float]:
    """Tokens/s of a chip: low, expected, high."""
    low, high = self.factors
    return low * self.tokens_chip, self.tokens_chip, high * self.tokens_chip

  def seconds_range(self) -> tuple[float, float, float]:
    """Seconds of the step: low, expected, high; low is the fastest."""
    low, high = self.factors
    return self.step_seconds / high, self.step_seconds, self.step_seconds / low

  def chip_hours(self, tokens: float) -> float:
    return tokens / self.tokens_chip / 3600


def of(
  values: config.Config,
  chip: Chip,
  layout: Layout,
  *,
  mtp: bool = True,
  shares=fitted.SHARE,
) -> Step:
  """The time of a step, by term. `mtp` False leaves the MTP modules out."""
  model, mesh, m = values.model, layout.mesh, layout.microbatches
  seq_len = values.data.seq_len
  rows = layout.batch / mesh.ranks / m
  tokens = rows * seq_len / mesh.context  # of a device and microbatch
  depth = model.mtp.depth if mtp else 0
  layers = model.n_layers + depth
  fullest = pipeline.layers_of_fullest(layers, mesh)

  work = kernels.training(
    model, seq_len, chip, layout.precision, mtp=mtp, shares=shares
  )
  share = tokens / mesh.stage / mesh.tensor
  share /= pipeline.computing_share(layout.schedule)
  forward, backward = work.forward.times(share), work.backward.times(share)
  uneven = fullest * mesh.stage / layers  # the fullest stage over the mean
  weights = work.weights.times(share * uneven).total
  compute = forward.plus(backward)

  between = _between(values, chip, layout, tokens, fullest, mtp)
  waits = {c.name: c.seconds for c in between}
  busy = compute.total * uneven * m
  sent = exchange = waits.pop("expert exchange", 0.0)
  paired = pipeline.paired_share(layout.schedule, mesh.stage, m)
  exchange = max(0.0, exchange - busy) * paired + exchange * (1 - paired)
  gather = max(0.0, waits.pop("weight gather", 0.0) - busy)
  # Passed on while the next microbatch computes: one of them waits.
  passed = waits.pop("stage to stage", 0.0) / m

  seconds = {NAMES[k]: m * s for k, s in compute._asdict().items()}
  seconds["uneven stages"] = busy - compute.total * m
  seconds["expert exchange"] = exchange
  seconds["weight gather"] = gather
  seconds["stage to stage"] = passed
  seconds |= waits
  f, b = forward.total * uneven, backward.total * uneven
  # Of one microbatch and stage: alone it waits for its exchange, there and back.
  wait, other = sent / m, sum(waits.values()) / m
  chunk = pipeline.Chunk(
    f + wait / 2 + other / 3,
    b + wait / 2 + other * 2 / 3,
    weights,
    f + b + other + (max(0.0, wait - f - b) if paired else wait),
  )
  seconds["pipeline bubble"] = pipeline.bubble(
    layout.schedule, mesh.stage, chunk, layout.virtual
  )
  once = _once(values, chip, layout)
  state = memory.shares(model, mesh).total / (mesh.data * mesh.fsdp)
  moved = 2 * memory.state_bytes(values.optimizer, values.train) + 4
  update = state * moved / (chip.hbm_rate * kernels.MEMORY)
  after = {c.name: c.seconds for c in once}
  # Two copies of a stage are summed while the pipeline drains.
  copies = after.pop("gradients of both copies", 0.0)
  after["copies"] = max(0.0, copies - seconds["pipeline bubble"])
  seconds["gradients, optimizer"] = update + sum(after.values())
  return Step(
    chip,
    layout,
    {k: s for k, s in seconds.items() if s > 0},
    tuple(c for c in (*between, *once) if c.seconds > 0),
    layout.batch * seq_len,
    count.flops_per_token(model, seq_len, mtp=mtp),
    fitted.SPREAD.get((chip.family, layout.precision), (0.8, 1.2)),
    chunk,
  )


def _between(values, chip, layout, tokens, fullest, mtp) -> list[Collective]:
  """Collectives of every microbatch; seconds are of all of a step."""
  model, mesh, m = values.model, layout.mesh, layout.microbatches
  d = model.dim
  found = []
  depth = model.mtp.depth if mtp else 0
  layers = model.n_layers + depth
  n_moe = (model.n_moe_layers + depth) * fullest / layers
  if model.ffn == "moe" and mesh.expert > 1:
    one = network.exchange_seconds(
      model, mesh, chip, layout.precision, tokens / mesh.tensor
    )
    far, near = network.exchange_bytes(model, mesh, chip, layout.precision)
    n_bytes = (far or near) * tokens / mesh.tensor
    # Forward, and the same again for the gradients (Sec. 3.3.3).
    found.append(
      Collective(
        "expert exchange", "expert", 2 * n_bytes, "layer", 2 * n_moe * m * one
      )
    )
  if mesh.tensor > 1:
    # With sequence parallelism: a gather and a scatter around attention and FFN.
    n_bytes = 4 * tokens * d * 2
    one = network.ring_seconds(n_bytes, mesh, "tensor", chip)
    found.append(
      Collective(
        "tensor", "tensor", 2 * n_bytes, "layer", 2 * fullest * m * one
      )
    )
  if mesh.context > 1:
    width = count.cache_bytes_per_token(model)[model.attention.kind]
    n_bytes = tokens * mesh.context * width / model.n_layers
    one = network.ring_seconds(n_bytes, mesh, "context", chip)
    found.append(
      Collective(
        "context", "context", 3 * n_bytes, "layer", 3 * fullest * m * one
      )
    )
  if mesh.fsdp > 1:
    held = memory.shares(model, mesh)
    # Gathered forward and backward; gradients are scattered in float32.
    n_bytes = 2 * held.low_bytes(layout.precision) + 4 * held.total
    one = network.ring_seconds(n_bytes, mesh, "fsdp", chip)
    found.append(
      Collective("weight gather", "fsdp", n_bytes / fullest, "layer", m * one)
    )
  if mesh.stage > 1:
    n_bytes = 2 * tokens * d * 2 / mesh.tensor
    one = n_bytes / network.rate(mesh, "stage", chip)
    found.append(
      Collective(
        "stage to stage",
        "stage",
        n_bytes * layout.virtual,
        "microbatch",
        m * one * layout.virtual,
      )
    )
  return found


def _once(values, chip, layout) -> list[Collective]:
  """Collectives of a step: gradients summed, new weights spread (ZeRO-1)."""
  model, mesh = values.model, layout.mesh
  held = memory.shares(model, mesh)
  low = 1 if layout.precision == "fp8" else 2
  experts = held.experts * (4 + low) / mesh.fsdp
  others = held.others * (4 + low) / mesh.fsdp
  found = []
  if pipeline.copies(layout.schedule) > 1:  # gradients of the two copies
    n_bytes = 4 * held.total / mesh.fsdp
    seconds = n_bytes / network.rate(mesh, "stage", chip)
    found.append(
      Collective("gradients of both copies", "stage", n_bytes, "step", seconds)
    )
  if mesh.data > 1:
    seconds = network.ring_seconds(experts, mesh, "data", chip)
    found.append(
      Collective("gradients of experts", "data", experts, "step", seconds)
    )
  if mesh.data * mesh.expert > 1:
    seconds = network.all_ranks_seconds(others, mesh, chip)
    found.append(
      Collective("gradients of all others", "ranks", others, "step", seconds)
    )
  return found

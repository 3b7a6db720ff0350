"""The whole answer: what a model costs, where it fits, how fast it can be."""

import dataclasses

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.plan import chips, count, fitted, kernels, search, serve
from dsv3.plan.memory import Memory
from dsv3.plan.mesh import SCHEDULES, Mesh, lacks, parse
from dsv3.plan.presets import PRESETS
from dsv3.plan.search import Candidate, Found
from dsv3.plan.step import Step
from dsv3.plan.unit import Unit, check, fitting, weight_bytes

CONTEXTS = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
MAX_CONTEXT = 163_840  # max_position_embeddings of the released config
SMALL = 1024  # widths under it are warned of
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences a chip, tried in turn


@dataclasses.dataclass(frozen=True)
class Serving:
  """A row of the serving table: one context."""

  context: int
  prefill: serve.Prefill | None  # None: not one sequence fits
  decode: serve.Decode | None  # None: the batch that is asked for does not fit
  speedup: float  # that one MTP module brings
  cost: float  # c of (1 + p) / (1 + c)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The answer; `report.text`, `page.html` and `as_dict` show it."""

  values: config.Config
  chip: chips.Chip
  n_chips: int
  precision: str
  parameters: count.Parameters
  training: Candidate | None  # None: the unit of a preset only serves
  found: Found | None  # what a search has ranked
  unit: Unit | None  # None: attention without a latent is not served
  serving: tuple[Serving, ...]
  tokens: float  # of the budget
  price: float | None  # US$ a chip and hour
  accepted: float  # share of drafted tokens that is kept
  warnings: tuple[str, ...]

  @property
  def step(self) -> Step | None:
    return self.training.step if self.training else None

  @property
  def memory(self) -> Memory | None:
    return self.training.memory if self.training else None

  def by_remat(self) -> dict[str, float]:
    """Bytes kept for the backward pass under every policy (Sec. 3.2.3)."""
    return {
      policy: search.candidate(
        self.values, self.chip, self.training.layout, policy
      ).memory.parts["activations"]
      for policy in search.REMAT
    }

  def by_schedule(self) -> dict[str, float]:
    """Seconds of bubble under every schedule of the pipeline (Table 2)."""
    layout, found = self.training.layout, {}
    for kind in SCHEDULES[1:] if layout.mesh.stage > 1 else ():
      if kind == "dualpipe" and layout.mesh.stage % 2:
        continue
      if lacks(kind, layout.mesh.stage, layout.microbatches):
        continue
      virtual = max(layout.virtual, 2) if kind == "interleaved" else 1
      other = dataclasses.replace(layout, schedule=kind, virtual=virtual)
      one = search.candidate(self.values, self.chip, other, self.training.remat)
      found[kind] = one.step.seconds.get("pipeline bubble", 0.0)
    return found

  def rates(self) -> dict[str, float]:
    """FLOP/s that a chip is planned to reach, by kind of product."""
    return kernels.rates(self.chip, self.precision)

  @property
  def chip_hours(self) -> tuple[float, float, float]:
    """Of the budget: fewest, expected, most."""
    low, expected, high = self.step.range()
    hours = lambda rate: self.tokens / rate / 3600
    return hours(high), hours(expected), hours(low)

  def forecast(self) -> str:
    """The training plan in one line."""
    low, expected, high = (self.n_chips * rate for rate in self.step.range())
    return (
      f"plan: {expected:,.0f} tokens/s expected ({low:,.0f} to {high:,.0f}), "
      f"{self.step.step_seconds:.3g} s a step, "
      f"{self.memory.total / 1e9:.3g} GB a device; most of it {self.step.binds}"
    )


def precision_of(values: config.Config, given: str | None) -> str:
  """Precision of the Linears: as given, or what the config's recipe says."""
  return given or ("bf16" if values.model.precision.recipe == "bf16" else "fp8")


def of(
  values: config.Config,
  *,
  chip: str | chips.Chip | None = None,
  n_chips: int | None = None,
  mesh: str | Mesh | None = None,
  preset: str | None = None,
  precision: str | None = None,
  microbatches: int | None = None,
  schedule: str | None = None,
  everything: bool = False,
  unit: Unit | None = None,
  batch: float | None = None,
  tokens: float | None = None,
  price: float | None = None,
  accepted: float = serve.DRAFT_ACCEPTED,
) -> Plan:
  """Plans training and serving of a config on `n_chips` of a chip.

  Without a mesh, the fastest that fits. `everything` searches recomputation
  too. `tokens` is the budget, by default that of the run. Raises ConfigError
  for what cannot be, with the option or key that is wrong.
  """
  if preset is not None and preset not in PRESETS:
    raise ConfigError(
      f"--preset: found {preset}, wanted one of {', '.join(PRESETS)}"
    )
  given = PRESETS.get(preset)
  if given and given.unit and (mesh or microbatches or schedule or everything):
    raise ConfigError(
      f"--preset: {preset} serves: found --mesh, --microbatches, --schedule or "
      "--search, wanted none of them"
    )
  if given:
    chip, n_chips = chip or given.chip, n_chips or given.chips
    mesh, unit = mesh or given.mesh, unit or given.unit
    microbatches = microbatches or given.microbatches
    schedule = schedule or given.schedule
  one = chip if isinstance(chip, chips.Chip) else chips.chip(chip or "h800")
  if schedule is not None and schedule not in SCHEDULES:
    raise ConfigError(
      f"--schedule: found {schedule}, wanted one of {', '.join(SCHEDULES)}"
    )
  n_chips = n_chips or 1
  precision, warnings = precision_of(values, precision), []
  if precision == "fp8" and one.fp8 == one.bf16 and one.family != "cpu":
    precision = "bf16"
    warnings.append(f"{one.name} has no FP8 units: BF16 is planned")
  if one.family != "cpu":
    if values.model.dtype == "float32":
      warnings.append("model.dtype = float32 is planned at the BF16 rate")
    if values.model.dim < SMALL:
      warnings.append(
        f"model.dim = {values.model.dim}: products so small do not reach the "
        "planned rates, which are fitted at 7168; take the speed as a bound"
      )
  only = parse(mesh, n_chips) if isinstance(mesh, str) else mesh

  found = None
  if not (given and given.unit):
    found = search.search(
      values,
      one,
      n_chips,
      precision,
      only=only,
      schedule=schedule,
      microbatches=microbatches,
      remat=search.REMAT if everything else (values.model.remat,),
    )
    if not found.ranked[0].memory.fits:
      warnings.append(_lacking(found.ranked[0], one, everything))
  if unit is None:
    unit = _unit(values.model, one, n_chips, precision)
  elif unit.chips > n_chips:
    raise ConfigError(
      f"--unit: found {unit.chips} chips, wanted at most --chips = {n_chips}"
    )
  unit = dataclasses.replace(unit, precision=precision)
  serving = ()
  if values.model.attention.kind == "mla":
    check(unit, values.model)
    serving = _serving(values, one, unit, batch, accepted, warnings)
  else:
    warnings.append("serving is planned for MLA alone: it has the latent cache")
  return Plan(
    values,
    one,
    n_chips,
    precision,
    count.by_formula(values.model),
    found.ranked[0] if found else None,
    found,
    unit if serving else None,
    serving,
    tokens or _budget(values),
    price if price is not None else one.price,
    accepted,
    tuple(warnings),
  )


def _budget(values: config.Config) -> float:
  train = values.train
  if not train.steps:
    return train.tokens
  return float(train.steps * values.schedule.batch_size * values.data.seq_len)


def _lacking(best: Candidate, chip: chips.Chip, everything: bool) -> str:
  most = max(best.memory.parts, key=best.memory.parts.get)
  hint = "more chips" if everything else "--search, or more chips"
  return (
    f"does not fit: {best.memory.total / 1e9:,.1f} GB of {chip.hbm / 1e9:,.0f} "
    f"GB a chip, most of it {most}; try {hint}"
  )


def _unit(model, chip, n_chips, precision) -> Unit:
  """The fewest chips, a power of two, whose half holds the weights.

  Or so many that more would hold no less.
  """
  held = lambda n: sum(
    weight_bytes(model, Unit(n, precision=precision)).values()
  )
  size = 1
  while 2 * size <= n_chips and held(size) > 0.5 * chip.hbm:
    if held(2 * size) > 0.99 * held(size):
      break
    size *= 2
  return Unit(size, precision=precision)


def _serving(values, chip, unit, batch, accepted, warnings) -> tuple:
  model, rows = values.model, []
  for context in CONTEXTS:
    room = fitting(model, unit, context, chip.hbm)
    size = batch
    if size is None:
      # A unit serves at least one sequence for each of its attention groups.
      some = [b for b in BATCHES if b <= room] or [min(1.0, room)]
      size = some[-1]
    read, plain, speedup, cost = None, None, 0.0, 0.0
    if room * unit.chips >= 1:
      read = serve.prefill(model, chip, unit, context)
    if read and size <= room:
      size = max(size, 1 / unit.chips)
      plain = serve.decode(model, chip, unit, context, size)
      speedup, cost = serve.speculation(
        model, chip, unit, context, size, accepted
      )
    rows.append(
      Serving(
        context,
        read,
        plain,
        speedup,
        cost,
      )
    )
  if not rows[0].prefill:
    held = sum(weight_bytes(model, unit).values())
    warnings.append(
      f"serving does not fit on {unit.chips} x {chip.name}: "
      f"{held / 1e9:,.1f} GB of weights a chip"
    )
  elif not rows[0].decode:
    warnings.append(
      f"--batch: found {batch:g} sequences a chip, and no context of "
      f"{CONTEXTS[0]} tokens or more for which they fit"
    )
  return tuple(rows)


def as_dict(plan: Plan) -> dict:
  """The plan as plain values, for JSON; bytes, seconds, FLOP/s, tokens/s."""
  seq_len, model = plan.values.data.seq_len, plan.values.model
  flops = lambda **kwargs: count.flops_per_token(model, seq_len, **kwargs)
  out = {
    "config": plan.values.name,
    "chip": dataclasses.asdict(plan.chip),
    "chips": plan.n_chips,
    "precision": plan.precision,
    "parameters": plan.parameters._asdict(),
    "flops_per_token": {
      "training": flops(),
      "without_mtp": flops(mtp=False),
      "full_matrix_without_mtp": flops(mtp=False, causal=False),
      "with_recomputation": flops(recompute=True),
      "forward": count.forward_flops(model, seq_len).total,
    },
    "cache_bytes_per_token": count.cache_bytes_per_token(model),
    "warnings": list(plan.warnings),
  }
  if plan.training:
    out["training"] = _training(plan.training) | {
      "activations_by_remat": plan.by_remat(),
      "bubble_by_schedule": plan.by_schedule(),
      "flops_per_second_by_kind": plan.rates(),
    }
    hours = dict(zip(("low", "expected", "high"), plan.chip_hours))
    price = plan.price
    out["budget"] = {  # low is the cheap end: the highest speed
      "tokens": plan.tokens,
      "chip_hours": hours,
      "usd": price and {k: price * v for k, v in hours.items()},
    }
    out["search"] = {
      "considered": plan.found.considered,
      "too_large": plan.found.too_large,
      "ranked": [
        _training(one) | {"why": one.compared(plan.found.ranked[0])}
        for one in plan.found.ranked
      ],
    }
  if plan.serving:
    out["serving"] = {
      "unit": dataclasses.asdict(plan.unit),
      "weight_bytes_chip": sum(weight_bytes(model, plan.unit).values()),
      "decode_factors": fitted.SERVED_SPREAD,
      "rows": [_row(row) for row in plan.serving],
    }
  return out


def _training(one: Candidate) -> dict:
  speeds = one.step.range()
  spread = lambda values: dict(zip(("low", "expected", "high"), values))
  of_speed = lambda value: spread(value * x / speeds[1] for x in speeds)
  layout = dataclasses.asdict(one.layout)
  return {
    "layout": layout | {"remat": one.remat},
    "step_seconds": spread(one.step.seconds_range()),
    "seconds": one.step.seconds,
    "tokens_per_second_chip": spread(speeds),
    "mfu": of_speed(one.step.mfu),
    "binds": one.step.binds,
    "collectives": [c._asdict() for c in one.step.collectives],
    "memory": one.memory.parts,
    "memory_total": one.memory.total,
    "fits": one.memory.fits,
  }


def _row(row: Serving) -> dict:
  out: dict = {
    "context": row.context,
    "prefill": row.prefill and dataclasses.asdict(row.prefill),
    "mtp_speedup": row.speedup,
    "mtp_cost": row.cost,
    "decode": None,
  }
  if row.decode:
    out["decode"] = dataclasses.asdict(row.decode) | {
      "latency": row.decode.latency,
      "tokens_chip": row.decode.tokens_chip,
      "tokens_user": row.decode.tokens_user,
      "memory": row.decode.memory.parts,
    }
  return out

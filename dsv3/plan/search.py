"""Which arrangement fits and is fastest: every mesh, cut and recomputation."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.plan import memory, mesh, step
from dsv3.plan.chips import Chip
from dsv3.plan.memory import Memory
from dsv3.plan.mesh import Mesh
from dsv3.plan.step import Layout, Step

REMAT = ("none", "paper", "full")
MAX_STAGES = 32


class Candidate(NamedTuple):
  """One arrangement, what it takes and what it holds."""

  layout: Layout
  remat: str
  step: Step
  memory: Memory

  def compared(self, best: "Candidate") -> str:
    """In a few words, what costs it more than the best one."""
    if self is best:
      return f"most of it {self.step.binds}"
    mine, theirs = self.step.seconds, best.step.seconds
    more = {k: mine.get(k, 0) - theirs.get(k, 0) for k in mine | theirs}
    term = max(more, key=more.get)
    return f"{more[term]:+.3g} s {term}"


class Found(NamedTuple):
  """Candidates by speed; those that fit come first."""

  ranked: list[Candidate]
  considered: int
  too_large: int


def divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def meshes(values: config.Config, chip: Chip, chips: int) -> Iterator[Mesh]:
  """Meshes of so many chips that divide the model and are not absurd.

  Tensor and context stay inside a domain of fast links; context is for long
  sequences; pipelines have at most 32 stages of two layers or more.
  """
  model = values.model
  experts = model.moe.n_routed if model.ffn == "moe" else 1
  fast = min(chip.domain, 16)
  tensors = [t for t in divisors(chips) if t <= min(fast, 8)]
  contexts = [1]
  if values.data.seq_len > 8192:
    contexts = [c for c in divisors(chips) if c <= fast]
  stages = [
    p
    for p in divisors(chips)
    if p == 1 or (p <= MAX_STAGES and 2 * p <= model.n_layers)
  ]
  for tensor, context, stage in itertools.product(tensors, contexts, stages):
    rest, odd = divmod(chips, tensor * context * stage)
    if odd:
      continue
    for expert in (e for e in divisors(rest) if experts % e == 0):
      for fsdp in divisors(rest // expert):
        if stage > 1 and fsdp > 1:
          continue  # weights gathered anew for every microbatch of a stage
        yield Mesh(rest // expert // fsdp, fsdp, expert, context, tensor, stage)


def schedules(shape: Mesh) -> list[tuple[str, int]]:
  if shape.stage == 1:
    return [("none", 1)]
  found = [("1f1b", 1), ("zb1p", 1), ("interleaved", 2), ("interleaved", 4)]
  found += [("dualpipev", 1)]
  if shape.stage % 2 == 0:
    found += [("dualpipe", 1)]
  return found


def cuts(values: config.Config, shape: Mesh) -> list[int]:
  """Microbatches to try: powers of two rows at a time, at most eight."""
  rows, odd = divmod(values.schedule.batch_size, shape.ranks)
  if odd or not rows:
    return []
  found = [rows // r for r in (1, 2, 4, 8) if rows % r == 0]
  return [m for m in found if m >= shape.stage]


def candidate(
  values: config.Config, chip: Chip, layout: Layout, remat: str
) -> Candidate:
  """An arrangement judged: its step and its memory."""
  model = dataclasses.replace(values.model, remat=remat)
  values = dataclasses.replace(values, model=model)
  held = memory.training(
    values,
    mesh=layout.mesh,
    microbatches=layout.microbatches,
    batch=layout.batch,
    schedule=layout.schedule,
    virtual=layout.virtual,
    precision=layout.precision,
    capacity=chip.hbm,
    on_cpu=chip.family == "cpu",
  )
  return Candidate(layout, remat, step.of(values, chip, layout), held)


def search(
  values: config.Config,
  chip: Chip,
  chips: int,
  precision: str,
  *,
  only: Mesh | None = None,
  schedule: str | None = None,
  microbatches: int | None = None,
  remat: tuple[str, ...] = REMAT,
  keep: int = 10,
) -> Found:
  """Tries all arrangements; `only`, `schedule` and the like fix a part of them.

  Raises ConfigError where none divides.
  """
  found, too_large, considered = [], 0, 0
  batch = values.schedule.batch_size
  for shape in [only] if only else meshes(values, chip, chips):
    of_cuts = [microbatches] if microbatches else cuts(values, shape)
    kinds = [one for one in schedules(shape) if schedule in (None, one[0])]
    if schedule and not kinds:
      kinds = [(schedule, 1)]
    try:
      mesh.check(
        shape,
        values,
        chips,
        batch=batch,
        microbatches=of_cuts[0] if of_cuts else shape.stage,
        schedule=kinds[0][0],
      )
    except ConfigError:
      if only:
        raise
      continue
    for (kind, virtual), cut, policy in itertools.product(
      kinds, of_cuts, remat
    ):
      if virtual * shape.stage > values.model.n_layers:
        continue
      if mesh.lacks(kind, shape.stage, cut):
        continue
      layout = Layout(shape, batch, cut, kind, virtual, precision)
      one = candidate(values, chip, layout, policy)
      considered += 1
      too_large += not one.memory.fits
      found.append(one)
    if len(found) > 4000:
      found = _best(found, keep)
  if not found:
    raise ConfigError(
      f"--chips: found {chips}, wanted a number for which some mesh divides "
      f"schedule.batch_size = {batch} and the model; set --mesh, "
      "--microbatches or --config.schedule.batch_size"
    )
  return Found(_best(found, keep), considered, too_large)


def _best(found: list[Candidate], keep: int) -> list[Candidate]:
  """The fastest that fit; where none fits, those that lack least memory."""
  fit = [one for one in found if one.memory.fits]
  if not fit:
    return sorted(found, key=lambda one: one.memory.total)[:keep]
  return sorted(fit, key=lambda one: one.step.step_seconds)[:keep]

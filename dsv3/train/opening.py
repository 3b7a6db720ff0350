"""What a run says of itself before its first step."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from dsv3 import config
from dsv3.data.batches import SourceReport
from dsv3.parallel import mesh
from dsv3.plan import count
from dsv3.train import schedule


def of_run(
  values: config.Config,
  workdir: pathlib.Path,
  sizes: config.Mesh,
  plan: schedule.Schedule,
  done: int,
  changed: Mapping[str, tuple[Any, Any]],
) -> Iterator[str]:
  """What is not as it was, where the run stands, how large it is and on what."""
  for key, (old, new) in changed.items():
    yield f"{key}: {old} -> {new}"
  if "train.steps" in changed and values.schedule.time == "share":
    yield _stretched(values, plan, done, changed["train.steps"][0])
  if done:
    yield f"{workdir}: goes on after step {done}"
  size = count.by_formula(values.model)
  yield (
    f"{values.name}: {size.main + size.mtp:,} parameters, "
    f"{size.active:,} active; {plan.steps:,} steps of "
    f"{plan.batch_size(done)} x {values.data.seq_len} tokens on {_devices(sizes)}"
  )
  nodes = mesh.nodes_of_experts(sizes)
  if 1 < nodes != sizes.expert_nodes:
    yield (
      f"config.mesh.expert_nodes: found {sizes.expert_nodes}, and experts lie in "
      f"{nodes} nodes: with {nodes} a token would go to each of them once"
    )


def of_data(shares: Iterable[SourceReport]) -> Iterator[str]:
  """How much of every source the run reads."""
  for part in shares:
    yield (
      f"{part.source}: {part.documents:,} documents, {part.bytes:,} bytes, "
      f"{part.tokens:,} tokens, "
      f"{part.share:.0%} of the rows, {part.epochs:.2f} epochs"
    )


def _devices(sizes: config.Mesh) -> str:
  """The devices of the run, and those that it leaves idle."""
  there = jax.device_count()
  text = f"{sizes.size} x {jax.devices()[0].device_kind}"
  text += f", {sizes}" if sizes.size > 1 else ""
  idle = there - sizes.size
  return text + (f"; {idle} of {there} idle, by config.mesh" if idle else "")


def _stretched(
  values: config.Config, plan: schedule.Schedule, done: int, steps_before: int
) -> str:
  """A schedule in shares of the run is another one when the run is longer."""
  train_values = dataclasses.replace(values.train, steps=steps_before)
  before = schedule.make(dataclasses.replace(values, train=train_values))
  old, new = (float(s(done).lr) for s in (before, plan))
  return (
    "schedule.time = share: the schedule stretches with the run; the next "
    f"step's learning rate goes from {old:.2e} to {new:.2e}"
  )

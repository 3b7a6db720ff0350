"""Idle time and memory of pipeline schedules (Sec. 3.2.1, Table 2)."""

from typing import NamedTuple

from dsv3.plan.mesh import Mesh


class Chunk(NamedTuple):
  """Seconds of one microbatch in one stage."""

  forward: float  # F
  backward: float  # B: input and weight gradients
  weights: float  # W: the weight gradients alone
  pair: float  # F&B: a forward and a backward of two microbatches, overlapped


def bubble(schedule: str, stages: int, chunk: Chunk, virtual: int = 1) -> float:
  """Seconds that a stage stands idle in a step (Table 2).

  `virtual` chunks of layers a stage divide the bubble of "interleaved" (arXiv
  2104.04473, Sec. 2.2). DualPipeV is DualPipe of twice as many stages, folded: a
  device has two of them, half a chunk each (github.com/deepseek-ai/DualPipe).

  >>> bubble("dualpipe", 16, Chunk(1.0, 2.0, 1.0, 3.0))
  14.0
  """
  f, b, w, pair = chunk
  if stages == 1:
    return 0.0
  if schedule == "1f1b":
    return (stages - 1) * (f + b)
  if schedule == "interleaved":
    return (stages - 1) * (f + b) / virtual
  if schedule == "zb1p":
    return (stages - 1) * max(f + b - 2 * w, 0.0)
  waits = stages / 2 - 1 if schedule == "dualpipe" else (stages - 1) / 2
  return waits * max(pair + b - 3 * w, 0.0)


def copies(schedule: str) -> int:
  """Copies of its stage's parameters that a device holds (Table 2)."""
  return 2 if schedule == "dualpipe" else 1


def in_flight(
  schedule: str, stages: int, microbatches: int, virtual: int = 1
) -> float:
  """Microbatches whose activations the fullest stage holds (Table 2).

  Chunks of "interleaved" stay longer: (stages - 1) / virtual more (arXiv
  2205.05198, Sec. 4.2.3).

  >>> in_flight("interleaved", 8, 64, 2), in_flight("dualpipe", 8, 64)
  (11.5, 9)
  """
  if stages == 1:
    return 1
  held = stages
  if schedule == "interleaved" and virtual > 1:
    held += (stages - 1) / virtual
  return min(held + schedule.startswith("dualpipe"), microbatches)


def paired_share(schedule: str, stages: int, microbatches: int) -> float:
  """Share of the microbatches whose exchange may hide behind products.

  DualPipe pairs the forward pass of one microbatch with the backward pass of
  another so that one computes while the other exchanges (Sec. 3.2.1); while the
  pipeline fills and drains a stage's worth runs alone. The others always wait.

  >>> paired_share("dualpipe", 16, 120) * 120
  104.0
  """
  if not schedule.startswith("dualpipe"):
    return 0.0
  return max(0.0, 1 - stages / microbatches)


def computing_share(schedule: str) -> float:
  """Share of a chip left to compute while it exchanges behind products.

  DualPipe sets 20 of the H800's 132 multiprocessors aside (Sec. 3.2.2).
  """
  return 112 / 132 if schedule.startswith("dualpipe") else 1.0


def layers_of_fullest(layers: int, mesh: Mesh) -> int:
  """Blocks, MTP's included, of the stage with the most."""
  return -(-layers // mesh.stage)

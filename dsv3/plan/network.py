"""Bytes and seconds of every collective: expert exchange, gathers, sums.

Ring collectives of n devices send (n - 1) / n of the bytes; a group that lies
in more than one domain of fast links is as slow as its slow links.
"""

import math
from typing import NamedTuple

from dsv3 import config
from dsv3.plan.chips import Chip
from dsv3.plan.mesh import Mesh

# Reached of the sheets' rates: arXiv 2505.09343, Sec. 4: NVLink about 160 of
# 200 GB/s, InfiniBand 40 to 50 of 50 GB/s, expert exchange over 40 GB/s.
REACHED = 0.8
# Bytes of an element sent to experts and back, with a float32 scale per tile of
# 128 where it is FP8; combining is BF16 in either (Sec. 3.3.3).
DISPATCH = {"bf16": 2.0, "fp8": 1.0 + 4 / 128}
COMBINE = 2.0


class Collective(NamedTuple):
  """What a device sends, and how long it takes, in one step."""

  name: str
  axis: str
  bytes_each: float  # sent by a device, each time
  per: str  # layer (and microbatch) | microbatch | step: what that is of
  seconds: float  # of the step, overlapped or not


class Reach(NamedTuple):
  """How far a token's copies go: what the group limit is for (Sec. 2.1.2)."""

  domains: float  # other domains (nodes), each sent one copy
  devices: float  # other devices that hold one of its experts


def reach(model: config.Model, mesh: Mesh, domain: int) -> Reach:
  """Copies of a token that leave its domain and its device, on average.

  As if every kept group held one of the experts and the others were drawn from
  the kept groups evenly: 3.1, 4 and 5.7 of 4, 8 and 16 nodes for V3, where the
  router on random scores reaches 3.1, 4.0 and 5.7.
  """
  nodes, ranks = mesh.domains("expert", domain), mesh.expert
  far, near = (_parts_reached(model, n) for n in (nodes, ranks))
  return Reach(far * (nodes - 1) / nodes, near * (ranks - 1) / ranks)


def _parts_reached(model: config.Model, parts: int) -> float:
  """Of so many equal parts of the experts, those that hold some of a token's."""
  m = model.moe
  if m.top_groups == m.n_groups:
    return parts * (1 - (1 - 1 / parts) ** m.top_k)
  groups = min(m.top_groups, m.top_k)
  if parts < m.n_groups:  # a part misses where all groups are of the others
    each = m.n_groups / parts
    missed = math.prod(
      max(0.0, m.n_groups - each - i) / (m.n_groups - i) for i in range(groups)
    )
    return parts * (1 - missed)
  each = parts / m.n_groups
  others = (1 - 1 / (groups * each)) ** (m.top_k - groups)
  return groups * each * (1 - (1 - 1 / each) * others)


def exchange_bytes(
  model: config.Model, mesh: Mesh, chip: Chip, precision: str
) -> tuple[float, float]:
  """Bytes of a token and layer, dispatch and combine: between domains, inside.

  V3 over 8 nodes: 4 x 7168 x (1 + 2) x 7 / 8 between them.
  """
  both = DISPATCH[precision] + COMBINE
  far, near = reach(model, mesh, chip.domain)
  return far * model.dim * both, near * model.dim * both


def exchange_seconds(
  model: config.Model, mesh: Mesh, chip: Chip, precision: str, tokens: float
) -> float:
  """Of `tokens` of a device through one MoE layer and back.

  Slow and fast links carry one after the other, in a pipeline: the slower of
  the two counts. On a torus every copy passes side / 4 links a dimension.
  """
  if mesh.expert == 1:
    return 0.0
  far, near = exchange_bytes(model, mesh, chip, precision)
  hops = 1.0
  if chip.torus:
    side = mesh.expert ** (1 / chip.torus)
    hops = max(1.0, chip.torus * side / 4)
  slow = far / (chip.network_rate * REACHED)
  fast = near * hops / (chip.link_rate * REACHED)
  return tokens * max(slow, fast)


def rate(mesh: Mesh, axis: str, chip: Chip) -> float:
  """Bytes/s of a device in collectives over an axis."""
  inside = mesh.domains(axis, chip.domain) == 1
  return REACHED * (chip.link_rate if inside else chip.network_rate)


def ring_seconds(n_bytes: float, mesh: Mesh, axis: str, chip: Chip) -> float:
  """All-gather or reduce-scatter that leaves or takes `n_bytes` in all."""
  n = getattr(mesh, axis)
  return n_bytes * (n - 1) / n / rate(mesh, axis, chip) if n > 1 else 0.0


def all_ranks_seconds(n_bytes: float, mesh: Mesh, chip: Chip) -> float:
  """The same over data, fsdp and expert together: weights that all hold."""
  n = mesh.ranks
  if n == 1:
    return 0.0
  axes = [a for a in ("data", "fsdp", "expert") if getattr(mesh, a) > 1]
  slowest = min(rate(mesh, axis, chip) for axis in axes)
  return n_bytes * (n - 1) / n / slowest


def expected_experts(model: config.Model, tokens: float) -> float:
  """Distinct routed experts that a batch of tokens wakes in a layer.

  >>> from dsv3 import config, overlay
  >>> v3 = config.build(overlay.load("v3_671b")).model
  >>> [round(expected_experts(v3, n)) for n in (1, 8, 32, 64, 128)]
  [8, 57, 163, 222, 252]
  """
  m = model.moe
  return m.n_routed * (1 - math.pow(1 - m.top_k / m.n_routed, tokens))

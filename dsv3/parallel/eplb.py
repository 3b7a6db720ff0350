"""Which device has which experts in serving: copies of the busy ones (Sec. 3.4).

The rule of DeepSeek's EPLB. An expert with much load is copied, each copy takes an
equal part of it, and copies are packed onto devices so that all have as many and
nearly the same load. Hierarchical: groups of experts stay on one node, as
node-limited routing wants them, and copies are made within a node. Global: copies
lie anywhere. Small integers and lists: it runs on the host, now and then.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Placement:
  """Slots of all devices in order, the first device's first, a row a layer."""

  expert_XS: np.ndarray  # int64, the expert in every slot
  copies_XE: np.ndarray  # int64, how many slots an expert has
  devices: int

  def imbalance(self, load_XE: np.ndarray) -> np.ndarray:
    """Load of the busiest device over the mean, [X], if copies share evenly."""
    share_XE = np.asarray(load_XE, np.float64) / self.copies_XE
    share_XS = np.take_along_axis(share_XE, self.expert_XS, axis=1)
    per_device = share_XS.reshape(len(share_XS), self.devices, -1).sum(-1)
    return per_device.max(-1) / per_device.mean(-1)

  def slots_of(self, layer: int, expert: int) -> list[int]:
    """Where the copies of an expert are."""
    return np.flatnonzero(self.expert_XS[layer] == expert).tolist()


def place(
  load_XE: np.ndarray,
  *,
  slots: int,
  devices: int,
  nodes: int = 1,
  groups: int = 1,
) -> Placement:
  """Copies and their places for the load of every layer's experts.

  Args:
    load_XE: tokens that each expert took, or any measure of it.
    slots: experts on all devices, copies included: a multiple of `devices`.
    devices: of the unit that serves, a multiple of `nodes`.
    nodes: with fast links within.
    groups: of experts, for routing limited to groups. A multiple of the nodes
      makes it hierarchical; else copies lie anywhere.

  Raises:
    ValueError: numbers that do not divide, or fewer slots than experts.

  >>> place(np.array([[8, 1, 1]]), slots=4, devices=2).expert_XS.tolist()
  [[0, 1, 0, 2]]
  """
  load_XE = np.asarray(load_XE)
  n_experts = load_XE.shape[1]
  for name, whole, part in (
    ("slots", slots, devices),
    ("devices", devices, nodes),
    ("experts", n_experts, groups),
  ):
    if whole % part:
      raise ValueError(
        f"eplb: {name}: found {whole}, wanted a multiple of {part}"
      )
  if slots < n_experts:
    raise ValueError(f"eplb: slots: found {slots}, wanted {n_experts} or more")
  if groups % nodes:
    nodes = groups = 1
  rows = [_layer(load_E, slots, devices, nodes, groups) for load_E in load_XE]
  expert_XS = np.array(rows)
  copies = [np.bincount(row, minlength=n_experts) for row in rows]
  return Placement(expert_XS, np.array(copies), devices)


def _layer(load_E, slots: int, devices: int, nodes: int, groups: int):
  """Experts of all slots: groups to nodes, copies in a node, slots to devices."""
  size = len(load_E) // groups
  experts_of = np.arange(len(load_E)).reshape(groups, size)
  found = []
  for of_node in pack(load_E.reshape(groups, size).sum(1), nodes):
    experts = experts_of[of_node].ravel()
    copied = copy(load_E[experts], slots // nodes)
    copies = np.bincount(copied, minlength=len(experts))
    share = (load_E[experts] / copies)[copied]
    for of_device in pack(share, devices // nodes):
      found.extend(experts[copied[of_device]])
  return np.array(found)


def copy(load_E: np.ndarray, slots: int) -> np.ndarray:
  """The expert of every copy: each once, then always the one with most a copy.

  >>> copy(np.array([4, 9, 1]), 5).tolist()
  [0, 1, 2, 1, 1]
  """
  found = list(range(len(load_E)))
  copies = np.ones(len(load_E), np.int64)
  while len(found) < slots:
    busiest = int(np.argmax(load_E / copies))
    found.append(busiest)
    copies[busiest] += 1
  return np.array(found)


def pack(weight: np.ndarray, packs: int) -> list[Sequence[int]]:
  """Things into packs of equal number: the heaviest first, to the lightest pack.

  >>> pack(np.array([1, 5, 4, 2]), 2)
  [[1, 0], [2, 3]]
  """
  room = len(weight) // packs
  if room == 1:
    return [[i] for i in range(packs)]
  found, total = [[] for _ in range(packs)], [0.0] * packs
  for i in np.argsort(-np.asarray(weight, np.float64), kind="stable").tolist():
    open_ = [p for p in range(packs) if len(found[p]) < room]
    lightest = min(open_, key=total.__getitem__)
    found[lightest].append(i)
    total[lightest] += float(weight[i])
  return found

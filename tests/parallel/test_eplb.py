"""Copies of busy experts: DeepSeek's own example, and what must always hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.parallel import eplb

# The example of DeepSeek's EPLB.
LOAD = np.array(
  [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
  ]
)
PLACED = [
  [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
  [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_deepseeks_example():
  found = eplb.place(LOAD, slots=16, devices=8, nodes=2, groups=4)
  assert found.expert_XS.tolist() == PLACED
  assert found.copies_XE.sum(1).tolist() == [16, 16]
  assert found.slots_of(0, 5) == [0, 2]


def test_imbalance_is_of_the_busiest_device():
  found = eplb.place(LOAD, slots=16, devices=8, nodes=2, groups=4)
  for load, placed, ratio in zip(LOAD, PLACED, found.imbalance(LOAD)):
    part = [load[e] / placed.count(e) for e in placed]
    devices = [part[i] + part[i + 1] for i in range(0, 16, 2)]
    assert ratio == pytest.approx(max(devices) / (sum(load) / 8))
  skewed = np.where(
    np.arange(12) == 3, 1000, LOAD
  )  # copies take the most of it
  alone = eplb.place(skewed, slots=12, devices=4)
  copied = eplb.place(skewed, slots=24, devices=4)
  assert (copied.imbalance(skewed) < 0.6 * alone.imbalance(skewed)).all()


def test_groups_stay_on_a_node_where_they_can():
  found = eplb.place(LOAD, slots=16, devices=8, nodes=2, groups=4)
  for row in found.expert_XS:
    groups = [set(half // 3) for half in row.reshape(2, 8)]
    assert not groups[0] & groups[1]
  anywhere = eplb.place(LOAD, slots=16, devices=8, nodes=2, groups=3)
  alone = eplb.place(LOAD, slots=16, devices=8)
  assert anywhere.expert_XS.tolist() == alone.expert_XS.tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_expert_has_a_slot_and_every_device_as_many(data):
  nodes = data.draw(st.sampled_from([1, 2, 4]))
  devices = nodes * data.draw(st.integers(1, 4))
  groups = nodes * data.draw(st.sampled_from([1, 2]))
  experts = groups * data.draw(st.integers(1, 5))
  # A node's slots hold its groups' experts, and are shared out over devices.
  least = -(-experts // devices)
  slots = devices * data.draw(st.integers(least, least + 3))
  load = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
  load_XE = np.array([data.draw(load), data.draw(load)])
  how = dict(slots=slots, devices=devices, nodes=nodes, groups=groups)
  found = eplb.place(load_XE, **how)
  assert found.expert_XS.shape == (2, slots)
  assert (found.copies_XE >= 1).all()
  for row, copies in zip(found.expert_XS, found.copies_XE):
    assert np.bincount(row, minlength=experts).tolist() == copies.tolist()
  assert (found.copies_XE.sum(1) == slots).all()


@pytest.mark.parametrize(
  "numbers, words",
  [
    (dict(slots=15, devices=8), "slots: found 15, wanted a multiple of 8"),
    (dict(slots=8, devices=8), "slots: found 8, wanted 12 or more"),
    (dict(slots=16, devices=8, nodes=3), "devices: found 8, wanted a multip"),
    (dict(slots=16, devices=8, groups=5), "experts: found 12, wanted a mult"),
  ],
)
def test_numbers_that_do_not_divide_are_said(numbers, words):
  with pytest.raises(ValueError, match=words):
    eplb.place(LOAD, **numbers)

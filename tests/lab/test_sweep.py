"""Sweep algebra: which arms come of which sweeps, and in which order."""

import pytest

from dsv3.config import ConfigError
from dsv3.lab import sweep

GATES = sweep.over("model.moe.gate", ["sigmoid", "softmax"])
SPEEDS = sweep.over("schedule.bias_speed", [0.001, 0.01, 0.1])


def test_over_names_an_arm_for_its_key_and_value():
  assert GATES == [
    ("gate=sigmoid", {"model.moe.gate": "sigmoid"}),
    ("gate=softmax", {"model.moe.gate": "softmax"}),
  ]


def test_product_has_every_pair_with_the_last_fastest():
  found = sweep.product(GATES, SPEEDS)
  pairs = [tuple(diff.values()) for _, diff in found]
  assert pairs == [
    (g, s) for g in ("sigmoid", "softmax") for s in (0.001, 0.01, 0.1)
  ]
  assert found[1][0] == "gate=sigmoid,bias_speed=0.01"


def test_zipped_joins_place_by_place_and_wants_equal_lengths():
  found = sweep.zipped(GATES, SPEEDS[:2])
  assert [tuple(diff.values()) for _, diff in found] == [
    ("sigmoid", 0.001),
    ("softmax", 0.01),
  ]
  with pytest.raises(ConfigError, match="2, 3 arms, wanted equal"):
    sweep.zipped(GATES, SPEEDS)


def test_chain_comes_one_after_the_other():
  assert sweep.chain(GATES, SPEEDS) == GATES + SPEEDS


def test_subsample_keeps_order_and_is_the_same_again():
  whole = sweep.product(GATES, SPEEDS)
  found = sweep.subsample(whole, 4, seed=1)
  assert found == [arm for arm in whole if arm in found] and len(found) == 4
  assert found == sweep.subsample(whole, 4, seed=1)
  assert len({str(sweep.subsample(whole, 4, seed=s)) for s in range(9)}) > 3
  with pytest.raises(ConfigError, match="found 7, wanted 1 to 6"):
    sweep.subsample(whole, 7)


def test_seeds_give_every_arm_under_one_name():
  found = sweep.seeds(GATES, 2)
  assert [(name, diff["train.seed"]) for name, diff in found] == [
    ("gate=sigmoid", 0),
    ("gate=sigmoid", 1),
    ("gate=softmax", 0),
    ("gate=softmax", 1),
  ]
  assert [d["train.seed"] for _, d in sweep.seeds(GATES[:1], [7, 3])] == [7, 3]


def test_a_key_that_two_sweeps_set_is_an_error():
  for join in (sweep.product, sweep.zipped):
    with pytest.raises(ConfigError, match="config.model.moe.gate: set twice"):
      join(GATES, GATES)

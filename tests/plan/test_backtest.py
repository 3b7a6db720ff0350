"""The planner against published speeds; its fits, regenerated."""

import pathlib

import pytest

from dsv3 import config, overlay, plan
from dsv3.plan import anchors, backtest, fitted

PAGE = pathlib.Path(__file__).parents[2] / "experiments/plan/README.md"
DEEPSEEK = anchors.TRAINING[0]
COUNTED = [a for a in anchors.TRAINING if a.role != "superseded"]
label = lambda a: f"{a.name}, {a.precision}"


@pytest.mark.parametrize("anchor", COUNTED, ids=label)
def test_step_time_of_published_runs(anchor):
  limit = 0.15 if anchor.role == "fitted" else 0.25
  assert abs(backtest.error(anchor)) <= limit


def test_six_runs_are_fitted_and_all_others_held_out():
  roles = [a.role for a in anchors.TRAINING]
  assert roles.count("fitted") == len(backtest.fit()) == 6
  assert roles.count("held out") >= 9
  # What is superseded was beaten, on the same chips and precision.
  for old in anchors.TRAINING:
    if old.role == "superseded":
      same = [
        a.tokens
        for a in COUNTED
        if (a.chip, a.chips, a.precision)
        == (old.chip, old.chips, old.precision)
      ]
      assert max(same) > old.tokens


def test_fitted_numbers_are_those_a_fit_gives():
  assert backtest.fit() == {
    k: v for k, v in fitted.SHARE.items() if k[0] != "cpu"
  }
  assert backtest.spread() == {
    k: v for k, v in fitted.SPREAD.items() if k[0] != "cpu"
  }
  assert backtest.fit_serving() == (fitted.SERVED, fitted.LAYER)
  assert backtest.serving_spread() == fitted.SERVED_SPREAD


def test_tables_of_the_experiment_are_what_the_planner_says():
  text = PAGE.read_text()
  for table in (
    backtest.table(),
    backtest.headline(),
    backtest.terms(),
    backtest.hours_table(),
    backtest.serving_table(),
  ):
    assert table in text, "run python -m dsv3.plan.backtest and put it there"


def test_table1_cost_of_pre_training():
  """2664K H800 hours, 5.328M dollars (Table 1); 19.926 s a step (2505.09343)."""
  found = plan.of(config.build(overlay.load("v3_671b")), preset="train2048")
  hours = found.chip_hours[1]
  assert hours == pytest.approx(2.664e6, rel=0.01)
  assert hours * found.price == pytest.approx(5.328e6, rel=0.01)
  assert found.step.step_seconds == pytest.approx(19.926, rel=0.01)
  # MFU there is without MTP's FLOPs: 385 TFLOPS, 38.94%, causal.
  rate = found.step.tokens_chip * 250.45e9
  assert rate / 1e12 == pytest.approx(385, rel=0.01)
  low, expected, high = found.chip_hours
  assert low < expected < high

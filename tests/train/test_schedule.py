"""The schedules of Sec. 4.2 against the oracle, and for runs of any length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3 import config, overlay
from dsv3.train import schedule
from tests import micro
from tests.oracle import schedule as oracle

T = 10**12


@functools.cache
def paper() -> schedule.Schedule:
  return schedule.make(config.build(overlay.load("v3_671b")))


@functools.cache
def hyper():
  return jax.jit(paper().__call__)


def step_at(tokens: float) -> int:
  """The first step that starts at `tokens` or later."""
  low, high = 0, paper().steps
  while low < high:
    middle = (low + high) // 2
    low, high = (
      (low, middle) if paper().tokens(middle) >= tokens else (middle + 1, high)
    )
  return low


@pytest.mark.parametrize(
  "tokens, lr",
  [
    (9.99e12, 2.2e-4),
    (10e12, 2.2e-4),
    (11.075e12, 1.9100e-4),
    (12.15e12, 1.21e-4),
    (13.225e12, 5.0996e-5),
    (14.3001e12, 2.2e-5),
    (14.632e12, 2.2e-5),
    (14.6331e12, 7.3e-6),
    (14.7e12, 7.3e-6),
  ],
)
def test_sec42_learning_rate_at_the_points_of_the_report(tokens, lr):
  step = step_at(tokens)
  found = float(hyper()(step).lr)
  assert found == pytest.approx(lr, rel=1e-4)
  wanted = oracle.learning_rate(step, paper().tokens(step))
  assert found == pytest.approx(wanted, rel=1e-5)


def test_sec42_warm_up_is_linear_over_2000_steps():
  steps = [0, 1, 1000, 1999, 2000, 2001]
  found = [float(hyper()(s).lr) for s in steps]
  wanted = [oracle.learning_rate(s, paper().tokens(s)) for s in steps]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  assert found[:3] == pytest.approx([0, 1.1e-7, 1.1e-4])


@pytest.mark.parametrize(
  "tokens", [0, 5e12, 9.9999e12, 10.0001e12, 14.2999e12, 14.3001e12, 14.79e12]
)
def test_sec42_mtp_weight_and_bias_speed(tokens):
  found = hyper()(step_at(tokens))
  assert float(found.mtp_weight) == pytest.approx(oracle.mtp_weight(tokens))
  assert float(found.bias_speed) == pytest.approx(oracle.bias_speed(tokens))
  assert float(found.balance_weight) == pytest.approx(oracle.BALANCE_WEIGHT)
  assert float(found.z_weight) == 0


def test_a_bias_can_go_on_at_another_speed():
  values = micro.config_of(
    {
      "train.steps": 100,
      "schedule.bias_speed_tokens": 14.8e12 / 2,
      "schedule.bias_speed_late": 0.0003,
    }
  )
  found = jax.vmap(schedule.make(values))(jnp.arange(100)).bias_speed
  np.testing.assert_allclose(found, [0.001] * 50 + [0.0003] * 50)


@pytest.mark.parametrize("tokens", [0, 100e9, 130e9, 240e9, 460e9, 475e9, 9e12])
def test_sec42_batch_climbs_in_stairs_over_469b_tokens(tokens):
  stages = len(paper().sizes) - 1
  found = paper().batch_size(step_at(tokens))
  assert found == oracle.batch_size(tokens, stages)
  assert found in paper().sizes
  assert (paper().sizes[0], paper().sizes[-1]) == (3072, 15360)


def test_sec42_the_run_has_14_8t_tokens():
  run = paper()
  assert abs(run.tokens(run.steps) - 14_800 * 10**9) <= 15360 * 4096
  assert run.tokens(run.steps) > 2**31  # which is why steps are counted


def test_tokens_are_the_exact_sum_of_all_batches():
  run = paper()
  at = [*range(20), *(s + d for s in run.starts[1:] for d in (-1, 0, 1))]
  for step in [*at, run.steps - 1]:
    grown = run.first_sequence(step + 1) - run.first_sequence(step)
    assert grown == run.batch_size(step)
    assert run.tokens(step) == run.first_sequence(step) * 4096
    inside = float(hyper()(step).tokens)  # float32
    assert inside == pytest.approx(run.tokens(step), rel=1e-6)
  before = sum(run.batch_size(s) for s in range(run.starts[1] + 10))
  assert before == run.first_sequence(run.starts[1] + 10)


RAMP = {
  "schedule.batch_size": 20,
  "schedule.batch_size_start": 4,
  "schedule.batch_ramp_stages": 4,
  "schedule.batch_ramp_tokens": 3e12,
  "schedule.warmup_steps": 5,
}


@pytest.mark.parametrize("steps", [200, 397])
def test_share_takes_a_short_run_through_every_stage(steps):
  values = micro.config_of({**RAMP, "train.steps": steps})
  run = schedule.make(values)
  assert run.steps == steps
  assert run.sizes == (4, 8, 12, 16, 20)
  assert run.starts[-1] < steps
  found = jax.vmap(run)(jnp.arange(steps))
  share = np.array([run.tokens(s) for s in range(steps)]) / run.tokens(steps)
  v = values.schedule
  slack = 2 * v.batch_size * values.data.seq_len / run.tokens(steps)
  late = share > 10 / 14.8
  np.testing.assert_allclose(found.mtp_weight, np.where(late, 0.1, 0.3))
  still = share > 14.3 / 14.8
  np.testing.assert_allclose(found.bias_speed, np.where(still, 0, 0.001))
  assert found.lr.max() == pytest.approx(v.lr_peak)
  assert found.lr[-1] == pytest.approx(v.lr_last)
  flat = (np.arange(steps) >= 5) & ~late
  np.testing.assert_allclose(found.lr[flat], v.lr_peak, rtol=1e-6)
  assert (np.diff(found.lr[late]) <= 0).all()
  ramp = run.tokens(run.starts[-1]) / run.tokens(steps)
  assert ramp == pytest.approx(3 / 14.8, abs=3 * slack)


def test_tokens_time_keeps_the_boundaries_of_the_report():
  """A run of 1000 steps by the report's clock never leaves its first stage."""
  values = micro.config_of({"schedule.time": "tokens", "train.steps": 1000})
  found = jax.vmap(schedule.make(values))(jnp.arange(1000))
  assert (found.mtp_weight == np.float32(0.3)).all()
  np.testing.assert_allclose(found.lr[2:], values.schedule.lr_peak, rtol=1e-6)


def test_run_of_so_many_tokens_has_as_many_steps():
  values = micro.config_of({"train.steps": 0, "train.tokens": 12_800.0})
  run = schedule.make(values)
  assert run.steps == 12_800 // (4 * 32)
  last = jax.vmap(run)(jnp.arange(run.steps)).lr[-1]
  assert float(last) == pytest.approx(values.schedule.lr_last)


@pytest.mark.parametrize(
  "name, length, batch", [("32k", 32_768, 1920), ("128k", 131_072, 480)]
)
def test_sec43_stages_of_context_extension(name, length, batch):
  values = config.build(overlay.load(f"v3_671b_{name}"))
  made = schedule.make(values)
  assert (made.steps, values.data.seq_len) == (1000, length)
  assert made.tokens(1) == length * batch == 62_914_560
  for step in (0, 1, 500, 998, 999):
    hyper = made(jnp.int32(step))
    assert float(hyper.lr) == pytest.approx(7.3e-6)
    assert float(hyper.bias_speed) == 0
  rope, before = values.model.rope, paper_values().model.rope
  assert (rope.yarn_factor, before.yarn_factor) == (40.0, 1.0)
  assert (rope.original_len, rope.beta_slow, rope.beta_fast) == (4096, 1, 32)


def paper_values() -> config.Config:
  return config.build(overlay.load("v3_671b"))

"""metrics.jsonl is strict JSON, complete, and without a step twice."""

import json

import numpy as np
import pytest

from dsv3.train.clock import Clock
from dsv3.train.logs import MetricsLog, Progress, duration, read_metrics


def write(folder, steps, start=0):
  log = MetricsLog(folder, start)
  for step in steps:
    log.write(step, {"loss": np.float32(step)})
  log.close()


def test_a_line_is_strict_json_with_null_for_what_is_not_finite(tmp_path):
  log = MetricsLog(tmp_path, 0)
  log.write(
    1,
    {
      "loss": np.float32("nan"),
      "grad_norm": float("inf"),
      "dead_experts": np.int32(3),
      "max_vio_X": np.array([0.5, np.inf], np.float32),
      "load_XE": np.ones((2, 4), np.int32),
    },
  )
  log.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  refuse = lambda name: pytest.fail(f"{name} is no JSON")
  assert json.loads(text, parse_constant=refuse) == {
    "step": 1,
    "loss": None,
    "grad_norm": None,
    "dead_experts": 3,
    "max_vio_X": [0.5, None],
  }


def test_float32_values_come_back_bit_equal(tmp_path):
  values = np.random.default_rng(0).normal(size=100).astype(np.float32)
  log = MetricsLog(tmp_path, 0)
  log.write(1, {"x_X": values})
  log.close()
  found = read_metrics(tmp_path)[0]["x_X"]
  np.testing.assert_array_equal(np.array(found, np.float32), values)


def test_going_on_drops_the_steps_that_come_again(tmp_path):
  write(tmp_path, [1, 2, 3, 4])
  write(tmp_path, [3], start=2)
  assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
  write(tmp_path, [1, 2])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 3, "lo')
  assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
  write(tmp_path, [3], start=2)
  assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_progress_without_a_terminal_is_lines(capsys):
  progress = Progress(0, 20, every_seconds=3600)
  numbers = {"loss": 2.5, "bits_per_byte": 3.25, "tokens_per_second": 12345.6}
  for step in (1, 2, 20):
    progress.show(step, numbers, left=61)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == (
    "step 1/20  loss 2.500  3.250 bits/byte  12,346 tokens/s  1:01 left"
  )
  assert len(lines) == 2 and lines[1].startswith("step 20/20")


def test_clock_counts_neither_the_first_step_nor_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  clock = Clock(started=0.0, limit=100.0, steps=10)
  now[0] = 30.0  # compiled
  clock.tick(1, 8)
  now[0] = 32.0
  clock.tick(2, 8)
  with clock.paused():
    now[0] = 50.0
  now[0] = 52.0
  clock.tick(3, 8)
  assert clock.tokens_per_second() == pytest.approx(4.0)
  assert clock.left(3) == pytest.approx(14.0)
  assert clock.left(-1000) == pytest.approx(48.0)  # the limit comes first
  now[0] = 99.0
  assert not clock.is_over()
  now[0] = 100.0
  assert clock.is_over()


def test_duration_reads_as_a_clock():
  assert [duration(s) for s in (0, 59, 61, 3723)] == [
    "0:00",
    "0:59",
    "1:01",
    "1:02:03",
  ]

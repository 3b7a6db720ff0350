"""results.jsonl: no line lost, none in pieces, the last one of a run counts."""

import json
import subprocess
import sys

import pytest

from dsv3.config import ConfigError
from dsv3.lab import results, summary
from dsv3.lab.process import environment

LINE = {"id": "a", "seed": 0, "error": None}


WRITER = """
import pathlib, sys
from dsv3.lab import results
path, writer = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for i in range(50):
  line = {"id": "a", "seed": 100 * writer + i, "text": "x" * 9000}
  results.append(path, line)
"""


def test_writers_at_once_lose_no_line(tmp_path):
  path = tmp_path / "results.jsonl"
  path.write_text(
    '{"id": "a", "seed": 9999, "err'
  )  # of a writer that was killed
  writers = [
    subprocess.Popen(
      [sys.executable, "-c", WRITER, str(path), str(w)], env=environment(1)
    )
    for w in range(4)
  ]
  assert [writer.wait() for writer in writers] == [0] * 4
  found = results.read(path)
  assert {seed for _, seed in found} == {
    100 * w + i for w in range(4) for i in range(50)
  }
  assert all(len(line["text"]) == 9000 for line in found.values())
  assert path.read_text().count("\n") == 201  # and the one in pieces


def test_the_last_line_of_a_run_counts(tmp_path):
  path = tmp_path / "results.jsonl"
  assert results.read(path) == {}
  for error in ("out of memory", None):
    results.append(path, LINE | {"error": error})
  assert results.read(path) == {("a", 0): LINE}


def test_lines_of_something_else_are_an_error(tmp_path):
  path = tmp_path / "results.jsonl"
  path.write_text('{"tokens_per_second": 3}\n')
  with pytest.raises(ConfigError, match="results.jsonl:1: found no id"):
    results.read(path)


def test_a_curve_keeps_every_step_up_to_a_thousand_and_means_beyond():
  steps = [
    {"step": s, "loss/main": float(s), "max_vio": 0.123456}
    for s in range(1, 1001)
  ]
  found = summary.curve(steps)
  assert found["step"] == list(range(1, 1001))
  assert found["loss/main"] == [float(s) for s in range(1, 1001)]
  assert set(found["max_vio"]) == {0.1235}
  more = [{"step": s, "loss/main": float(s)} for s in range(1, 2502)]
  found = summary.curve(more)
  assert found["step"][:2] == [3, 6] and found["step"][-1] == 2501
  assert found["loss/main"][:2] == [2.0, 5.0]  # means of 1-3 and 4-6
  assert "max_vio" not in found and len(found["step"]) <= 1000
  more[4]["loss/main"] = None
  assert summary.curve(more)["loss/main"][:2] == [2.0, None]


def test_a_line_has_the_processor_and_its_cores(tmp_path):
  device = {"platform": "cpu", "kind": "cpu", "count": 1}
  cpu = {"model": "AMD EPYC 7B13", "cores": 2}
  start = {"device": device | {"machine": "Linux-6.1"} | cpu}
  (tmp_path / "starts.jsonl").write_text(json.dumps(start))
  assert summary._origin(tmp_path)["device"] == device | cpu

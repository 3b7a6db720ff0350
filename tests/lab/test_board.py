"""The progress table, as a terminal is sent it."""

import io
import json
import re

import pytest
from rich.console import Console

from dsv3.lab import board
from tests.lab import trial

STEP = {"step": 2, "loss/main": 4.5678, "max_vio": 0.25, "batch_tokens": 128}


@pytest.fixture
def place(tmp_path):
  return trial.write(tmp_path)


def frame(place, monkeypatch, height) -> list[str]:
  """The last table of a sweep: a run at work, one failed, one done, one waits."""
  sent = io.StringIO()
  terminal = Console(
    force_terminal=True, file=sent, width=120, height=height, color_system=None
  )
  monkeypatch.setattr(board, "Console", lambda **_: terminal)
  runs = trial.load(place).runs  # a-s0, b-s0, a-s1, b-s1
  metrics = place / "b-s1" / "metrics.jsonl"
  metrics.parent.mkdir()
  with board.Board(runs, {}) as shown:
    shown.refresh()
    for run in (runs[0], runs[1], runs[3]):
      shown.started(run, place / str(run))
    line = {"error": None, "wall_seconds": 75.0, "final": {"loss": 4.25}}
    shown.ended(runs[0], line)
    shown.ended(runs[1], line | {"error": "no luck (exit 1)"})
    shown.refresh()
    step = json.dumps(STEP | {"tokens_per_second": 64.0})
    metrics.write_text(f"{step}\n{step[:9]}")  # the next is being written
  text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sent.getvalue())
  rows = [row.strip() for row in re.split(r"[\r\n]+", text)]
  rows = [row for row in rows if row]
  heads = [i for i, row in enumerate(rows) if row.startswith("run ")]
  assert len(heads) > 2  # drawn again and again
  return rows[heads[-1] :]


def test_a_terminal_shows_runs_of_all_states_in_one_table(place, monkeypatch):
  head, *rows, error, counts = frame(place, monkeypatch, height=20)
  assert (
    head.split() == "run state step loss held-out MaxVio tokens/s left".split()
  )
  assert [row.split() for row in rows] == [
    ["b-s1", "running", "2/8", "4.5678", "0.25", "64", "0:12"],
    ["b-s0", "failed"],
    ["a-s0", "done", "4.2500", "in", "1:15"],
    ["a-s1", "waiting"],
  ]
  for name, value in {"loss": "4.5678", "held-out": "4.2500"}.items():
    row = next(row for row in rows if value in row)
    assert row.index(value) + len(value) == head.index(name) + len(name)
  assert error == "b-s0: no luck (exit 1)"
  assert counts == "1 running, 1 failed, 1 done, 1 waiting"


def test_where_a_terminal_is_low_what_waits_is_left_out_first(
  place, monkeypatch
):
  _, *rows, error, counts = frame(place, monkeypatch, height=7)
  assert [row.split()[0] for row in rows] == ["b-s1", "b-s0", "a-s0"]
  assert error.startswith("b-s0: ") and counts.endswith("1 waiting")

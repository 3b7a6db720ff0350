"""Steps of a run once more: the same to the bit, or with a knob changed."""

import json

import pytest

from dsv3 import cli
from dsv3.config import ConfigError
from dsv3.lab import replay
from dsv3.train import loop
from dsv3.train.logs import read_metrics
from tests import micro


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("replay")
  diff = {
    **micro.write_corpus(folder),
    "train.steps": 8,
    "train.checkpoint_every": 2,
    "train.checkpoints_kept": 4,
    "train.final_eval_batches": 0,
    "train.eval_batches": 0,
  }
  loop.train(micro.config_of(diff), folder / "run")
  return folder / "run"


def test_without_a_change_it_is_the_run_to_the_bit(run):
  found = list(replay.replay(run, 4, 4))
  logged = {row["step"]: row for row in read_metrics(run)}
  assert [row["step"] for row in found] == [5, 6, 7, 8]
  for row in found:
    for name in ("loss", "loss/main", "grad_norm", "max_vio", "lr"):
      assert row[name] == logged[row["step"]][name], (row["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "diff",
  [
    {"schedule.bias_speed": 0.1},
    *(
      pytest.param(diff, marks=pytest.mark.slow)  # another program each
      for diff in (
        {"model.moe.balancing": "none"},
        {"model.precision.recipe": "deepseek_v3"},
        {"optimizer.clip_norm": 1e-3},
      )
    ),
  ],
  ids=str,
)
def test_a_knob_changes_what_follows_and_not_the_batches(run, diff):
  plain, changed = (list(replay.replay(run, 4, 3, d)) for d in ({}, diff))
  assert changed[0]["batch_tokens"] == plain[0]["batch_tokens"]
  assert changed[-1]["loss/main"] != plain[-1]["loss/main"]
  assert changed[0]["loss/main"] == pytest.approx(
    plain[0]["loss/main"], rel=0.01
  )


@pytest.mark.parametrize(
  "first, steps, diff, words",
  [
    (3, 2, {}, "there are 2, 4, 6, 8"),
    (4, 5, {}, "wanted at most 4"),
    (4, 2, {"data.seq_len": 16}, "config.data.seq_len: decides which rows"),
    (4, 2, {"model.dim": 64}, "does not fit the changed config"),
    (4, 2, {"train.seed": 1}, "decides which rows"),
  ],
)
def test_what_is_no_replay_is_said(run, first, steps, diff, words):
  with pytest.raises(ConfigError, match=words):
    list(replay.replay(run, first, steps, diff))


def test_command_shows_both_and_writes_them_down(run, capsys):
  words = ["replay", str(run), "--from=4", "--steps=2"]
  assert cli.main([*words, "--diff", "schedule.bias_speed=0.1"]) == 0
  said = capsys.readouterr().out
  assert " -> " in said and "max_vio" in said
  (path,) = (run / "replays").iterdir()
  head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert head == {"diff": {"schedule.bias_speed": 0.1}, "from": 4}
  assert [row["step"] for row in rows] == [5, 6]
  assert rows[0]["run"]["loss"] > 0

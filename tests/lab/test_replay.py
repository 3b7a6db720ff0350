"""Steps of a run once more: the same to the bit, or with a knob changed."""

import json

import numpy as np
import pytest

from dsv3 import cli
from dsv3.config import ConfigError
from dsv3.lab import frozen, replay
from dsv3.train import loop
from dsv3.train.logs import read_metrics
from tests import micro

# From step 6 on the rate is 50 times as high: a spike in steps 7 and 8.
SPIKE = {
  "schedule.lr_peak": 0.02,
  "schedule.lr_last": 1.0,
  "schedule.lr_last_tokens": 14.8e12 * 3 / 8,
}


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
    **SPIKE,
  }
  loop.train(micro.config_of(diff), folder / "run")
  return folder / "run"


def test_without_a_change_it_is_the_run_to_the_bit(run):
  found = list(replay.replay(run, 4, 4))
  assert [row["step"] for row in found] == [5, 6, 7, 8]
  is_of_run(found, run)
  assert found[3]["loss"] > found[2]["loss"] > 2 * found[1]["loss"]  # the spike


def is_of_run(found, run):
  logged = {row["step"]: row for row in read_metrics(run)}
  for row in found:
    for name in ("loss", "loss/main", "grad_norm", "max_vio", "bias_max", "lr"):
      assert row[name] == logged[row["step"]][name], (row["step"], name)


def test_a_spike_comes_again_when_its_own_routing_is_frozen(run, tmp_path):
  path = tmp_path / "trace.npz"
  recorded = list(replay.replay(run, 4, 4, record=path))
  is_of_run(recorded, run)
  assert [row["misrecorded"] for row in recorded] == [0] * 4
  assert frozen.load(path, range(5, 9))[8].experts_BXLK.shape == (4, 3, 32, 2)
  is_of_run(list(replay.replay(run, 4, 4, frozen=path)), run)


@pytest.mark.slow
def test_a_spike_under_the_routing_of_a_calm_replay_is_another(
  run, tmp_path, capsys
):
  """On the same batches and from the same state: by the routing alone."""
  path, same = tmp_path / "calm.npz", {"batch_tokens", "lr"}
  words = ["replay", str(run), "--from=4", "--steps=4"]
  calm_lr = ["--diff", "schedule.lr_last=1e-4"]
  assert cli.main([*words, f"--record={path}", *calm_lr]) == 0
  assert "0 choices not those of the steps" in capsys.readouterr().out
  out = tmp_path / "frozen.jsonl"
  assert cli.main([*words, f"--frozen={path}", f"--out={out}"]) == 0
  head, *rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert head == {"diff": {}, "from": 4, "frozen": str(path)}
  assert len(rows) == 4
  for step, row in enumerate(rows, 5):
    assert all(row["replay"][name] == row["run"][name] for name in same)
    # Until the rate differs the calm choices are the run's own.
    alike = row["replay"]["loss"] == row["run"]["loss"]
    assert alike == (step < 7), step
  assert rows[2]["replay"]["loss"] > 2 * rows[1]["replay"]["loss"]


@pytest.mark.slow
def test_frozen_choices_go_to_their_microbatch_and_through_recomputation(
  tmp_path,
):
  diff = {
    **micro.write_corpus(tmp_path),
    **SPIKE,
    "train.microbatches": 2,
    "model.remat": "full",
    "model.moe.balancing": "bias+batch",
    "model.mtp.depth": 2,
    "train.final_eval_batches": 0,
    "train.eval_batches": 0,
  }
  loop.train(micro.config_of(diff), tmp_path / "run")
  path = tmp_path / "trace.npz"
  is_of_run(
    replay.replay(tmp_path / "run", 6, 2, record=path), tmp_path / "run"
  )
  is_of_run(
    replay.replay(tmp_path / "run", 6, 2, frozen=path), tmp_path / "run"
  )


@pytest.mark.parametrize(
  "changed, words",
  [
    ({}, "step 5: tokens_BL: found other rows"),
    ({"n_routed": 8}, "n_routed: found 8, wanted 4"),
    (
      {"experts_BXLK": np.zeros((8, 3, 32, 2), np.int32)},
      r"experts_BXLK: found \(8, 3, 32, 2\), wanted \(4, 3, 32, 2\)",
    ),
  ],
  ids=["rows", "model", "shape"],
)
def test_a_trace_of_other_rows_or_another_model_is_refused(
  run, tmp_path, changed, words
):
  zeros = np.zeros((4, 3, 32, 2), np.int32)
  choices = frozen.Choices(zeros, zeros[:, 0, :, 0], 4)._replace(**changed)
  path = tmp_path / "trace.npz"
  frozen.save(path, {5: choices})
  with pytest.raises(ConfigError, match=words):
    list(replay.replay(run, 4, 1, frozen=path))


def test_a_trace_without_the_steps_is_refused(tmp_path):
  frozen.save(tmp_path / "a.npz", {5: frozen.Choices(*np.zeros((3, 1)))})
  with pytest.raises(ConfigError, match=r"found steps \[5\], wanted 6 too"):
    frozen.load(tmp_path / "a.npz", range(5, 8))
  (tmp_path / "b.npz").write_bytes(b"no")
  with pytest.raises(ConfigError, match="no trace of steps"):
    frozen.load(tmp_path / "b.npz", range(5, 8))


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

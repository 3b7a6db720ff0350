"""A run: resumed as never stopped, stopped on request, intact when it fails."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3 import cli
from dsv3.config import ConfigError
from dsv3.data import tokenizer
from dsv3.train import feed, loop, program, schedule
from dsv3.train.checkpoint import Checkpoints
from dsv3.train.logs import read_metrics
from dsv3.train.restore import restore
from tests import micro
from tests.train.test_checkpoint import damage

# Orbax's reads of a damaged file fail a second time when they are collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)
STEPS = 16
SPEED = ("tokens_per_second", "model_flops")  # what may differ between runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  written = micro.write_corpus(tmp_path_factory.mktemp("corpus"))
  return {
    **written,
    "train.steps": STEPS,
    "train.checkpoint_every": 4,
    "train.ema_decay": 0.5,
    "train.ema_place": "host",
  }


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
  """The folder of a run that never stopped."""
  workdir = tmp_path_factory.mktemp("runs") / "straight"
  outcome = loop.train(micro.config_of(corpus), str(workdir))
  assert (outcome.step, outcome.steps) == (STEPS, STEPS)
  assert outcome.signum is None
  return workdir


def numbers(workdir: pathlib.Path) -> list[dict]:
  """All that was logged, without the speed; equal means bit-equal."""
  return [
    {k: v for k, v in line.items() if k not in SPEED}
    for line in read_metrics(workdir)
  ]


def test_every_step_is_logged_once_with_what_matters(straight):
  lines = numbers(straight)
  steps = [line for line in lines if "loss" in line]
  assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
  wanted = "loss/main loss/mtp_1 loss/sequence bits_per_byte grad_norm max_vio"
  wanted += " dead_experts bias_min bias_max lr tokens skipped"
  assert set(wanted.split()) <= set(steps[0])
  assert len(steps[0]["max_vio_X"]) == 3
  assert steps[-1]["tokens"] == STEPS * 4 * 32
  assert steps[-1]["loss"] < steps[0]["loss"]
  *scores, final = (line for line in lines if "loss" not in line)
  assert [s["step"] for s in scores] == [4, 8, 12, 16]  # what was saved
  heldout = scores[-1]
  assert heldout["heldout/bytes"] <= heldout["heldout/tokens"] == 2 * 4 * 32
  assert final["step"] == STEPS
  assert final["heldout_final/loss"] == heldout["heldout/loss"]  # as many rows
  assert list((straight / "tensorboard").iterdir())


def command(config: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  words = [sys.executable, "-m", "dsv3", "train"]
  return [*words, f"--config={config}", f"--workdir={workdir}"]


def start(config, workdir):
  root = pathlib.Path(loop.__file__).parents[2]
  return subprocess.Popen(
    command(config, workdir),
    cwd=root,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for_steps(process, workdir, n: int) -> None:
  """Returns when `n` steps are logged, or the process has ended."""
  while process.poll() is None and len(read_metrics(workdir)) < n:
    time.sleep(0.005)


@pytest.mark.slow  # six starts
def test_killed_at_any_instant_a_run_resumes_to_bit_equal_numbers(
  corpus, straight, tmp_path
):
  """While it starts, while it steps and saves, while it starts again, ..."""
  config = micro.write_config(tmp_path / "micro.py", corpus)
  workdir, outcomes = tmp_path / "run", []
  for n, seconds, signum in (  # after n lines of this process, and seconds
    (0, 1.5, signal.SIGKILL),
    (3, 0.0, signal.SIGKILL),
    (0, 2.5, signal.SIGKILL),
    (2, 0.02, signal.SIGKILL),
    (1, 0.0, signal.SIGTERM),
    (99, 0.0, None),
  ):
    before = len(read_metrics(workdir))
    process = start(config, workdir)
    wait_for_steps(process, workdir, before + n)
    time.sleep(seconds)
    if signum and process.poll() is None:
      process.send_signal(signum)
    said = process.communicate(timeout=120)[0]
    outcomes.append(process.returncode)
    if process.returncode == 128 + signal.SIGTERM:
      assert "SIGTERM: stopped after step" in said
      done = read_metrics(workdir)[-1]["step"]
      assert Checkpoints(workdir / "checkpoints").steps[-1] == done
    else:
      assert process.returncode in (0, -signal.SIGKILL), said
  assert outcomes[:2] == [-signal.SIGKILL] * 2, outcomes
  assert process.returncode == 0, said
  assert numbers(workdir) == numbers(straight)
  resumed, whole = (restore(d, ema=True).params for d in (workdir, straight))
  assert jax.tree.all(jax.tree.map(np.array_equal, resumed, whole))


def test_a_signal_while_processes_agree_is_met_after_the_next_step(
  corpus, tmp_path, monkeypatch
):
  """That is while all wait for a step: nearly always, where steps are long."""
  said = []

  def largest(number):
    said.append(number)
    if len(said) == 2:  # the first is the step that is restored
      os.kill(os.getpid(), signal.SIGTERM)
    return number

  monkeypatch.setattr(loop.processes, "largest", largest)
  outcome = loop.train(micro.config_of(corpus), tmp_path / "run")
  assert (outcome.signum, outcome.step, outcome.saved) == (signal.SIGTERM, 2, 2)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_more(
  corpus, straight, tmp_path, capsys
):
  workdir = shutil.copytree(straight, tmp_path / "run")
  damage(workdir / "checkpoints" / str(STEPS))
  loop.train(micro.config_of(corpus), workdir)
  assert numbers(workdir) == numbers(straight)
  said = capsys.readouterr()
  assert "damaged checkpoint" in said.out + said.err
  assert f"goes on after step {STEPS - 4}" in said.err
  assert (workdir / "damaged" / str(STEPS)).is_dir()


@pytest.mark.parametrize("content", ["", "{", "\0\0"])
def test_a_damaged_score_of_a_checkpoint_is_set_aside(
  content, corpus, straight, tmp_path, capsys
):
  workdir = shutil.copytree(straight, tmp_path / "run")
  newest = workdir / "checkpoints" / str(STEPS)
  (newest / "metrics" / "metrics").write_text(content)
  assert restore(workdir).step == STEPS  # reading needs no scores
  loop.train(micro.config_of(corpus), workdir)
  assert f"damaged checkpoint: {newest}" in capsys.readouterr().out
  assert numbers(workdir) == numbers(straight)


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_changed(
  corpus, straight, tmp_path
):
  workdir = shutil.copytree(straight, tmp_path / "run")
  before = (workdir / "config.json").read_bytes()
  with pytest.raises(ConfigError) as caught:
    loop.train(micro.config_of({**corpus, "train.steps": 2}), workdir)
  assert f"found 2, wanted at least {STEPS}" in str(caught.value)
  assert (workdir / "config.json").read_bytes() == before
  # The exception, which keeps the frames of the failed start, frees the folder.
  assert loop.train(micro.config_of(corpus), workdir).step == STEPS


def test_checkpoints_without_their_config_and_another_tokenizer_are_refused(
  corpus, straight, tmp_path, monkeypatch
):
  workdir = shutil.copytree(straight, tmp_path / "run")
  (workdir / "config.json").unlink()
  with pytest.raises(ConfigError, match="without their config.json"):
    loop.train(micro.config_of(corpus), workdir)
  workdir = shutil.copytree(straight, tmp_path / "again")
  monkeypatch.setattr(tokenizer.Bytes, "digest", "another")
  with pytest.raises(ConfigError, match="found digest another, wanted"):
    loop.train(micro.config_of(corpus), workdir)


def poison(monkeypatch, steps):
  """Makes the gradients of some steps, counted from 1, not finite."""
  real = program.train_step

  def step(state, batch, **kwargs):
    bad = jnp.isin(state.step + 1, jnp.array(steps))
    spoil = lambda p: jnp.where(bad, jnp.nan, p)
    after, metrics = real(
      state.replace(params=jax.tree.map(spoil, state.params)), batch, **kwargs
    )
    # Weights as they were: it is a gradient that is spoilt, not the state.
    keep = lambda old, new: jnp.where(bad, old, new)
    params = jax.tree.map(keep, state.params, after.params)
    return after.replace(params=params), metrics

  monkeypatch.setattr(program, "train_step", step)


def test_a_run_recovers_or_stops_with_the_last_good_checkpoint_intact(
  corpus, tmp_path, monkeypatch, capsys
):
  poison(monkeypatch, [3, 4, 5, 10, 11, 12, 13, 14])
  values = micro.config_of({**corpus, "train.max_skipped": 3})
  with pytest.raises(loop.RunFailed) as caught:
    loop.train(values, tmp_path)
  assert "train.max_skipped = 3" in str(caught.value)
  assert "the last is of step 8" in str(caught.value)
  assert capsys.readouterr().err.count("not finite") == 3 + 4
  lines = [x for x in numbers(tmp_path) if "loss" in x]
  assert [x["skipped"] for x in lines] == [0, 0, 1, 2, 3, *[0] * 4, 1, 2, 3]
  assert [lines[i]["skipped_total"] for i in (1, 4, 8, 11)] == [0, 3, 3, 6]
  assert lines[2]["loss"] is None and lines[5]["loss"] is not None
  # Not of step 4 and 12, in the midst of what was left out.
  assert Checkpoints(tmp_path / "checkpoints").steps == [8]
  assert restore(tmp_path).step == 8


def test_the_time_limit_ends_a_run_with_an_evaluation_and_a_checkpoint(
  corpus, tmp_path
):
  values = micro.config_of({**corpus, "train.max_minutes": 1e-6})
  outcome = loop.train(values, tmp_path)
  assert (outcome.step, outcome.signum) == (1, None)
  assert outcome.score.bits_per_byte > 0
  assert Checkpoints(tmp_path / "checkpoints").steps == [1]


@pytest.mark.slow
def test_host_average_of_a_run_is_the_device_average(
  corpus, straight, tmp_path
):
  device = micro.config_of({**corpus, "train.ema_place": "device"})
  loop.train(device, tmp_path)
  averages = [restore(d, ema=True).params for d in (straight, tmp_path)]
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, *averages)
  plain = restore(straight).params
  assert not np.array_equal(plain["head"][...], averages[0]["head"][...])


@pytest.mark.slow  # four starts
def test_a_stop_amid_left_out_updates_says_what_is_saved(
  corpus, tmp_path, monkeypatch, capsys
):
  poison(monkeypatch, [6, 7, 8])
  diff = {**corpus, "train.steps": 7, "train.max_skipped": 9}
  config = micro.write_config(tmp_path / "micro.py", diff)
  workdir = tmp_path / "run"
  words = ["train", f"--config={config}", f"--workdir={workdir}"]
  assert cli.main(words) == 0
  assert Checkpoints(workdir / "checkpoints").steps == [4]
  monkeypatch.setattr(loop.Interrupts, "signum", signal.SIGTERM)
  assert cli.main([*words, "--config.train.steps=9"]) == 128 + signal.SIGTERM
  said = capsys.readouterr().out
  assert "SIGTERM: stopped after step 5; go on" in said  # saved, like any stop
  assert cli.main([*words, "--config.train.steps=9"]) == 128 + signal.SIGTERM
  said = capsys.readouterr().out
  assert "stopped after step 6 (its updates were being left out; saved" in said
  assert "saved is step 5)" in said


@pytest.mark.slow  # a run of its own
def test_a_run_without_a_checkpoint_ends_without_a_sample(
  corpus, tmp_path, monkeypatch, capsys
):
  poison(monkeypatch, [1, 2])
  config = micro.write_config(tmp_path / "m.py", {**corpus, "train.steps": 2})
  words = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  assert cli.main(words) == 0
  assert "no checkpoint: the last updates were left out" in (
    capsys.readouterr().out
  )


@pytest.mark.slow  # two runs of its own
def test_a_longer_run_says_how_its_schedule_stretches(
  corpus, straight, tmp_path, capsys
):
  workdir = shutil.copytree(straight, tmp_path / "run")
  more = micro.config_of({**corpus, "train.steps": STEPS + 1})
  before = schedule.make(micro.config_of(corpus))(STEPS).lr
  after = schedule.make(more)(STEPS).lr
  loop.train(more, workdir)
  said = capsys.readouterr().err
  assert f"learning rate goes from {before:.2e} to {after:.2e}" in said


@pytest.mark.slow  # four starts
def test_other_text_than_before_is_noticed(corpus, straight, tmp_path, capsys):
  """Same source, documents and lengths: the digest tells."""
  folder = shutil.copytree(corpus["data.sources"][0], tmp_path / "text")
  diff = {**corpus, "data.sources": (str(folder),)}
  workdir = tmp_path / "run"
  loop.train(micro.config_of({**diff, "train.steps": 4}), workdir)
  assert cli.main(["eval", f"--workdir={workdir}"]) == 0
  assert "corpus:" not in capsys.readouterr().err
  file = sorted(folder.iterdir())[0]
  text = file.read_text()
  file.write_text(("b" if text[0] == "a" else "a") + text[1:])
  assert cli.main(["eval", f"--workdir={workdir}"]) == 0
  assert "corpus: found" in capsys.readouterr().err
  loop.train(micro.config_of({**diff, "train.steps": 5}), workdir)
  assert "from here on the run reads other text" in capsys.readouterr().out


def test_what_is_unsaved_for_long_is_saved_whatever_the_step(corpus, tmp_path):
  """A step may take minutes, and a thousand of them days."""
  diff = {"train.steps": 2, "train.checkpoint_every": 1000}
  diff |= {"train.checkpoint_minutes": 1e-6, "train.checkpoints_kept": 2}
  workdir = tmp_path / "run"
  loop.train(micro.config_of({**corpus, **diff}), workdir)
  assert Checkpoints(workdir / "checkpoints", read_only=True).steps == [1, 2]
  scored = [x for x in read_metrics(workdir) if "heldout/loss" in x]
  assert [x["step"] for x in scored] == [2]  # the last, whatever the clock says


@pytest.mark.parametrize(
  "signum, is_over, minutes, wanted",
  [
    (None, False, 29, (None, False, False)),
    (None, False, 31, (None, False, True)),
    (None, True, 29, (None, True, False)),
    (signal.SIGTERM, False, 29, (signal.SIGTERM, False, False)),
  ],
)
def test_what_one_process_wishes_all_do(
  signum, is_over, minutes, wanted, monkeypatch
):
  """The other one has no wish."""
  monkeypatch.setattr(loop.processes, "largest", lambda mine: max(mine, 0))
  values = micro.config_of({"train.checkpoint_minutes": 30.0})
  clock = types.SimpleNamespace(
    is_over=lambda: is_over, unsaved_minutes=lambda: minutes
  )
  trainer = types.SimpleNamespace(values=values)
  wish = types.SimpleNamespace(signum=signum)
  assert loop._Trainer._agreed(trainer, wish, clock) == wanted


def test_processes_that_see_other_checkpoints_do_not_begin(
  corpus, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop.processes, "largest", lambda mine: mine + 4)
  monkeypatch.setattr(Checkpoints, "restore_newest", lambda *_, **__: None)
  with pytest.raises(ConfigError, match="finds step 0 and another a later one"):
    loop.train(micro.config_of(corpus), tmp_path / "run")


class Asked:
  """In the place of Batches: remembers which rows were asked for."""

  def __init__(self):
    self.rows_asked = []

  def rows(self, first, count):
    self.rows_asked += range(first, first + count)
    x_BL = np.zeros((count, 4), np.int32)
    return feed.batches.Batch(x_BL, np.zeros((count, 2, 4), np.int32), x_BL)


def test_no_row_is_read_twice_or_lost_when_a_batch_ramp_moves():
  """More steps move the stairs of a ramp that is a share of the run."""
  ramp = {
    "schedule.batch_size_start": 2,
    "schedule.batch_size": 8,
    "schedule.batch_ramp_tokens": 7e12,
    "schedule.batch_ramp_stages": 3,
  }
  short = schedule.make(micro.config_of({**ramp, "train.steps": 20}))
  long = schedule.make(micro.config_of({**ramp, "train.steps": 60}))
  asked, stopped = Asked(), 10
  before = feed.training(asked, short, 0, 0)
  for _ in range(stopped):
    next(before)
  read = short.first_sequence(stopped)
  assert read != long.first_sequence(stopped)
  ahead = read - long.first_sequence(stopped)
  list(feed.training(asked, long, stopped, ahead))
  assert asked.rows_asked == list(range(len(asked.rows_asked)))


def test_an_error_before_the_first_step_waits_for_orbax(tmp_path, monkeypatch):
  """What clears the folder up meanwhile would raise as the process ends."""
  closed, close = [], loop.Checkpoints.close
  record = lambda self: (closed.append(self), close(self))
  monkeypatch.setattr(loop.Checkpoints, "close", record)
  diff = {**micro.write_corpus(tmp_path), "train.start_from": "nowhere"}
  with pytest.raises(ConfigError, match="start_from: nowhere"):
    loop.train(micro.config_of(diff), tmp_path / "run")
  assert len(closed) == 1

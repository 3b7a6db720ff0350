"""The launcher: runs once each, resumed, recorded, whatever one of them does."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsv3 import cli, config, overlay
from dsv3.commands import compare
from dsv3.lab import local, process, table
from dsv3.lab.board import Board
from dsv3.train import logs
from dsv3.train import run as run_folder
from tests import micro
from tests.lab import trial


@pytest.fixture
def place(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(local, "POLL_SECONDS", 0.01)
  return trial.write(tmp_path)


def launch(place, **kwargs):
  """Runs what has no result; returns the launcher and its board."""
  asked = trial.load(place)
  runs, known = local.left(asked, asked.runs, retry=kwargs.get("retry", False))
  board = Board(asked.runs, known)
  launcher = local.Local(asked, place.parents[1] / "runs", board, **kwargs)
  launcher.run(runs)
  return launcher, board


def counts(place) -> dict[str, int]:
  """How often each run folder was trained in."""
  found = (place.parents[1] / "runs").glob("*/count")
  return {path.parent.name: len(path.read_text()) for path in found}


def test_each_run_is_trained_once_and_has_a_line(place, monkeypatch, capsys):
  monkeypatch.setattr(process, "command", trial.command("train"))
  _, board = launch(place, jobs=2)
  assert board.count("done") == 4
  wanted = {"a-s0": 1, "a-s1": 1, "b-s0": 1, "b-s1": 1}
  assert counts(place) == wanted
  line = next(
    x for x in trial.lines(place) if (x["name"], x["seed"]) == ("b", 1)
  )
  assert line["diff"] == {"schedule.lr_peak": 0.002}
  assert (line["error"], line["base"], line["starts"]) == (None, "base", 1)
  assert (line["steps"], line["tokens"]) == (8, 1024)
  assert line["commit"] == "c" * 40 and line["dirty"] is False
  assert (line["final"]["loss"], line["best"]["loss"]) == (4.4, 4.5)
  assert line["final"]["max_vio"] == 0.2
  assert line["curve"]["step"] == list(range(1, 9)) and line["wall_seconds"] > 0
  assert "held-out loss 4.4" in capsys.readouterr().out
  _, board = launch(place)  # nothing is left
  assert board.count("done") == 4 and counts(place) == wanted


MEASURE = """
def measure(workdir):
  import pathlib
  if "b-s1" in str(workdir):
    raise RuntimeError("no such thing")
  if "a-s1" in str(workdir):
    return {"length": float("nan")}
  return {"length": len(pathlib.Path(workdir, "metrics.jsonl").read_text())}

def answer(lines, folder):
  (folder / "own.txt").write_text(" ".join(lines))
  return [f"{len(lines['a'])} lengths: {lines['a'][0]['final']['length']}"]
"""


def test_an_experiment_measures_and_answers_more(place, monkeypatch, capsys):
  monkeypatch.setattr(process, "command", trial.command("train"))
  trial.write(place.parents[1], trial.SWEEP + MEASURE)
  _, board = launch(place, jobs=2)
  assert (board.count("done"), board.count("failed")) == (2, 2)
  found = {(x["name"], x["seed"]): x for x in trial.lines(place)}
  assert found["a", 0]["final"]["length"] > 100
  assert found["a", 0]["final"]["loss"] == 4.4
  assert "no such thing (exit 1)" in found["b", 1]["error"]
  assert "wanted a finite number" in found["a", 1]["error"]
  capsys.readouterr()
  assert cli.main(["compare", str(place)]) == 0
  assert "1 lengths: " in capsys.readouterr().out
  assert (place / "own.txt").read_text() == "a b"


@pytest.mark.parametrize(
  "behaviour, error",
  [("fail", "no luck (exit 1)"), ("die", "killed by SIGKILL: out of memory?")],
)
def test_a_run_that_fails_is_recorded_and_stops_no_other(
  place, monkeypatch, behaviour, error
):
  monkeypatch.setattr(process, "command", trial.command(behaviour))
  _, board = launch(place)
  assert (board.count("failed"), board.count("done")) == (2, 2)
  found = {(x["name"], x["seed"]): x["error"] for x in trial.lines(place)}
  assert found == {
    ("a", 0): error,
    ("a", 1): error,
    ("b", 0): None,
    ("b", 1): None,
  }
  _, board = launch(place)
  assert board.count("failed") == 2 and counts(place)["a-s0"] == 1
  monkeypatch.setattr(process, "command", trial.command("train"))
  _, board = launch(place, retry=True)
  assert board.count("done") == 4
  assert counts(place) == {"a-s0": 2, "a-s1": 2, "b-s0": 1, "b-s1": 1}


def test_a_run_that_another_sweep_has_is_left_to_it(place, monkeypatch):
  monkeypatch.setattr(process, "command", trial.command("train"))
  runs = trial.load(place).runs
  held = process.claim(runs[0], place.parents[1] / "runs")
  _, board = launch(place)
  assert board.count("elsewhere") == 1 and board.count("done") == 3
  assert "a-s0" not in counts(place)
  held.close()
  _, board = launch(place)
  assert board.count("done") == 4


def test_a_run_that_ended_elsewhere_meanwhile_is_not_run_again(
  place, monkeypatch
):
  monkeypatch.setattr(process, "command", trial.command("train"))
  asked = trial.load(place)
  board = Board(asked.runs, {})
  launch(place)  # another sweep, after this one has read the results
  late = local.Local(asked, place.parents[1] / "runs", board)
  late.run(asked.runs)
  assert board.count("done") == 4
  assert set(counts(place).values()) == {1} and len(trial.lines(place)) == 4


def test_a_claim_outlives_a_launcher_whose_run_goes_on(place, monkeypatch):
  """The process inherits it: a second sweep must not train beside it."""
  monkeypatch.setattr(process, "command", trial.command("wait"))
  asked, runs = trial.load(place), place.parents[1] / "runs"
  run = asked.runs[0]
  held = process.claim(run, runs)
  orphan = process.Process(asked, run, runs, held, 1)
  held.close()  # as when the launcher is killed
  while not list(runs.glob("*/ready")):
    time.sleep(0.01)
  assert process.claim(run, runs) is None
  orphan.ask_to_stop(1)
  assert orphan.settle() is None
  assert process.claim(run, runs) is not None


@pytest.fixture
def heeded():
  """SIGINT as a terminal sends it: a job in the background ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_a_signal_stops_the_runs_and_records_none_of_them(
  place, monkeypatch, heeded
):
  monkeypatch.setattr(process, "command", trial.command("wait"))

  def interrupt():
    while not list((place.parents[1] / "runs").glob("*/ready")):
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=interrupt).start()
  launcher, board = launch(place)
  assert launcher.signum == signal.SIGINT
  assert (board.count("stopped"), board.count("waiting")) == (1, 3)
  assert not (place / "results.jsonl").exists()
  monkeypatch.setattr(process, "command", trial.command("train"))
  _, board = launch(place)
  assert board.count("done") == 4
  line = trial.lines(place)[0]
  assert (line["name"], line["error"]) == ("a", None)


def test_a_signal_that_is_ignored_stays_so(place):
  """As SIGHUP under nohup: the sweep goes on when the terminal has gone."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    asked = trial.load(place)
    launcher = local.Local(asked, place / "runs", Board(asked.runs, {}))
    with launcher._signals():
      os.kill(os.getpid(), signal.SIGHUP)
    assert launcher.signum is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_longer_run_takes_a_folder_of_its_own(place):
  """It must not go on from the shorter one: its schedule is another."""
  runs = place.parents[1] / "runs"
  short = trial.load(place).runs[0]
  folder = process.folder_of(short, runs)
  assert folder == runs / "a-s0"
  run_folder.record(folder, short.values, run_folder.Given())
  assert process.folder_of(short, runs) == folder  # it goes on
  long = trial.load(place, "train.steps=99").runs[0]
  assert process.folder_of(long, runs) == runs / f"a-s0-{long.id}"
  logged = trial.load(place, "train.log_every=3").runs[0]
  assert process.folder_of(logged, runs) == folder


def test_a_command_line_gives_the_very_config_of_the_run(place):
  tuples = {"data.sources": ("a b.txt", "c.txt"), "data.weights": (1.0, 0.25)}
  text = "BASE = 'base'\ndef runs(): yield 'c', " + repr(
    tuples | {"train.seed": 3, "data.mask_documents": True, "data.cache": ""}
  )
  trial.write(place.parents[1], text)
  asked = trial.load(place)
  words = process.command(asked, asked.runs[0], place / "run")
  assert words[1:4] == ["-m", "dsv3", "train"]
  _, overrides = cli._split_overrides(words[3:])
  values = config.build(overlay.load(asked.base, overrides))
  assert values == asked.runs[0].values


def test_sweep_trains_records_and_resumes_for_real(
  tmp_path, monkeypatch, capsys
):
  """Through `dsv3 sweep` and `dsv3 train`: a run that was cut goes on."""
  monkeypatch.chdir(tmp_path)
  place = trial.write(tmp_path)
  micro.write_config(place / "base.py", micro.write_corpus(tmp_path))
  assert cli.main(["sweep", str(place), "--list"]) == 0
  said = capsys.readouterr().out.splitlines()
  assert said[2].split() == ["1", "b-s0", "to", "run", "schedule.lr_peak=0.002"]
  assert cli.main(["sweep", str(place), "--index=1"]) == 0
  line = trial.lines(place)[0]
  assert (line["name"], line["seed"], line["error"]) == ("b", 0, None)
  assert line["steps"] == 8 and line["tokens"] == 8 * 4 * 32
  assert 2 < line["final"]["loss"] < 6 and line["final"]["max_vio"] >= 0
  assert len(line["curve"]["loss/main"]) == 8
  assert line["versions"]["jax"] and line["device"]["platform"] == "cpu"
  assert line["flops"] > line["tokens"] * line["active_parameters"]
  # As if the sweep had been killed after the run and before its line.
  (place / "results.jsonl").unlink()
  assert cli.main(["sweep", str(place), "--index=1"]) == 0
  again = trial.lines(place)[0]
  assert again["final"] == line["final"] and again["curve"] == line["curve"]
  assert again["starts"] == 2
  assert again["wall_seconds"] > line["wall_seconds"]  # of both starts
  assert "1: b-s0" not in capsys.readouterr().out
  assert cli.main(["sweep", str(place), "--index=4"]) == 2
  assert "wanted 0 to 3" in capsys.readouterr().err


@pytest.mark.parametrize("baseline", ["b", "a"])
def test_a_sweep_ends_in_the_table_and_the_page_whatever_has_failed(
  baseline, place, monkeypatch, capsys
):
  """One arm fails, of the other there is a table: its baseline or not."""
  monkeypatch.setattr(process, "command", trial.command("fail"))
  (place / "sweep.py").write_text(
    f'{trial.SWEEP}BASELINE = "{baseline}"\nMETRICS = ["loss", "los"]\n'
    "def answer(lines, folder):\n  return [lines['c']]\n"
  )
  assert cli.main(["sweep", str(place)]) == 1
  said = capsys.readouterr().out
  assert "no luck" in said and "b    2  4.4000" in said
  assert ("Of a there is no result: minus b." in said) == (baseline == "a")
  assert "--metric=los: found in no result" in said
  assert "answer() of q/sweep.py failed: KeyError: 'c'" in said
  assert (place / "compare.html").read_text().count("failed: no luck") == 2


def test_the_list_and_the_runs_are_those_that_are_named(
  place, monkeypatch, capsys
):
  """By names with commas too, as `product` makes them."""
  monkeypatch.setattr(process, "command", trial.command("train"))
  sweep = trial.SWEEP.replace('"b":', '"x=1,y=2":')
  (place / "sweep.py").write_text(sweep)
  assert cli.main(["sweep", str(place), "--only=x=1,y=2,a-s0"]) == 0
  capsys.readouterr()
  for word, wanted in (
    ("--only=a", ["0 a-s0 done", "2 a-s1 to run"]),
    ("--only=x=1,y=2-s1,a-s0", ["0 a-s0 done", "3 x=1,y=2-s1 done"]),
    ("--index=2", ["2 a-s1 to run"]),
  ):
    assert cli.main(["sweep", str(place), word, "--list"]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    rows = [" ".join(row.split()).partition(" schedule")[0] for row in rows]
    assert rows == wanted
  assert cli.main(["sweep", str(place), "--only=a", "--index=2"]) == 2
  assert "--index: found beside --only" in capsys.readouterr().err


def test_the_process_that_ends_the_last_run_writes_table_and_page(
  place, monkeypatch, capsys
):
  """As jobs of Slurm do, of which none has all runs."""
  monkeypatch.setattr(process, "command", trial.command("train"))
  page, readme = place / "compare.html", place / "README.md"
  readme.write_text(f"# Why\n{table.BEGIN}\n{table.END}\n")
  for only in ("a", "b-s0"):
    assert cli.main(["sweep", str(place), f"--only={only}"]) == 0
    assert not page.exists() and "| arm |" not in readme.read_text()
  assert cli.main(["sweep", str(place), "--only=b-s1"]) == 0
  assert "| b | 2 | 4.4000 |" in readme.read_text()
  assert "curves.png" in capsys.readouterr().out
  page.unlink()
  assert cli.main(["sweep", str(place), "--only=b-s1"]) == 0
  assert not page.exists()  # nothing has ended here
  assert cli.main(["sweep", str(place)]) == 0
  assert page.exists()


def test_two_that_end_at_once_write_one_after_the_other(place, monkeypatch):
  monkeypatch.setattr(process, "command", trial.command("train"))
  order, alone = [], process.alone(place.parents[1] / "runs" / "q")
  monkeypatch.setattr(compare, "_answer", lambda *_, **__: order.append("ours"))

  def write():
    with alone:
      holds.set()
      while kept.read_text().count("\n") < 4:
        time.sleep(0.01)
      time.sleep(1)
      order.append("theirs")

  kept, holds = place / "results.jsonl", threading.Event()
  kept.touch()
  other = threading.Thread(target=write)
  other.start()
  holds.wait()
  assert cli.main(["sweep", str(place)]) == 0
  other.join()
  assert order == ["theirs", "ours"]


@pytest.mark.slow
def test_a_sweep_that_was_cut_goes_on_to_the_same_curve(tmp_path):
  """SIGTERM to `dsv3 sweep` itself, in the middle of a run that trains."""
  few = {"train__steps": 400, "train__checkpoint_every": 20}
  diff = trial.trains(tmp_path) | few

  def sweep(name):
    folder = tmp_path / name
    words = [sys.executable, "-m", "dsv3", "sweep", folder / "experiments/q"]
    words += ["--only=a-s0", f"--runs={folder / 'runs'}"]
    return subprocess.Popen(words, env=process.environment(1))

  place, run = trial.write(tmp_path / "cut", **diff), tmp_path / "cut/runs/a-s0"
  first = sweep("cut")
  while not list(run.glob("checkpoints/[1-9]*/meta/metadata")):
    assert first.poll() is None
    time.sleep(0.01)
  first.send_signal(signal.SIGTERM)
  assert first.wait(timeout=300) == 128 + signal.SIGTERM
  assert not (place / "results.jsonl").exists()
  cut_at = logs.read_metrics(run)[-1]["step"]
  assert 20 <= cut_at < 400
  assert sweep("cut").wait(timeout=300) == 0
  (cut,) = trial.lines(place)
  assert f"goes on after step {cut_at}" in (run / "log.txt").read_text()

  place = trial.write(tmp_path / "whole", **diff)
  assert sweep("whole").wait(timeout=300) == 0
  (whole,) = trial.lines(place)
  assert (cut["starts"], whole["starts"]) == (2, 1)
  assert cut["steps"] == 400 and len(cut["curve"]["loss/main"]) == 400
  for part in ("id", "curve", "heldout", "final", "tokens"):
    assert cut[part] == whole[part], part

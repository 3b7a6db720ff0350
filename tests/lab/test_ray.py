"""Tasks of a real Ray cluster, on this machine."""

import sys
import time

import pytest

from dsv3 import cli
from dsv3.config import ConfigError
from dsv3.lab import ray_cluster
from dsv3.lab.process import environment
from tests.lab import trial

ray = pytest.importorskip("ray", reason="an optional extra: dsv3[ray]")


@pytest.fixture(scope="module")
def cluster():
  ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
  yield ray
  ray.shutdown()


def test_a_task_claims_its_run_and_writes_its_line(
  cluster, tmp_path, monkeypatch, capsys
):
  """A real task, whose run ends at once: its text is not there."""
  monkeypatch.chdir(tmp_path)
  place = trial.write(tmp_path, data__sources=("nowhere/text.txt",))
  words = [str(place), "--runs=runs/q", "--launcher=ray", "--only=b-s1"]
  assert cli.main(["sweep", *words, "--ray=num_cpus=1"]) == 1
  (line,) = trial.lines(place)
  assert (line["name"], line["seed"]) == ("b", 1)
  assert "nowhere/text.txt" in line["error"]
  said = capsys.readouterr().out
  assert "b-s1: failed config.data.sources: nowhere/text.txt" in said


def test_a_task_trains_its_run_to_the_end(cluster, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  place = trial.write(tmp_path, **trial.trains(tmp_path))
  words = [str(place), "--runs=runs/q", "--launcher=ray", "--only=b-s1"]
  assert cli.main(["sweep", *words, "--ray=num_cpus=1"]) == 0
  trial.assert_trained(place, ("b", 1))


def test_a_task_has_the_devices_that_the_cluster_gave_it(cluster, tmp_path):
  """Ray says by a variable of the task's process which GPUs are its own."""
  asked = {**environment(1), "CUDA_VISIBLE_DEVICES": "0,1", "FLAG": "7"}
  words = "import os, sys; e = os.environ; sys.exit(e['CUDA_VISIBLE_DEVICES']"
  words += " + e['FLAG'] != '37')"
  place = {"env_vars": {"CUDA_VISIBLE_DEVICES": "3"}}
  task = cluster.remote(ray_cluster.on_node).options(runtime_env=place)
  stop = str(tmp_path / "stop")
  command = [sys.executable, "-c", words]
  assert ray.get(task.remote(command, asked, str(tmp_path), stop)) == 0


@pytest.mark.slow  # a run to its first checkpoint
def test_a_task_that_is_asked_to_stop_has_its_command_save(cluster, tmp_path):
  program = """if True:
    import pathlib, signal, sys, time
    def save(*_):
      pathlib.Path("saved").touch()
      sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    pathlib.Path("ready").touch()
    time.sleep(60)
  """
  sweep = trial.load(trial.write(tmp_path))
  reference = cluster.remote(ray_cluster.on_node).remote(
    [sys.executable, "-c", program],
    environment(1),
    str(tmp_path),
    str(tmp_path / "stop"),
  )
  of = sweep, sweep.runs[0], tmp_path / "run", tmp_path / "stop"
  task = ray_cluster.Task(cluster, reference, *of)
  _wait_for(tmp_path / "ready")
  assert not task.is_over
  task.ask_to_stop(1)
  _wait_for(tmp_path / "saved")
  assert task.settle() is None  # it can go on
  assert task.is_over and not (tmp_path / "stop").exists()
  (tmp_path / "stop").touch()  # one that has not begun yet does not begin
  words = ["false"], environment(1), str(tmp_path), str(tmp_path / "stop")
  assert ray_cluster.on_node(*words) == 143


def test_a_node_that_is_lost_is_told_and_leaves_no_line(cluster, tmp_path):
  sweep = trial.load(trial.write(tmp_path))
  lost = cluster.remote(max_retries=0)(lambda: __import__("os")._exit(1))
  of = sweep, sweep.runs[0], tmp_path / "run", tmp_path / "stop"
  task = ray_cluster.Task(cluster, lost.remote(), *of)
  line = task.settle()
  assert line["error"].startswith("no result: ")
  assert not sweep.results.exists()


def test_what_ray_does_not_know_is_one_line(cluster, tmp_path, capsys):
  place = trial.write(tmp_path)
  words = ["sweep", str(place), "--launcher=ray", "--ray=gpus=2"]
  assert cli.main(words) == 2
  said = capsys.readouterr().err
  assert said.startswith("dsv3: error: --ray: ") and said.count("\n") == 1


def test_without_a_cluster_the_error_says_how_to_have_one(monkeypatch):
  def nowhere(*args, **kwargs):
    raise ConnectionError("Could not find any running Ray instance.")

  monkeypatch.setattr(ray, "init", nowhere)
  monkeypatch.setattr(ray, "is_initialized", lambda: False)
  with pytest.raises(ConfigError, match="no cluster at auto.*ray start --head"):
    ray_cluster.connect("auto")


def _wait_for(path):
  limit = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < limit, path
    time.sleep(0.1)

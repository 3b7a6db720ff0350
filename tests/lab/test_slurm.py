"""Array jobs: on submitit's executor of local processes, and Slurm where it is."""

import subprocess
import sys

import pytest

# Here and not in a test that captures: it resets all log handlers as it is
# imported, and absl's closes the stream that pytest has put in stderr's place.
import submitit  # noqa: F401

from dsv3 import cli
from dsv3.commands import sweep
from dsv3.config import ConfigError
from dsv3.lab import process, slurm
from dsv3.lab.process import environment
from tests.lab import trial


@pytest.fixture
def submitted(tmp_path, monkeypatch):
  """Hands in run 3 of a sweep, whose runs have a diff; folder and exit code."""
  monkeypatch.chdir(tmp_path)
  for name, value in environment(1).items():  # as where dsv3 is installed
    monkeypatch.setenv(name, value)

  def submit(**diff):
    place = trial.write(tmp_path, **diff)
    (job,) = slurm.submit(
      [
        process.of_one([str(place), "--runs=runs/q"], trial.load(place).runs[3])
      ],
      tmp_path / "slurm",
      name="q",
      at_once=2,
      parameters={"timeout_min": 5},
      cluster="local",
    )
    return place, job.result()

  return submit


def test_a_job_claims_its_run_and_writes_its_line(submitted):
  """A real job, whose run ends at once: its text is not there."""
  place, code = submitted(data__sources=("nowhere/text.txt",))
  assert code == 1
  (line,) = trial.lines(place)
  run = trial.load(place).runs[3]
  assert (line["name"], line["seed"], line["id"]) == ("b", 1, run.id)
  assert "nowhere/text.txt" in line["error"]


def skip_without_slurm():
  """Its commands may be there, and no controller that answers them."""
  try:
    said = subprocess.run(
      ["scontrol", "ping"], capture_output=True, text=True, timeout=5
    ).stdout
  except (FileNotFoundError, subprocess.TimeoutExpired) as error:
    pytest.skip(f"no Slurm: {error}")
  if "is UP" not in said:
    pytest.skip("no Slurm: no controller answers")


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_sweep_is_handed_in_and_trains(
  cluster, tmp_path, monkeypatch, capsys
):
  """As from the command line; the runs are of one arm, an array of two jobs."""
  if cluster == "slurm":
    skip_without_slurm()
  monkeypatch.chdir(tmp_path)
  for name, value in environment(1).items():
    monkeypatch.setenv(name, value)
  place, jobs = trial.write(tmp_path, **trial.trains(tmp_path)), []

  def submit(*args, submit=slurm.submit, **how):
    jobs.extend(submit(*args, **how, cluster=cluster))
    return jobs

  monkeypatch.setattr(slurm, "submit", submit)
  words = ["sweep", str(place), "--launcher=slurm", "--only=b"]
  assert cli.main([*words, "--slurm=timeout_min=5"]) == 0
  said = capsys.readouterr().out
  assert "2 jobs, 2 at once" in said and f"{jobs[0].job_id}  b-s0" in said
  assert [job.result() for job in jobs] == [0, 0]
  trial.assert_trained(place, ("b", 0), ("b", 1))
  capsys.readouterr()
  assert cli.main(words) == 0
  assert "nothing is left to run" in capsys.readouterr().out


def test_a_job_that_is_cut_is_asked_for_again():
  job = slurm.Job(["true"], environment(1))
  assert job.checkpoint().function is job
  assert job() == 0


def test_a_job_has_the_gpus_and_the_number_of_its_node(monkeypatch):
  """And all else, with the same dsv3, as where it was asked for."""
  asked = {"PYTHONPATH": "ours", "CUDA_VISIBLE_DEVICES": "0,1", "FLAG": "7"}
  has = {"CUDA_VISIBLE_DEVICES": "3", "SLURM_JOB_ID": "12", "PYTHONPATH": "no"}
  wanted = {**has, "PYTHONPATH": "ours", "FLAG": "7"}
  for name, value in has.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv("FLAG", raising=False)
  program = f"import os; assert {wanted!r}.items() <= os.environ.items()"
  assert slurm.Job([sys.executable, "-c", program], asked)() == 0


def test_what_slurm_does_not_know_is_one_line(tmp_path, monkeypatch, capsys):
  with pytest.raises(ConfigError, match="--launcher=slurm: .*minutes"):
    slurm.submit(
      [["true"]],
      tmp_path,
      name="q",
      at_once=1,
      parameters={"minutes": 5},
      cluster="local",
    )
  place = trial.write(tmp_path)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
  assert cli.main(["sweep", str(place), "--launcher=slurm"]) == 2
  said = capsys.readouterr().err
  assert said.startswith("dsv3: error: --launcher=slurm: ")
  assert said.count("\n") == 1


def test_what_sbatch_refuses_is_one_line(tmp_path, monkeypatch, capfd):
  place, tools = trial.write(tmp_path), tmp_path / "tools"
  tools.mkdir()
  said = "sbatch: a word of the cluster\nsbatch: error: invalid partition: no\n"
  for name in ("sbatch", "srun"):
    (tools / name).write_text(f"#!/bin/sh\nprintf '{said}' >&2\nexit 1\n")
    (tools / name).chmod(0o755)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PATH", str(tools), prepend=":")
  words = ["sweep", str(place), "--launcher=slurm"]
  for more in ([], ["--index=0"]):  # an array, and one job
    assert cli.main([*words, *more, "--slurm=slurm_partition=no"]) == 2
    assert capfd.readouterr().err == (
      "dsv3: error: --launcher=slurm: sbatch: error: invalid partition: no\n"
    )


def test_only_takes_arms_and_runs(tmp_path):
  place = trial.write(tmp_path)
  asked = trial.load(place)
  chosen = lambda *only: [
    str(run) for run in sweep._chosen(asked, None, ",".join(only))
  ]
  assert chosen() == ["a-s0", "b-s0", "a-s1", "b-s1"]
  assert chosen("b") == ["b-s0", "b-s1"]
  assert chosen("b-s1", "a-s0") == ["a-s0", "b-s1"]
  assert chosen(f"{asked.runs[0].id}-s1") == ["a-s1"]
  with pytest.raises(ConfigError, match="found c, wanted an arm"):
    chosen("c")

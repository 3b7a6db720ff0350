"""Scripts of `dsv3 launch`: their syntax, their checks, and bash's for real."""

import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dsv3 import cli, config, overlay
from dsv3.config import ConfigError
from dsv3.lab import launch
from tests import micro

WORDS = ["dsv3", "train", "--config=it's.py", "--config.data.sources=a b"]
NEEDED = {
  "slurm": {},
  "local": {},
  "gke": {"image": "here/dsv3:1", "claim": "runs"},
  "tpu-vm": {"zone": "z", "type": "v5p-16", "share": "10.0.0.2:/runs"},
}


def script(engine, words=WORDS, nodes=2, devices=4, options=None, **diff):
  values = micro.config_of({"mesh.data": -1, "schedule.batch_size": 8,
    "schedule.batch_size_start": 8, **diff})  # fmt: skip
  options = {**NEEDED[engine], **(options or {})}
  more = dict(workdir="runs/micro", options=options)
  return launch.script(
    engine, values, words, nodes=nodes, devices=devices, **more
  )


@pytest.mark.parametrize("engine", ["slurm", "local", "tpu-vm"])
def test_bash_can_read_it(engine, tmp_path):
  path = tmp_path / "script.sh"
  path.write_text(script(engine))
  done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")


def test_slurm_has_a_task_a_gpu_and_a_signal_before_the_end():
  lines = script("slurm", options={"partition": "gpu"}).splitlines()
  asked = {line for line in lines if line.startswith("#SBATCH")}
  wanted = "nodes=2 ntasks-per-node=4 gpus-per-node=4 partition=gpu requeue"
  assert {f"#SBATCH --{word}" for word in wanted.split()} <= asked
  assert "#SBATCH --signal=TERM@300" in asked
  long = script("slurm", options={"grace": "1200"})
  assert "#SBATCH --signal=TERM@1200" in long
  assert not [line for line in lines if "account" in line]
  (run,) = [line for line in lines if line.startswith("srun ")]
  assert run.endswith(
    """train '--config=it'"'"'s.py' '--config.data.sources=a b'"""
  )


@pytest.mark.parametrize(
  "options, limit",
  [
    ({"accelerator": "nvidia-h200-141gb"}, "nvidia.com/gpu"),
    ({"accelerator": "tpu-v5p", "topology": "2x2x2"}, "google.com/tpu"),
  ],
)
def test_a_jobset_has_the_command_word_by_word(options, limit):
  found = yaml.safe_load(script("gke", options=options))
  assert (found["apiVersion"], found["kind"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
  )
  (workers,) = found["spec"]["replicatedJobs"]
  job = workers["template"]["spec"]
  assert (job["parallelism"], job["completions"]) == (2, 2)
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"][: len(WORDS)] == WORDS
  name = found["metadata"]["name"]
  first = f"--coordinator={name}-workers-0-0.{name}:12355"
  assert first in container["command"]
  assert container["resources"]["limits"] == {limit: 4}
  volumes = {volume["name"] for volume in pod["volumes"]}
  assert {m["name"] for m in container["volumeMounts"]} == volumes
  assert options["accelerator"] in pod["nodeSelector"].values()


@pytest.mark.parametrize(
  "engine, keywords, words",
  [
    ("slurm", {"options": {"tine": "1"}}, "--set tine.*did you mean time"),
    ("gke", {"options": {"image": launch.REQUIRED}}, "--set image: missing"),
    (
      "tpu-vm",
      {"options": {"type": "v5e-16"}},
      "8 devices in all.*the 16 chips",
    ),
    ("tpu-vm", {"options": {"type": "v5p"}}, "wanted one such as v5p-256"),
    ("gke", {"options": {"topology": "2x2"}}, "wanted the 4 chips of 2x2"),
    ("slurm", {"mesh.data": 4}, "config.mesh: found data=4 of 4 devices"),
    ("slurm", {"mesh.expert": 8}, "config.mesh.expert: found 8, wanted a div"),
    ("slurm", {"nodes": 3}, "config.schedule.batch_size: found 8 sequences"),
  ],
)
def test_what_cannot_be_is_told_before_it_is_handed_in(engine, keywords, words):
  with pytest.raises(ConfigError, match=words):
    script(engine, **keywords)


def test_the_command_writes_and_says_how_to_hand_in(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  words = ["launch", "slurm", "--config=tiny", "--nodes=1"]
  assert cli.main([*words, "--config.train.seed=3"]) == 0
  assert "sbatch runs/tiny.slurm.sh" in capsys.readouterr().out
  text = pathlib.Path("runs/tiny.slurm.sh").read_text()
  assert "--workdir=runs/tiny --config.train.seed=3" in text
  monkeypatch.setenv("PATH", str(tmp_path))
  assert cli.main([*words, "--submit"]) == 2
  assert "found no sbatch" in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_told_with_microbatches_that_do():
  diff = ["mesh.fsdp=8", "mesh.data=1", "train.ema_place=device"]
  tree = overlay.load("v3_16b", diff)
  values = config.build(tree)
  mesh = launch.mesh_of(values, "slurm", 1, None)
  with pytest.raises(ConfigError, match="microbatches: found 1.*wanted 288"):
    launch.forecast(values, mesh, "h200")
  tree = overlay.overlay(tree, {"train.microbatches": 288})
  assert "GB a device" in launch.forecast(config.build(tree), mesh, "h200")


GCLOUD = """#!/bin/bash
echo "$4" >> calls
case "$4" in
  describe) test -e slice && cat slice ;;
  create) echo READY > slice ;;
  delete) rm slice ;;
  scp) tar -tzf "$6" > sent ;;
  ssh) for word in "$@"; do
      case "$word" in --command=*) bash -n -c "${word#--command=}" || exit ;; esac
    done ;;
esac
"""


def test_a_slice_is_made_once_and_sent_the_code_alone(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("setup.py", "runs/tiny/checkpoint", ".venv/bin/python"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  tools = tmp_path / "tools"
  tools.mkdir()
  (tools / "gcloud").write_text(GCLOUD)
  (tools / "gcloud").chmod(0o755)
  monkeypatch.setenv("PATH", str(tools), prepend=":")
  (tmp_path / "script.sh").write_text(script("tpu-vm"))

  def calls():
    (tmp_path / "calls").write_text("")
    subprocess.run(["bash", "script.sh"], check=True)
    return (tmp_path / "calls").read_text().split()

  assert calls() == "describe create scp ssh ssh ssh".split()
  assert calls() == "describe scp ssh ssh ssh".split()
  (tmp_path / "slice").write_text("PREEMPTED")
  assert calls() == "describe delete create scp ssh ssh ssh".split()
  sent = (tmp_path / "sent").read_text().split()
  assert "./setup.py" in sent
  assert not [name for name in sent if "runs" in name or "venv" in name]


STAND_IN = """if True:
  import pathlib, signal, sys, time
  words = dict(word.split("=") for word in sys.argv[1:])
  me, n = words["--process_id"], words["--num_processes"]
  def end(*_):
    pathlib.Path(f"{me}.stopped").touch()
    sys.exit(143)
  signal.signal(signal.SIGTERM, end)
  pathlib.Path(f"{me}.of.{n}").touch()
  if pathlib.Path("fail").exists() and me == "1":
    sys.exit(3)
  if pathlib.Path("wait").exists() or pathlib.Path("fail").exists():
    time.sleep(60)
"""


def started(tmp_path, monkeypatch, behaviour):
  monkeypatch.chdir(tmp_path)
  (tmp_path / behaviour).touch()
  words = [sys.executable, "-c", STAND_IN]
  (tmp_path / "script.sh").write_text(script("local", words, 4, 1))
  return subprocess.Popen(["bash", tmp_path / "script.sh"])


def names(tmp_path, kind):
  return sorted(path.name for path in tmp_path.glob(f"*.{kind}"))


def test_a_local_script_starts_all_and_ends_with_them(tmp_path, monkeypatch):
  assert started(tmp_path, monkeypatch, "end").wait(timeout=60) == 0
  assert names(tmp_path, "of.4") == [f"{i}.of.4" for i in range(4)]


def test_a_process_that_fails_ends_the_others(tmp_path, monkeypatch):
  assert started(tmp_path, monkeypatch, "fail").wait(timeout=60) == 3
  stopped = names(tmp_path, "stopped")
  assert "1.stopped" not in stopped and len(stopped) <= 3


def test_a_signal_goes_to_all(tmp_path, monkeypatch):
  process = started(tmp_path, monkeypatch, "wait")
  limit = time.monotonic() + 60
  while len(names(tmp_path, "of.4")) < 4:
    assert time.monotonic() < limit
    time.sleep(0.05)
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 143
  assert len(names(tmp_path, "stopped")) == 4


def test_the_readmes_runs_can_be(tmp_path, monkeypatch):
  readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
  monkeypatch.chdir(tmp_path)
  found = re.findall(r"^\| \| `dsv3 (launch .*)` \|$", readme, re.MULTILINE)
  assert len(found) == 3
  for line in found:
    words = shlex.split(line)
    assert cli.main(words) == 0, line

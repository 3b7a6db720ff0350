"""Two processes on loopback are one run, and one process can go on with it."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures

import jax
import pytest

from dsv3.config import ConfigError
from dsv3.parallel import presence, processes
from dsv3.train import layout, loop
from dsv3.train.checkpoint import Checkpoints
from dsv3.train.logs import read_metrics
from tests import micro
from tests.train.test_checkpoint import damage

RELATIVE = 1e-5
MESH = {"mesh.data": 2, "mesh.expert": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  written = micro.write_corpus(tmp_path_factory.mktemp("corpus"))
  diff = {
    "train.checkpoint_every": 3,
    "train.eval_batches": 0,
    "train.final_eval_batches": 1,
    "schedule.time": "tokens",  # a run of fewer steps is the same so far
  }
  return {**written, **diff}


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def start(config, workdir, n: int, *words, of_second: str | None = None):
  """`n` processes of a run, with two devices each."""
  flags = re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"])
  flags += " --xla_force_host_platform_device_count=2"
  port = free_port()
  command = [
    *(sys.executable, "-m", "dsv3", "train", "--no_sample"),
    *(f"--config={config}", f"--workdir={workdir}", *words),
    *(f"--coordinator=localhost:{port}", f"--num_processes={n}"),
  ]
  return [
    subprocess.Popen(
      [
        *command,
        f"--process_id={i}",
        *([of_second] if of_second and i else []),
      ],
      env=os.environ | {"XLA_FLAGS": flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(n)
  ]


def finish(started) -> list[str]:
  """What each has said; read side by side, for a full pipe would hold one up."""
  read = lambda process: process.communicate(timeout=400)[0]
  try:
    with futures.ThreadPoolExecutor() as pool:
      return list(pool.map(read, started))
  finally:
    for process in started:
      process.kill()


def lines(workdir):
  return [line for line in read_metrics(workdir) if "loss/main" in line]


@pytest.mark.slow
def test_two_processes_are_one_run_that_one_goes_on_with(corpus, tmp_path):
  config = micro.write_config(
    tmp_path / "c.py", {**corpus, **MESH, "train.steps": 4}
  )
  started = start(config, tmp_path / "two", 2)
  texts = finish(started)
  assert [process.returncode for process in started] == [0, 0], texts
  assert "4 of 4 steps done" in texts[0] and "steps done" not in texts[1]
  more = micro.config_of({**corpus, "mesh.data": 1, "train.steps": 6})
  assert loop.train(more, tmp_path / "two").step == 6
  loop.train(more, tmp_path / "one")
  found, wanted = lines(tmp_path / "two"), lines(tmp_path / "one")
  assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
  for one, other in zip(found, wanted, strict=True):
    for name in ("loss", "bits_per_byte", "grad_norm"):
      assert one[name] == pytest.approx(other[name], rel=RELATIVE), name
    assert one["tokens"] == other["tokens"]
    assert one["max_vio_X"] == other["max_vio_X"]  # of the loads


@pytest.mark.slow
def test_sigterm_to_one_saves_on_all(corpus, tmp_path):
  config = micro.write_config(
    tmp_path / "c.py", {**corpus, **MESH, "train.steps": 100_000}
  )
  started = start(config, tmp_path / "run", 2)
  deadline = time.monotonic() + 300
  while not lines(tmp_path / "run") and time.monotonic() < deadline:
    time.sleep(0.2)
  started[1].send_signal(signal.SIGTERM)
  texts = finish(started)
  code = 128 + signal.SIGTERM
  assert [process.returncode for process in started] == [code, code], texts
  saved = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps
  assert saved and saved[-1] == lines(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_next_start_goes_on(corpus, tmp_path):
  """Of four; with the bound that `presence.GRACE_SECONDS` states."""
  diff = {**corpus, "mesh.data": 4, "mesh.expert": 2, "train.steps": 100_000}
  diff |= {"schedule.batch_size": 8, "schedule.batch_size_start": 8}
  config = micro.write_config(tmp_path / "c.py", diff)
  workdir = tmp_path / "run"
  started = start(config, workdir, 4)
  saved = lambda: Checkpoints(workdir / "checkpoints", read_only=True).steps
  deadline = time.monotonic() + 300
  while not (workdir / "checkpoints").is_dir() or not saved():
    assert time.monotonic() < deadline
    time.sleep(0.2)
  started[2].kill()
  killed = time.monotonic()
  texts = finish(started)
  # None waits for JAX's own heartbeat, wherever it was when the other went.
  assert time.monotonic() - killed < presence.GRACE_SECONDS + 10
  assert all(process.returncode for process in started)
  told = f"process 2 ({socket.gethostname()}, pid {started[2].pid})"
  assert any(told in text for text in texts), texts
  before = saved()[-1]
  again = start(config, workdir, 4, f"--config.train.steps={before + 2}")
  texts = finish(again)
  assert [process.returncode for process in again] == [0] * 4, texts
  assert f"goes on after step {before}" in texts[0]
  assert [x["step"] for x in lines(workdir)] == list(range(1, before + 3))


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_set_aside_once(corpus, tmp_path):
  """Both find it damaged, one moves it, and both go on from the one before."""
  diff = {**corpus, **MESH, "train.steps": 4, "train.checkpoint_every": 1}
  config = micro.write_config(
    tmp_path / "c.py", {**diff, "train.checkpoints_kept": 3}
  )
  workdir = tmp_path / "run"
  started = start(config, workdir, 2)
  texts = finish(started)
  assert [process.returncode for process in started] == [0, 0], texts
  for step in (3, 4):
    damage(workdir / "checkpoints" / str(step))
  again = start(config, workdir, 2)
  texts = finish(again)
  assert [process.returncode for process in again] == [0, 0], texts
  assert "goes on after step 2" in texts[0], texts
  moved = sorted(path.name for path in (workdir / "damaged").iterdir())
  assert moved == ["3", "4"]
  assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 4]


def test_an_error_of_one_at_the_start_ends_all_and_is_named(corpus, tmp_path):
  config = micro.write_config(tmp_path / "c.py", {**corpus, **MESH})
  begin = time.monotonic()
  started = start(
    config, tmp_path / "run", 2, of_second="--config.data.sources=nowhere"
  )
  texts = finish(started)
  assert time.monotonic() - begin < 45  # most of it the start itself
  assert all(process.returncode for process in started)
  assert "nowhere" in texts[1], texts
  assert f"process 1 ({socket.gethostname()}" in texts[0], texts


@pytest.mark.parametrize(
  "given, words",
  [
    (("localhost:1", None, 2), ("--process_id", "missing")),
    ((None, 0, 2), ("--coordinator", "missing")),
    (("localhost:1", 2, 2), ("--process_id", "found 2")),
  ],
)
def test_a_part_of_the_arguments_is_said(given, words):
  with pytest.raises(ConfigError) as error:
    processes.start(*given)
  assert all(word in str(error.value) for word in words)


def test_one_process_reads_all_rows():
  where = layout.of_run(micro.config_of({"mesh.data": 2, "mesh.expert": 2}))
  assert where.share(4) == (0, 4, True)
  assert jax.process_count() == 1


@pytest.mark.slow
def test_a_failed_write_ends_all_and_leaves_the_former_checkpoint(
  corpus, tmp_path
):
  """Of the second process: it may write no more once there is a checkpoint."""
  diff = {**corpus, **MESH, "train.steps": 100_000}
  config = micro.write_config(tmp_path / "c.py", diff)
  folder = tmp_path / "run" / "checkpoints"
  saved = lambda: Checkpoints(folder, read_only=True).steps
  started = start(config, tmp_path / "run", 2)
  deadline = time.monotonic() + 300
  while not (folder.is_dir() and saved()) and time.monotonic() < deadline:
    time.sleep(0.05)
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.prlimit(started[1].pid, resource.RLIMIT_FSIZE, (64, hard))
  limited = time.monotonic()
  texts = finish(started)
  assert time.monotonic() - limited < 60  # a save, and twice the grace
  assert all(process.returncode for process in started)
  assert "dsv3: error: " in texts[1], texts
  assert f"process 1 ({socket.gethostname()}" in texts[0], texts
  newest = saved()[-1]
  more = {**corpus, "mesh.data": 1, "train.steps": newest + 1}
  outcome = loop.train(micro.config_of(more), tmp_path / "run")
  assert outcome.step == newest + 1

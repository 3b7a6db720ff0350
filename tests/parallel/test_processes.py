"""Processes on loopback are one run, and others can go on with it."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dsv3.config import ConfigError
from dsv3.data import batches
from dsv3.nn.transformer import split
from dsv3.parallel import presence, processes
from dsv3.train import feed, layout, loop, schedule
from dsv3.train.checkpoint import Checkpoints
from dsv3.train.logs import read_metrics
from dsv3.train.restore import restore
from dsv3.train.step import Batch
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


def start(
  config,
  workdir,
  n: int,
  *words,
  of_second: str | None = None,
  devices: int = 2,
):
  """`n` processes of a run, with so many devices each."""
  flags = re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"])
  flags += f" --xla_force_host_platform_device_count={devices}"
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


def wait_until(there, seconds: float = 300) -> None:
  deadline = time.monotonic() + seconds
  while not there():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def lines(workdir):
  return [line for line in read_metrics(workdir) if "loss/main" in line]


@pytest.mark.slow
def test_two_processes_are_one_run_that_others_go_on_with(corpus, tmp_path):
  """Eight devices of two processes; then four in another mixture, two, one."""
  corpus = {
    **corpus,
    "schedule.batch_size": 8,
    "schedule.batch_size_start": 8,
    "train.ema_decay": 0.9,
    "train.ema_place": "host",  # of each process what it has
    "train.eval_every": 3,
    "train.eval_batches": 2,
  }
  eight = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2, "train.steps": 3}
  config = micro.write_config(tmp_path / "c.py", {**corpus, **eight})
  started = start(config, tmp_path / "8", 2, devices=4)
  texts = finish(started)
  assert [process.returncode for process in started] == [0, 0], texts
  assert "3 of 3 steps done" in texts[0] and "steps done" not in texts[1]
  on_one = {"mesh.data": 1, "train.steps": 6}
  loop.train(micro.config_of({**corpus, **on_one}), tmp_path / "all of one")
  wanted = lines(tmp_path / "all of one")
  average = average_of(tmp_path / "all of one")
  scores = scores_of(tmp_path / "all of one")
  assert scores[0]["heldout/bytes"] > 0
  others = {
    "4": {"mesh.fsdp": 2, "mesh.tensor": 2},
    "2": {"mesh.data": 1, "mesh.context": 2},
    "1": {},
  }
  begin = f"--config.train.start_from={tmp_path / '8'}"
  started = start(config, tmp_path / "from 8", 2, begin, devices=4)
  texts = finish(started)
  assert [process.returncode for process in started] == [0, 0], texts
  other = {"train.start_from": str(tmp_path / "8"), "train.steps": 3}
  other |= {"mesh.data": 1}
  loop.train(micro.config_of({**corpus, **other}), tmp_path / "one from 8")
  assert_same_lines(lines(tmp_path / "from 8"), lines(tmp_path / "one from 8"))
  for name, mesh in others.items():
    workdir = shutil.copytree(tmp_path / "8", tmp_path / name)
    more = micro.config_of({**corpus, **on_one, **mesh})
    assert loop.train(more, workdir).step == 6
    assert_same_lines(lines(workdir), wanted)
    for one, other in zip(scores_of(workdir), scores, strict=True):
      assert one == pytest.approx(other, rel=RELATIVE)
    for one, other in zip(average_of(workdir), average, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def scores_of(workdir) -> list[dict]:
  """Of held-out text after steps 3 and 6; the first are of who ran first."""
  found = [x for x in read_metrics(workdir) if "heldout/loss" in x]
  assert [x["step"] for x in found] == [3, 6]
  return found


def average_of(workdir) -> list[np.ndarray]:
  """The moving average of the parameters, of the newest checkpoint."""
  params = split(restore(workdir, ema=True).model)[1]
  return list(map(np.asarray, jax.tree.leaves(params)))


def assert_same_lines(found, wanted) -> None:
  """Of as many steps; losses within RELATIVE, loads to the bit."""
  assert [line["step"] for line in found] == [x["step"] for x in wanted]
  for one, other in zip(found, wanted, strict=True):
    for name in ("loss", "bits_per_byte", "grad_norm"):
      assert one[name] == pytest.approx(other[name], rel=RELATIVE), name
    assert one["tokens"] == other["tokens"]
    assert one["max_vio_X"] == other["max_vio_X"]  # of the loads


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_saves_on_all(told, corpus, tmp_path):
  config = micro.write_config(
    tmp_path / "c.py", {**corpus, **MESH, "train.steps": 100_000}
  )
  started = start(config, tmp_path / "run", 2)
  wait_until(lambda: lines(tmp_path / "run"))
  started[told].send_signal(signal.SIGTERM)
  texts = finish(started)
  code = 128 + signal.SIGTERM
  assert [process.returncode for process in started] == [code, code], texts
  saved = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps
  assert saved and saved[-1] == lines(tmp_path / "run")[-1]["step"]


def test_sigterm_while_a_run_starts_ends_it(corpus, tmp_path):
  """There is nothing to save; JAX's own handler would keep it to itself."""
  diff = {**corpus, **MESH, "train.steps": 20}  # soon over if it goes on
  config = micro.write_config(tmp_path / "c.py", diff)
  started = start(config, tmp_path / "run", 2)
  wait_until((tmp_path / "run" / "lock").exists)  # all are there
  started[1].send_signal(signal.SIGTERM)
  texts = finish(started)
  assert [process.returncode for process in started] == [1, -15], texts
  assert f"process 1 ({socket.gethostname()}" in texts[0], texts
  assert not lines(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_process_is_named_and_the_next_start_goes_on(
  victim, corpus, tmp_path
):
  """Of four; with the bound that `presence.GRACE_SECONDS` states.

  The first is the one through which JAX has them find each other: without it JAX
  ends the others, mostly before they are told.
  """
  diff = {**corpus, "mesh.data": 4, "mesh.expert": 2, "train.steps": 100_000}
  diff |= {"schedule.batch_size": 8, "schedule.batch_size_start": 8}
  config = micro.write_config(tmp_path / "c.py", diff)
  workdir = tmp_path / "run"
  started = start(config, workdir, 4)
  saved = lambda: Checkpoints(workdir / "checkpoints", read_only=True).steps
  wait_until(lambda: (workdir / "checkpoints").is_dir() and saved())
  started[victim].kill()
  killed = time.monotonic()
  texts = finish(started)
  # None waits for JAX's own heartbeat, wherever it was when the other went.
  assert time.monotonic() - killed < presence.GRACE_SECONDS + 10
  assert all(process.returncode for process in started)
  told = f"process {victim} ({socket.gethostname()}, pid {started[victim].pid})"
  del texts[victim]
  assert all(told in text for text in texts), texts
  before = saved()[-1]
  again = start(config, workdir, 4, f"--config.train.steps={before + 2}")
  texts = finish(again)
  assert [process.returncode for process in again] == [0] * 4, texts
  assert f"goes on after step {before}" in texts[0]
  assert [x["step"] for x in lines(workdir)] == list(range(1, before + 3))


@pytest.mark.slow
@pytest.mark.parametrize(
  "moment, victim",
  [("starting", 1), ("saving", 0), ("saving", 1), ("scoring", 0)],
)
def test_killed_at_a_bad_moment_it_is_named_and_nothing_is_lost(
  moment, victim, corpus, tmp_path
):
  """Of two; the run is then the one that nobody has cut."""
  diff = {**corpus, "train.steps": 6, "train.checkpoint_every": 1}
  diff |= {"train.eval_every": 1, "train.eval_batches": 2}
  config = micro.write_config(tmp_path / "c.py", {**diff, **MESH})
  workdir = tmp_path / "run"
  there = {
    "starting": (workdir / "lock").exists,
    "saving": lambda: [*workdir.glob("checkpoints/*checkpoint-tmp*")],
    "scoring": lambda: lines(workdir),  # which is before the score
  }[moment]
  started = start(config, workdir, 2)
  wait_until(there)
  started[victim].kill()
  killed = time.monotonic()
  text = finish(started)[1 - victim]
  assert time.monotonic() - killed < presence.GRACE_SECONDS + 10
  told = f"process {victim} ({socket.gethostname()}, pid {started[victim].pid})"
  assert told in text
  again = start(config, workdir, 2)
  texts = finish(again)
  assert [process.returncode for process in again] == [0, 0], texts
  loop.train(micro.config_of({**diff, "mesh.data": 1}), tmp_path / "uncut")
  assert_same_lines(lines(workdir), lines(tmp_path / "uncut"))


@pytest.mark.slow
@pytest.mark.parametrize("seen_by", ["both", "the second"])
def test_a_damaged_newest_checkpoint_is_set_aside_once(
  seen_by, corpus, tmp_path
):
  """One moves it, and both go on from the one before."""
  diff = {**corpus, **MESH, "train.steps": 4, "train.checkpoint_every": 1}
  config = micro.write_config(
    tmp_path / "c.py", {**diff, "train.checkpoints_kept": 3}
  )
  workdir = tmp_path / "run"
  started = start(config, workdir, 2)
  texts = finish(started)
  assert [process.returncode for process in started] == [0, 0], texts
  for step in (3, 4):
    saved = workdir / "checkpoints" / str(step)
    if seen_by == "both":
      damage(saved)
      continue
    written = [*(saved / "params").glob("ocdbt.process_1/d/*")]
    assert written  # what the second wrote, and alone reads again
    for path in written:
      path.write_bytes(b"")
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


@pytest.fixture
def joined(monkeypatch):
  """An environment without any cluster, and what JAX is asked to join."""
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "TPU_", "JOB_", "KUBERNETES_")):
      monkeypatch.delenv(name)
  calls = []
  take = lambda *where, heartbeat_timeout_seconds: calls.append(where)
  monkeypatch.setattr(jax.distributed, "initialize", take)
  return calls


JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}
RANK = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}


@pytest.mark.parametrize(
  "environment, wanted",
  [
    ({}, []),
    ({**JAX, "JAX_PROCESS_ID": "3"}, [("a:1", 4, 3)]),
    ({**JAX, "JOB_COMPLETION_INDEX": "3"}, [("a:1", 4, 3)]),
    ({**RANK, "JAX_COORDINATOR_ADDRESS": "a:1"}, [("a:1", 4, 3)]),
    ({**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, []),
    (RANK, [()]),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "SLURM_STEP_NUM_TASKS": "4"}, [()]),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, []),
    ({"MEGASCALE_NUM_SLICES": "2"}, [()]),
    ({"TPU_PROCESS_ADDRESSES": "a,b"}, [()]),
    ({"TPU_ML_PLATFORM": "JAX"}, [()]),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, []),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"}, []),
    ({"JOB_COMPLETION_INDEX": "1"}, []),  # an array of runs is one, too
  ],
  ids=str,
)
def test_processes_are_those_of_the_environment(
  joined, monkeypatch, environment, wanted
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  processes.start(None, None, None)
  assert joined == wanted
  processes.start(None, None, 1)  # alone wherever it is
  assert joined == wanted


@pytest.mark.parametrize("has_package", [True, False])
def test_a_job_of_kubernetes_is_asked_where_jax_can(
  joined, monkeypatch, has_package
):
  monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
  spec = lambda name: name if has_package else None
  monkeypatch.setattr(processes.importlib.util, "find_spec", spec)
  processes.start(None, None, None)
  assert joined == [()] * has_package


@pytest.mark.parametrize(
  "environment, words",
  [
    ({"JAX_PROCESS_ID": "1"}, ("JAX_COORDINATOR_ADDRESS", "missing")),
    (JAX, ("JAX_PROCESS_ID", "missing")),
    ({**JAX, "JAX_PROCESS_ID": "4"}, ("JAX_PROCESS_ID: found 4", "= 4")),
    ({**JAX, "JAX_PROCESS_ID": "x"}, ("JAX_PROCESS_ID", "found 'x'")),
  ],
  ids=str,
)
def test_a_part_of_the_environment_is_said(
  joined, monkeypatch, environment, words
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError) as error:
    processes.start(None, None, None)
  assert all(word in str(error.value) for word in words)
  assert not joined


def fail(error):
  def initialize(**_):
    raise error

  return initialize


def test_a_cluster_that_tells_not_all_is_one_line(joined, monkeypatch):
  """As under Open MPI 5, of which JAX finds no address."""
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
  error = ValueError("coordinator_address should be defined.")
  monkeypatch.setattr(jax.distributed, "initialize", fail(error))
  with pytest.raises(ConfigError, match="address should.*--num_processes=1"):
    processes.start(None, None, None)


def test_a_tpu_of_which_nobody_tells_the_slice_is_alone(
  joined, monkeypatch, capsys
):
  monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
  for error in (ValueError("no address"), OSError("no metadata")):
    monkeypatch.setattr(jax.distributed, "initialize", fail(error))
    processes.start(None, None, None)
    assert str(error) in capsys.readouterr().err
  gone = RuntimeError("no answer")
  monkeypatch.setattr(jax.distributed, "initialize", fail(gone))
  with pytest.raises(ConfigError, match="no answer"):
    processes.start(None, None, None)


def slurm(port: int, i: int) -> dict[str, str]:
  """What `srun` gives a process of two; JAX's own choice of a port but for one."""
  return {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(i),
    "SLURM_LOCALID": str(i),
    "JAX_COORDINATOR_PORT": str(port),
  }


def open_mpi(port: int, i: int) -> dict[str, str]:
  """What `mpirun` of Open MPI 4 gives."""
  return {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(i),
    "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    "JAX_COORDINATOR_PORT": str(port),
  }


def variables(port: int, i: int) -> dict[str, str]:
  return {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(i),
  }


@pytest.mark.parametrize(
  "cluster",
  [
    slurm,
    *(pytest.param(c, marks=pytest.mark.slow) for c in (open_mpi, variables)),
  ],
)
def test_two_processes_find_each_other_by_the_environment(cluster):
  words = """
from dsv3.parallel import processes
processes.start(None, None, None)
import jax
print(f"process {jax.process_index()} found {processes.total(7)}")
"""
  port = free_port()
  run = lambda i: subprocess.Popen(
    [sys.executable, "-c", words],
    env=os.environ | cluster(port, i),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  texts = finish([run(0), run(1)])
  for i, text in enumerate(texts):
    assert f"process {i} found 14" in text, texts


def test_none_runs_what_not_all_have_compiled(monkeypatch):
  """Once for every shape; with static arguments, as the evaluation has them."""
  said = []
  times = jax.jit(
    lambda x, *, n: said.append("traced") or n * x, static_argnames="n"
  )
  run = processes.together(times)
  monkeypatch.setattr(processes, "wait_for_all", said.append)
  assert run(jnp.ones(2), n=3).tolist() == [3, 3] and said == ["traced"]
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  said.clear()
  assert run(jnp.ones(4), n=2).tolist() == [2, 2, 2, 2]
  assert said == ["traced", "compiled"]
  run(jnp.zeros(4), n=2)
  assert said == ["traced", "compiled"]
  assert run(jnp.ones(4), n=5).tolist() == [5, 5, 5, 5]
  assert said == ["traced", "compiled"] * 2


def test_a_total_may_be_larger_than_int32(monkeypatch):
  gather = lambda x: np.stack([np.asarray(jnp.asarray(x))] * 3)  # int32 at most
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  for number in (0, 7, 2**24 + 5, 2**31 + 1, 10**13):
    assert processes.total(number) == 3 * number


def test_one_process_reads_all_rows():
  where = layout.of_run(micro.config_of({"mesh.data": 2, "mesh.expert": 2}))
  assert where.share(4) == ((range(4),), True)
  assert jax.process_count() == 1


class Device(NamedTuple):
  id: int
  process_index: int


@pytest.mark.parametrize(
  "owners, wanted",
  [
    ((0, 0, 1, 1), [[range(4)], [range(4, 8)]]),
    ((0, 1, 1, 0), [[range(2), range(6, 8)], [range(2, 6)]]),  # of a torus
    ((0, 1, 0, 1), [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]),
  ],
)
def test_a_process_reads_the_rows_of_its_devices(owners, wanted, monkeypatch):
  """Wherever they lie on the mesh; its rows are found in what it has read."""
  indices = {
    Device(i, owner): (slice(2 * i, 2 * i + 2), slice(None))
    for i, owner in enumerate(owners)
  }
  dealt = types.SimpleNamespace(devices_indices_map=lambda shape: indices)
  of_batch = lambda self: Batch(dealt, None, None)
  monkeypatch.setattr(layout.Layout, "of_batch", of_batch)
  where = layout.of_devices(micro.config_of({"mesh.data": 4}))
  for process, runs in enumerate(wanted):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    found = where.share(8)
    assert found == (tuple(runs), True)
    rows = [row for run in runs for row in run]
    assert [found.place(row) for row in rows] == list(range(len(rows)))


def test_rows_with_several_owners_are_counted_once(monkeypatch):
  everywhere = slice(0, 8), slice(None)
  indices = {Device(i, i): everywhere for i in range(2)}
  dealt = types.SimpleNamespace(devices_indices_map=lambda shape: indices)
  of_batch = lambda self: Batch(dealt, None, None)
  monkeypatch.setattr(layout.Layout, "of_batch", of_batch)
  where = layout.of_devices(micro.config_of({"mesh.data": 2}))
  for process in range(2):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    assert where.share(8) == ((range(8),), process == 0)


def test_a_step_reads_the_runs_of_rows_that_it_is_told(corpus):
  values = micro.config_of(corpus)
  source = batches.Batches(values, 0)
  plan = schedule.make(values)
  runs = range(1), range(2, 4)
  batch = next(feed.training(source, plan, 1, 0, lambda size: runs))
  whole = source.rows(plan.first_sequence(1), 4)
  for found, of_all in zip(batch, whole, strict=True):
    np.testing.assert_array_equal(found, of_all[np.array([0, 2, 3])])


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

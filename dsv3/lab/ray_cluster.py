"""Runs of a sweep as tasks of a Ray cluster: `pip install "dsv3[ray]"`.

A task is `dsv3 sweep --only=ONE` on a node, as with Slurm; the file system is
shared. Tasks live as long as the program that asked for them, so this one waits,
with the progress table of runs on this machine.
"""

import logging
import os
import pathlib
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv3.config import ConfigError
from dsv3.lab import process, results
from dsv3.lab.board import Board
from dsv3.lab.experiment import Experiment, Run
from dsv3.lab.local import Launcher

_POLL_SECONDS = 0.5


def on_node(
  command: Sequence[str],
  environment: Mapping[str, str],
  folder: str,
  stop: str,
) -> int:
  """Exit code of a command, which is told to save and stop once `stop` exists.

  A file, which all nodes see: what Ray raises in a task that is cancelled may come
  while the process is being started.
  """
  if os.path.exists(stop):
    return 128 + signal.SIGTERM
  here = process.on_node(environment)
  started = subprocess.Popen(command, env=here, cwd=folder)
  while started.poll() is None:
    time.sleep(_POLL_SECONDS)
    if os.path.exists(stop):
      started.send_signal(signal.SIGTERM)
      break
  return started.wait()


class Task:
  """A run on some node, or waiting for one."""

  def __init__(
    self, cluster, reference, sweep: Experiment, run: Run, workdir, stop
  ):
    self._ray, self._reference = cluster, reference
    self._stop = pathlib.Path(stop)
    self._sweep, self.run, self.workdir = sweep, run, workdir
    self._before = results.read(sweep.results).get(run.key)
    self._asked = 0

  @property
  def is_over(self) -> bool:
    return bool(self._ray.wait([self._reference], timeout=0)[0])

  def ask_to_stop(self, times: int) -> None:
    if times > self._asked:
      self._stop.touch()
      if times > 1:
        self._ray.cancel(self._reference, force=True)
      self._asked = times

  def settle(self) -> dict[str, Any] | None:
    """The line that the node wrote; a node that was lost wrote none."""
    reason = ""
    try:
      self._ray.get(self._reference)
    except self._ray.exceptions.RayError as error:
      reason = str(error).strip().split("\n")[0][:200]
    self._stop.unlink(missing_ok=True)
    line = results.read(self._sweep.results).get(self.run.key)
    if line and line != self._before:
      return line
    if reason and not self._asked:
      return {"error": f"no result: {reason}; the same command goes on with it"}
    return None


class Ray(Launcher):
  """Tasks on the nodes of a cluster that is there.

  `options` are those of a Ray task, as num_cpus, num_gpus, resources as
  `NAME=N`; `address` is the cluster's, by default RAY_ADDRESS or the one of this
  machine. Raises ConfigError without the package or the cluster.
  """

  def __init__(
    self,
    sweep: Experiment,
    folder: pathlib.Path,
    board: Board,
    *,
    jobs: int,
    command: Callable[[Run], list[str]],
    options: Mapping[str, Any],
    retry: bool = False,
  ):
    super().__init__(sweep, folder, board, jobs=jobs, retry=retry)
    self._command, options = command, dict(options)
    self._ray = connect(options.pop("address", "auto"))
    # Of a node that is lost the run goes on elsewhere, from its checkpoint.
    options = {"max_retries": 3, **options}
    try:
      self._remote = self._ray.remote(**options)(on_node)
    except (ValueError, TypeError) as error:
      raise ConfigError(f"--ray: {_line(error)}") from error

  def begin(self, run: Run) -> Task:
    here = pathlib.Path.cwd()
    stops = (here / self.folder / "stops").resolve()
    stops.mkdir(parents=True, exist_ok=True)
    stop = str(stops / uuid.uuid4().hex)
    reference = self._remote.remote(
      self._command(run), process.environment(1), str(here), stop
    )
    workdir = process.folder_of(run, self.folder)
    return Task(self._ray, reference, self.sweep, run, workdir, stop)


def connect(address: str):
  """The package ray, in a cluster that runs."""
  try:
    import ray
  except ImportError as error:
    raise ConfigError(
      '--launcher=ray: wanted the package ray: pip install "dsv3[ray]"'
    ) from error
  try:
    if not ray.is_initialized():
      ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
  except (ConnectionError, ValueError, RuntimeError) as error:
    raise ConfigError(
      f"--launcher=ray: no cluster at {address}: {_line(error)}; wanted one, by "
      "`ray start --head`, RAY_ADDRESS or --ray=address=HOST:PORT"
    ) from error
  return ray


def _line(error: Exception) -> str:
  return str(error).strip().split("\n")[0][:200]

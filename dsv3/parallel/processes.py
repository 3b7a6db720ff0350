"""Processes of one run: how they find each other, what they agree on.

Every process runs the same program on the same config; each has some of the
devices. The first one also writes what is written once.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3.config import ConfigError

# A process that does not answer for so long is gone: JAX ends the others, and says
# which it was. One that is killed on a machine that lives is noticed at once.
HEARTBEAT_SECONDS = 30
COORDINATOR = "JAX_COORDINATOR_ADDRESS"  # HOST:PORT of the first process
# Where a process's number stands, and how many there are. JAX reads those of Slurm
# itself, and those of Open MPI before 5.
_NUMBERS = (
  ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
  ("JOB_COMPLETION_INDEX", "JAX_NUM_PROCESSES"),  # of a Job of Kubernetes
  ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


class Group(NamedTuple):
  """Processes of one run, and which of them this is."""

  coordinator: str
  process_id: int
  num_processes: int


def start(
  coordinator: str | None, process_id: int | None, num_processes: int | None
) -> None:
  """Joins the other processes of a run, if there are any; before any device.

  With no arguments they are those of `told`, or else of the cluster's job, as JAX
  finds them: Slurm's, Open MPI's, those of a TPU slice, of a Job of Kubernetes.
  One of one process, --num_processes=1, is alone wherever it is. Raises ConfigError
  for a part of the arguments, and where the others cannot be found.
  """
  given = {
    "--coordinator": coordinator,
    "--process_id": process_id,
    "--num_processes": num_processes,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if group := told(os.environ):
      _join(group)
    elif in_cluster(os.environ):
      _find()
    elif on_tpu_vm(os.environ):
      _find_or_alone()
    return
  if num_processes == 1 and not process_id:
    return
  if missing:
    raise ConfigError(
      f"{missing[0]}: missing; all of {', '.join(given)}, or none"
    )
  _join(Group(*given.values()), ("--process_id", "--num_processes"))


def told(environment: Mapping[str, str]) -> Group | None:
  """The processes that environment variables tell all of; None without them.

  >>> of = {COORDINATOR: "a:1", "JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}
  >>> told(of)
  Group(coordinator='a:1', process_id=1, num_processes=2)
  """
  there = [pair for pair in _NUMBERS if all(k in environment for k in pair)]
  if there and COORDINATOR in environment:
    process_id, count = (_whole(environment, key) for key in there[0])
    return Group(environment[COORDINATOR], process_id, count)
  if own := [key for key in _NUMBERS[0] if key in environment]:
    wanted = (COORDINATOR, *_NUMBERS[0])
    missing = next(key for key in wanted if key not in environment)
    raise ConfigError(
      f"{missing}: missing in the environment, which has {own[0]}; all of "
      f"{', '.join(wanted)}, or none"
    )
  return None


def in_cluster(environment: Mapping[str, str]) -> bool:
  """Is this process one of several that a cluster has started together?

  A Job of Kubernetes is asked how many it has where JAX can ask, with the package
  `kubernetes`.

  >>> in_cluster({"SLURM_STEP_NUM_TASKS": "1"})
  False
  >>> in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
  True
  """
  several = lambda name: _whole(environment, name, 1) > 1
  in_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= {*environment}
  return (
    several("SLURM_STEP_NUM_TASKS")
    or several("OMPI_COMM_WORLD_SIZE")
    or several("MEGASCALE_NUM_SLICES")
    or any("," in environment.get(name, "") for name in _HOSTS)
    or (in_job and importlib.util.find_spec("kubernetes") is not None)
  )


def on_tpu_vm(environment: Mapping[str, str]) -> bool:
  """Is this a host with TPUs of which only the metadata knows the slice?

  JAX writes the first variable where it finds a TPU, and the second where there is
  nobody to ask. A pod of GKE, or a notebook's host, has the list of its hosts.

  >>> on_tpu_vm({"TPU_ML_PLATFORM": "JAX"})
  True
  >>> on_tpu_vm({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"})
  False
  """
  known = ("TPU_SKIP_MDS_QUERY", *_HOSTS)
  return "TPU_ML_PLATFORM" in environment and not any(
    name in environment for name in known
  )


def _whole(environment, name: str, default: int | None = None) -> int:
  text = environment.get(name) or default
  try:
    return int(text)
  except (TypeError, ValueError) as error:
    raise ConfigError(
      f"{name} in the environment: found {text!r}, wanted a whole number"
    ) from error


def _join(group: Group, names=_NUMBERS[0]) -> None:
  process_id, num_processes = group[1:]
  if not 0 <= process_id < num_processes:
    raise ConfigError(
      f"{names[0]}: found {process_id}, wanted less than {names[1]} = "
      f"{num_processes}"
    )
  if num_processes > 1:
    _initialize(group.coordinator, num_processes, process_id)


def _find() -> None:
  """As JAX finds them: by the environment, the metadata, or Kubernetes."""
  try:
    _initialize()
  except (ValueError, KeyError, RuntimeError) as error:
    first = str(error).strip().split("\n")[0] or type(error).__name__
    raise ConfigError(
      f"--coordinator: missing, and the cluster tells JAX not all ({first}); "
      f"wanted --coordinator, --process_id and --num_processes, or {COORDINATOR} "
      "and the others in the environment; --num_processes=1 is a run by itself"
    ) from error


def _initialize(*group) -> None:
  """JAX's own. It would take SIGTERM as a sign for whoever asks it, and nobody does:
  a run that is told to stop while it starts has nothing to save, and ends."""
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    *group, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
  )


def _find_or_alone() -> None:
  """As `_find`; where nobody tells the slice, it is this host."""
  try:
    _find()
  except (ConfigError, OSError) as error:
    others_are_silent = isinstance(error.__cause__, RuntimeError)
    if others_are_silent:  # and were told to be there
      raise
    print(f"dsv3: no other hosts of a slice: {error}", file=sys.stderr)


def is_first() -> bool:
  """Does this process write what is written once?"""
  return jax.process_index() == 0


def together(function: Callable) -> Callable:
  """A jitted function which no process begins to run before all have compiled it.

  JAX keeps compiled programs of the first process alone: with its cache that one
  waits as long as the others compile, and on a CPU not longer than 30 seconds.
  """
  compiled = {}

  def run(*args, **static):
    if jax.process_count() == 1:
      return function(*args, **static)
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
    key = structure, shapes, tuple(static.items())
    if key not in compiled:
      compiled[key] = function.lower(*args, **static).compile()
      wait_for_all("compiled")
    return compiled[key](*args)

  return run


def let_end(running: Any) -> None:
  """Waits on a CPU for a program of several processes, and raises its error.

  Of a partner that did not come in time nobody would hear: the others are waiting
  in that program, this process in the next one, and none of them ends.
  """
  if jax.process_count() > 1 and jax.default_backend() == "cpu":
    jax.block_until_ready(running)


def largest(number: int) -> int:
  """The largest of the numbers that the processes give; all call it."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int32(number)).max())


def total(number: int) -> int:
  """The sum of the numbers that the processes give; all call it."""
  if jax.process_count() == 1:
    return number
  parts = np.array(divmod(number, 1 << 24), np.int32)  # JAX has no int64 here
  high, low = np.asarray(multihost_utils.process_allgather(parts)).sum(
    0, dtype=np.int64
  )
  return (int(high) << 24) + int(low)


def wait_for_all(what: str) -> None:
  """Returns when all processes have come here."""
  multihost_utils.sync_global_devices(what)

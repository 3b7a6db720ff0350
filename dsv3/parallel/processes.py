"""Processes of one run: how they find each other, what they agree on.

Every process runs the same program on the same config; each has some of the
devices. The first one also writes what is written once.
"""

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3.config import ConfigError

# A process that does not answer for so long is gone: JAX ends the others, and says
# which it was. One that is killed on a machine that lives is noticed at once.
HEARTBEAT_SECONDS = 30


def start(
  coordinator: str | None, process_id: int | None, num_processes: int | None
) -> None:
  """Joins the other processes of a run, if there are any; before any device.

  With no arguments they are those of the cluster's job: Slurm's, Open MPI's, of a
  TPU slice on GKE, as JAX finds them; on TPU VMs give the arguments. Raises ConfigError for a part of the arguments.
  """
  given = {
    "--coordinator": coordinator,
    "--process_id": process_id,
    "--num_processes": num_processes,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if in_cluster(os.environ):
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    return
  if missing:
    raise ConfigError(
      f"{missing[0]}: missing; all of {', '.join(given)}, or none"
    )
  if process_id >= num_processes:
    raise ConfigError(
      f"--process_id: found {process_id}, wanted less than --num_processes = "
      f"{num_processes}"
    )
  if num_processes > 1:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def in_cluster(environment: Mapping[str, str]) -> bool:
  """Is this process one of several that a cluster has started together?

  >>> in_cluster({"SLURM_STEP_NUM_TASKS": "1"})
  False
  >>> in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
  True
  """
  several = lambda name: int(environment.get(name) or 1) > 1
  hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
  return (
    several("SLURM_STEP_NUM_TASKS")
    or several("OMPI_COMM_WORLD_SIZE")
    or several("MEGASCALE_NUM_SLICES")
    or "," in hosts
  )


def is_first() -> bool:
  """Does this process write what is written once?"""
  return jax.process_index() == 0


def largest(number: int) -> int:
  """The largest of the numbers that the processes give; all call it."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int32(number)).max())


def total(number: int) -> int:
  """The sum of the numbers that the processes give; all call it."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int64(number)).sum())


def wait_for_all(what: str) -> None:
  """Returns when all processes have come here."""
  multihost_utils.sync_global_devices(what)

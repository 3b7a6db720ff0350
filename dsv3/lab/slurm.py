"""Runs of a sweep as a Slurm array, by submitit: `pip install "dsv3[slurm]"`.

A job is `dsv3 sweep --only=ONE` on a node, which claims its run, goes on with it
and writes its line, as on any other machine of the file system; the last to end
writes table and page. So nothing has to wait for the jobs, and one that is
preempted goes on where it was.
"""

import contextlib
import io
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.config import ConfigError
from dsv3.lab.process import environment, on_node

MINUTES = 720  # of a job, unless asked otherwise


class Job:
  """A command on a node; asked for again when it is preempted or times out."""

  def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
    self.command, self.environment = list(command), dict(environment)

  def __call__(self) -> int:
    """Exit code: a run that failed is in the results and no failed job."""
    return subprocess.run(
      self.command, env=on_node(self.environment)
    ).returncode

  def checkpoint(self, *args, **kwargs):
    """What submitit queues in place of a job that was cut."""
    import submitit

    return submitit.helpers.DelayedSubmission(self)


def submit(
  commands: Sequence[Sequence[str]],
  folder: pathlib.Path,
  *,
  name: str,
  at_once: int,
  parameters: Mapping[str, Any],
  cluster: str = "slurm",
) -> list[Any]:
  """submitit's jobs, one a command; their logs are in `folder`.

  `parameters` are those of `submitit.AutoExecutor.update_parameters`, as
  timeout_min, gpus_per_node, slurm_partition; submitit's own limit of 5 minutes
  would end most runs, and MINUTES are asked for. `cluster` local: processes here.
  Raises ConfigError without the package, without Slurm, for a parameter that
  there is not, or with what sbatch says where it takes no job.
  """
  try:
    import submitit
  except ImportError as error:
    raise ConfigError(
      '--launcher=slurm: wanted the package submitit: pip install "dsv3[slurm]"'
    ) from error
  try:
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(
      name=name,
      slurm_array_parallelism=at_once,
      **{"timeout_min": MINUTES, **parameters},
    )
    jobs = [Job(command, environment(1)) for command in commands]
    # What sbatch says is printed too, and is in the error.
    with contextlib.redirect_stderr(io.StringIO()), executor.batch():
      return [executor.submit(job) for job in jobs]
  except (RuntimeError, NameError, ValueError, AssertionError) as error:
    raise ConfigError(f"--launcher=slurm: {_reason(error)}") from error


def _reason(error: Exception) -> str:
  """The first line that tells of an error, else the first one.

  >>> _reason(RuntimeError("sbatch: queued late\\nsbatch: error: no partition"))
  'sbatch: error: no partition'
  """
  lines = [line for line in str(error).split("\n") if line.strip()]
  lines = lines or ["sbatch takes no job and says nothing"]
  found = next((line for line in lines if "error: " in line), lines[0])
  return found.strip()[:200]

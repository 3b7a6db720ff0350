"""Arrangements of devices on a command line, and what a plan asks of them."""

from dsv3 import config
from dsv3.config import ConfigError, Mesh
from dsv3.parallel import sizes as mesh_sizes

__all__ = ["AXES", "SCHEDULES", "Mesh", "check", "lacks", "parse"]

AXES = ("data", "fsdp", "expert", "context", "tensor", "stage")
SCHEDULES = ("none", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")


def parse(text: str, chips: int) -> Mesh:
  """`data=2,expert=64,stage=16`; one size may be -1, which fits the chips.

  >>> str(parse("expert=64,data=-1", 128))
  'data=2,expert=64'
  """
  sizes = {}
  for part in text.split(","):
    axis, equals, size = part.partition("=")
    if axis not in AXES or not equals:
      known = ", ".join(AXES)
      raise ConfigError(f"--mesh: found {part}, wanted axis=size, of {known}")
    if axis in sizes:
      raise ConfigError(f"--mesh: {axis} is there twice")
    if size != "-1" and not (size.isdecimal() and int(size)):
      raise ConfigError(
        f"--mesh: {axis}: found {size}, wanted 1 or more, or -1"
      )
    sizes[axis] = int(size)
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ConfigError(f"--mesh: found -1 for {' and '.join(free)}, wanted one")
  return mesh_sizes.resolve(Mesh(**sizes), chips, "--mesh: ", "chips")


def check(
  mesh: Mesh,
  values: config.Config,
  chips: int,
  *,
  batch: int,
  microbatches: int,
  schedule: str,
) -> None:
  """Raises ConfigError for what does not divide, with the axis and the key."""
  if mesh.size != chips:
    raise ConfigError(
      f"--mesh: found {mesh} of {mesh.size} devices, wanted --chips = {chips}"
    )
  mesh_sizes.check_model(mesh, values, "--mesh: ")
  if mesh.stage > values.model.n_layers:
    raise ConfigError(
      f"--mesh: stage: found {mesh.stage}, wanted at most model.n_layers = "
      f"{values.model.n_layers}"
    )
  if batch % (mesh.ranks * microbatches):
    raise ConfigError(
      f"schedule.batch_size: found {batch} sequences, wanted a multiple of "
      f"data x fsdp x expert x microbatches = {mesh.ranks} x {microbatches}"
    )
  if schedule not in SCHEDULES:
    known = ", ".join(SCHEDULES)
    raise ConfigError(f"--schedule: found {schedule}, wanted one of {known}")
  if (schedule == "none") != (mesh.stage == 1):
    raise ConfigError(
      f"--schedule: found {schedule} with stage = {mesh.stage}, wanted "
      + ("none" if mesh.stage == 1 else "one of " + ", ".join(SCHEDULES[1:]))
    )
  if schedule == "dualpipe" and mesh.stage % 2:
    raise ConfigError(
      f"--mesh: stage: found {mesh.stage}, wanted an even number: {schedule}"
    )
  if lack := lacks(schedule, mesh.stage, microbatches):
    raise ConfigError(f"--microbatches: found {microbatches}, wanted {lack}")


def lacks(schedule: str, stages: int, microbatches: int) -> str | None:
  """What number of microbatches a pipeline wants, if it is not this one.

  >>> lacks("dualpipe", 4, 15)
  'an even number: dualpipe is fed from both ends (Sec. 3.2.1)'
  """
  if stages == 1:
    return None
  if microbatches < stages:
    return f"at least stage = {stages}, or the pipeline never fills"
  if schedule == "interleaved" and microbatches % stages:
    return f"a multiple of stage = {stages}: interleaved (arXiv 2104.04473)"
  if schedule.startswith("dualpipe") and microbatches % 2:
    return f"an even number: {schedule} is fed from both ends (Sec. 3.2.1)"
  return None

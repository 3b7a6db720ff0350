"""How devices are arranged: a value of the planner's, in the paper's words.

Inner axes come first in a domain of fast links: tensor, context, expert, fsdp,
then stage and data, which talk least.
"""

import dataclasses
import math

from dsv3 import config
from dsv3.config import ConfigError

AXES = ("data", "fsdp", "expert", "context", "tensor", "stage")
_INNER_FIRST = ("tensor", "context", "expert", "fsdp", "stage", "data")
SCHEDULES = ("none", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Sizes of the axes; their product is the number of devices."""

  data: int = 1  # replicas; the optimizer's state is sharded over them (ZeRO-1)
  fsdp: int = (
    1  # sequences, and every weight gathered where it is used (ZeRO-3)
  )
  expert: int = 1  # sequences, and the routed experts (EP)
  context: int = 1  # positions of a sequence (CP)
  tensor: int = 1  # heads and hidden widths (TP)
  stage: int = 1  # layers (PP)

  @property
  def size(self) -> int:
    return math.prod(getattr(self, axis) for axis in AXES)

  @property
  def ranks(self) -> int:
    """Over how many the sequences of a batch are dealt."""
    return self.data * self.fsdp * self.expert

  def domains(self, axis: str, domain: int) -> int:
    """Domains of fast links that a group of this axis is spread over."""
    before = _INNER_FIRST[: _INNER_FIRST.index(axis)]
    stride = math.prod(getattr(self, a) for a in before)
    return min(-(-stride * getattr(self, axis) // domain), getattr(self, axis))

  def __str__(self) -> str:
    sizes = [f"{a}={getattr(self, a)}" for a in AXES if getattr(self, a) > 1]
    return ",".join(sizes) or "data=1"


def parse(text: str, chips: int) -> Mesh:
  """`data=2,expert=64,stage=16`; one size may be -1, which fits the chips.

  >>> parse("expert=64,data=-1", 128)
  Mesh(data=2, fsdp=1, expert=64, context=1, tensor=1, stage=1)
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
  if free:
    others = math.prod(size for size in sizes.values() if size != -1)
    if chips % others:
      raise ConfigError(
        f"--mesh: {free[0]}=-1: the other axes take {others}, no divisor of "
        f"{chips} chips"
      )
    sizes[free[0]] = chips // others
  return Mesh(**sizes)


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
  model, a = values.model, values.model.attention

  def divides(axis: str, by: int, what: str) -> None:
    size = getattr(mesh, axis)
    if by % size:
      raise ConfigError(
        f"--mesh: {axis}: found {size}, wanted a divisor of {what} = {by}"
      )

  if mesh.size != chips:
    raise ConfigError(
      f"--mesh: found {mesh} of {mesh.size} devices, wanted --chips = {chips}"
    )
  if model.ffn == "moe":
    divides("expert", model.moe.n_routed, "model.moe.n_routed")
    divides("tensor", model.moe.hidden, "model.moe.hidden")
  elif mesh.expert > 1:
    raise ConfigError(
      f"--mesh: expert: found {mesh.expert}, wanted 1: model.ffn = dense"
    )
  divides("tensor", a.n_heads, "model.attention.n_heads")
  divides("fsdp", model.dim, "model.dim")
  divides("context", values.data.seq_len, "data.seq_len")
  if mesh.stage > model.n_layers:
    raise ConfigError(
      f"--mesh: stage: found {mesh.stage}, wanted at most model.n_layers = "
      f"{model.n_layers}"
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

"""Sizes of a mesh: which fit the devices, and which fit the model."""

import dataclasses
import math

from dsv3 import config
from dsv3.config import INNER_FIRST, ConfigError, Mesh


def resolve(
  mesh: Mesh, devices: int, where: str = "config.mesh.", what: str = "devices"
) -> Mesh:
  """The mesh with its -1 as a size: the devices that the other axes leave.

  >>> str(resolve(Mesh(data=-1, expert=64), 128))
  'data=2,expert=64'
  """
  sizes = {axis: getattr(mesh, axis) for axis in INNER_FIRST}
  free = [axis for axis, size in sizes.items() if size == -1]
  others = math.prod(size for size in sizes.values() if size != -1)
  if free and devices % others:
    raise ConfigError(
      f"{where}{free[0]}=-1: the other axes take {others}, no divisor of "
      f"{devices} {what}"
    )
  return dataclasses.replace(mesh, **{axis: devices // others for axis in free})


def check_model(
  mesh: Mesh, values: config.Config, where: str = "config.mesh."
) -> None:
  """Raises ConfigError for an axis that does not divide what it shards."""
  model, a = values.model, values.model.attention

  def divides(axis: str, by: int, what: str) -> None:
    size = getattr(mesh, axis)
    if by % size:
      raise ConfigError(
        f"{where}{axis}: found {size}, wanted a divisor of {what} = {by}"
      )

  if model.ffn == "moe":
    divides("expert", model.moe.n_routed, "model.moe.n_routed")
    divides("tensor", model.moe.hidden, "model.moe.hidden")
  elif mesh.expert > 1:
    raise ConfigError(
      f"{where}expert: found {mesh.expert}, wanted 1: model.ffn = dense"
    )
  divides("tensor", a.n_heads, "model.attention.n_heads")
  if a.kind == "gqa":
    divides("tensor", a.n_kv_heads, "model.attention.n_kv_heads")
  divides("tensor", model.dense_hidden, "model.dense_hidden")
  divides("fsdp", model.dim, "model.dim")
  length = values.data.seq_len
  if mesh.context > 1 and length % (2 * mesh.context):
    raise ConfigError(
      f"{where}context: found {mesh.context}, wanted a divisor of half of "
      f"data.seq_len = {length}: a device has early positions and late ones"
    )


def check_batches(mesh: Mesh, values: config.Config) -> None:
  """Raises ConfigError for a batch that the devices cannot share evenly."""
  s, microbatches = values.schedule, values.train.microbatches
  unit = mesh.ranks * microbatches
  stair = (s.batch_size - s.batch_size_start) // s.batch_ramp_stages
  for key, size, name in (
    ("batch_size", s.batch_size, "schedule.batch_size"),
    ("batch_size_start", s.batch_size_start, "schedule.batch_size_start"),
    ("batch_ramp_stages", stair, "a stair of schedule.batch_ramp_stages"),
  ):
    if size % unit:
      raise ConfigError(
        f"config.schedule.{key}: found {size} sequences in {name}, wanted a "
        f"multiple of data x fsdp x expert x microbatches = {mesh.ranks} x "
        f"{microbatches}: config.mesh is {mesh}"
      )


def check_run(mesh: Mesh, values: config.Config, devices: int) -> None:
  """Raises ConfigError, with the field, for a mesh that a run cannot have."""
  if mesh.stage > 1:
    raise ConfigError(
      f"config.mesh.stage: found {mesh.stage}, wanted 1: pipelines are planned "
      "by dsv3 plan, and not run yet"
    )
  if mesh.expert % mesh.expert_nodes:
    raise ConfigError(
      f"config.mesh.expert_nodes: found {mesh.expert_nodes}, wanted a divisor "
      f"of mesh.expert = {mesh.expert}"
    )
  m = values.model.moe
  limited = values.model.ffn == "moe" and m.top_groups < m.n_groups
  if limited and m.n_groups % mesh.expert_nodes:
    raise ConfigError(
      f"config.mesh.expert_nodes: found {mesh.expert_nodes}, wanted a divisor of "
      f"model.moe.n_groups = {m.n_groups}: a group that lies in two nodes limits "
      "none of them"
    )
  if mesh.size > devices:
    raise ConfigError(
      f"config.mesh: found {mesh} of {mesh.size} devices, wanted at most the "
      f"{devices} there are"
    )
  check_model(mesh, values)
  latents = ("q_rank", "kv_rank")  # of the other kinds, queries have one
  for rank in latents if values.model.attention.kind == "mla" else latents[:1]:
    size = getattr(values.model.attention, rank)
    if size % mesh.fsdp:
      raise ConfigError(
        f"config.mesh.fsdp: found {mesh.fsdp}, wanted a divisor of "
        f"model.attention.{rank} = {size}"
      )
  check_batches(mesh, values)
  if mesh.size > 1:
    _check_precision(mesh, values.model.precision)


def _check_precision(mesh: Mesh, precision: config.Precision) -> None:
  """Recipes that ask for the largest value of a whole tensor see a part of it."""
  from dsv3.ops import recipes  # with JAX, for which a plan does not wait
  from dsv3.ops.fp8 import Operand

  recipe = recipes.recipe(precision.recipe, precision.changes)
  if not recipe.quantises:
    return
  operands = [how for how in vars(recipe).values() if isinstance(how, Operand)]
  if recipe.scaling == "delayed" or any(0 in how.tile for how in operands):
    raise ConfigError(
      f"config.model.precision.recipe: found {precision.recipe} with config.mesh "
      f"= {mesh}, wanted tiles: a scale of a whole tensor or of all its rows "
      "would be of the part on a device"
    )
  if mesh.tensor > 1:
    raise ConfigError(
      f"config.mesh.tensor: found {mesh.tensor}, wanted 1 with "
      f"model.precision.recipe = {precision.recipe}: tiles are not cut"
    )
  if precision.report_every:
    raise ConfigError(
      f"config.model.precision.report_every: found {precision.report_every} "
      f"with config.mesh = {mesh}, wanted 0: reports are of one device"
    )

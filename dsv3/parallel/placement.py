"""The values of a mesh that a model is handed (`dsv3.ops.placement`)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3.config import Mesh
from dsv3.ops.linear import Weight
from dsv3.ops.placement import ALONE, ONE_DEVICE, Peers, Placement
from dsv3.parallel import positions, table
from dsv3.parallel.exchange import Exchange, NodeExchange, kernel_of
from dsv3.parallel.mesh import ORDER


def make(sizes: Mesh, mesh: jax.sharding.Mesh) -> Placement:
  """The Placement of a mesh; of one device that of all models without one."""
  if sizes.size == 1:
    return ONE_DEVICE

  kernel = kernel_of(mesh.devices.flat[0].platform)

  parts = lambda dim: math.prod(sizes.along(a) for a in table.axes_of(dim))

  def place(tree, dims):
    sharding = NamedSharding(mesh, table.computed(dims))
    names = table.letters(dims)

    def fix(x):
      if any(n % parts(dim) for n, dim in zip(x.shape, names, strict=True)):
        return x  # of a decode: a run's batches are multiples
      return lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(fix, tree)

  return Placement(
    place=place,
    parts=parts,
    dealt=functools.partial(positions.deal, n_devices=sizes.context),
    gather=functools.partial(_gather, sizes=sizes, mesh=mesh),
    spread=functools.partial(_spread, peers=peers_of(sizes, kernel), mesh=mesh),
  )


def is_variable(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def dims_of(variable: nnx.Variable) -> str:
  """The logical dims that a parameter declares; "" for what all devices hold."""
  return variable.get_metadata().get("dims", "")


def _is_of_linear(variable: nnx.Variable) -> bool:
  """One that a recipe knows by its role (`nn.layers.Matrix`)."""
  return "role" in variable.get_metadata()


def _gather(weights, dtype, *, sizes: Mesh, mesh):
  """Weights without their cut over `fsdp`, as products read them."""

  def of(variable):
    dims = dims_of(variable)
    if not dims:
      return variable
    value = variable.get_value()
    if isinstance(value, Weight):
      return variable  # what lies beside it is gathered by the compiler
    is_cast = _is_of_linear(variable) or variable is weights
    sent = str(jnp.dtype(dtype if is_cast else value.dtype))
    return variable.replace(_gathered(value, dims, sent, sizes, mesh))

  return jax.tree.map(of, weights, is_leaf=is_variable)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(w, dims, sent, sizes, mesh):
  """w in the digits of `sent`; its gradient, in all digits, is scattered where
  the weight was gathered."""
  cut = NamedSharding(mesh, table.stored(dims, w.shape, sizes))
  whole = NamedSharding(mesh, table.computed(dims, w.ndim))
  low = lax.with_sharding_constraint(w.astype(sent), cut)
  return lax.with_sharding_constraint(low, whole).astype(w.dtype)


def _gathered_forward(w, dims, sent, sizes, mesh):
  return _gathered(w, dims, sent, sizes, mesh), None


def _gathered_backward(dims, sent, sizes, mesh, _, dw):
  sharding = NamedSharding(mesh, table.stored(dims, dw.shape, sizes))
  return (lax.with_sharding_constraint(dw, sharding),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _spread(function, dims_in, dims_out, *, peers: Peers, mesh):
  spec = lambda dims: table.computed(dims)

  def run(*arguments):
    leaves, structure = jax.tree.flatten(arguments)
    specs = []
    for dims, argument in zip(dims_in, arguments, strict=True):
      specs += [spec(dims)] if dims else _specs_of(argument)
    assert len(specs) == len(leaves), (dims_in, len(specs), len(leaves))

    def on_device(leaves):
      arguments = jax.tree.unflatten(structure, leaves)
      return function(peers, *_drawn_apart(arguments, mesh.axis_names))

    # What it returns is made equal by `peers.total`; the tests hold it to that.
    return jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(specs,),
      out_specs=jax.tree.map(spec, dims_out),
      check_vma=False,
    )(leaves)

  return run


def _drawn_apart(arguments, axes):
  """Weights whose stochastic rounding is another draw on each device."""

  def of(weight):
    if not isinstance(weight, Weight) or weight.seed is None:
      return weight
    number = lax.axis_index(axes).astype(weight.seed.dtype)
    return dataclasses.replace(weight, seed=weight.seed + number)

  return jax.tree.map(of, arguments, is_leaf=lambda x: isinstance(x, Weight))


def _specs_of(module) -> list[PartitionSpec]:
  """Of every array of a module, by the dims that its weights declare."""
  specs = []
  for part in jax.tree.leaves(module, is_leaf=is_variable):
    dims = dims_of(part) if is_variable(part) else ""
    value = part.get_value() if is_variable(part) else part
    if isinstance(value, Weight):
      specs += _specs_of_weight(value, dims)
    else:
      specs.append(table.computed(dims, value.ndim))
  return specs


def _specs_of_weight(weight: Weight, dims: str) -> list[PartitionSpec]:
  """Of a weight under FP8: its copies lie as it does, all else everywhere.

  Copies are canonical, so only the first dim, of experts, is the weight's own.
  """
  first = PartitionSpec(*table.computed(dims)[:1]) if dims[0] == "E" else None
  specs = []
  for field in dataclasses.fields(weight):
    arrays = jax.tree.leaves(getattr(weight, field.name))
    if field.name == "master":
      specs += [table.computed(dims, weight.master.ndim)]
    elif field.name in ("fprop", "dgrad") and first:
      specs += [first] * len(arrays)
    else:
      specs += [PartitionSpec()] * len(arrays)
  return specs


def peers_of(sizes: Mesh, kernel: str) -> Peers:
  """The Peers of a device inside `shard_map` over all axes."""

  def axes_of(dims):
    return tuple(a for a in table.axes_of(dims) if sizes.along(a) > 1)

  def total(x, dims):
    axes = axes_of(dims)
    return lax.psum(x, axes) if axes else x

  def whole(x, dim, axis):
    axes = axes_of(dim)
    if not axes:
      return x
    x = lax.all_gather(x, axes, axis=axis, tiled=True)
    return positions.gather_up(x, sizes.context, axis) if dim == "L" else x

  def starts(n):
    if sizes.context == 1:
      return (0,)
    return positions.starts(n, lax.axis_index("context"), sizes.context)

  exchange, nodes = ALONE.exchange, sizes.expert_nodes
  if sizes.along("expert") > 1:
    everyone = tuple(a for a in ORDER if sizes.along(a) > 1)
    how = kernel, sizes.expert_rows, everyone
    exchange = Exchange("expert", sizes.along("expert"), *how)
  if nodes > 1:
    exchange = NodeExchange("node", nodes, exchange, kernel)
  return Peers(total, whole, starts, exchange)

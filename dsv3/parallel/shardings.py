"""Shardings of trees of parameters, by the dims that these declare."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3.config import Mesh
from dsv3.parallel import table
from dsv3.parallel.placement import dims_of, is_variable


class Row(NamedTuple):
  """An array, where it lies, and its bytes on one device."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  spec: PartitionSpec
  bytes: int


def weights(tree: Any, sizes: Mesh, mesh: jax.sharding.Mesh) -> Any:
  """Of parameters between steps: replicated over `data` (ZeRO-1)."""
  return _of(tree, mesh, lambda dims, x: table.stored(dims, x.shape, sizes))


def moments(tree: Any, sizes: Mesh, mesh: jax.sharding.Mesh) -> Any:
  """Of what follows the parameters and no forward pass reads (ZeRO-1)."""
  return _of(tree, mesh, lambda dims, x: table.moment(dims, x.shape, sizes))


def everywhere(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Of what every device holds whole."""
  return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def computed(dims: str, mesh: jax.sharding.Mesh) -> NamedSharding:
  """Of an activation or an input of these dims."""
  return NamedSharding(mesh, table.computed(dims))


def _of(tree, mesh, spec_of: Callable[[str, Any], PartitionSpec]):
  def one(x):
    if not is_variable(x):
      return everywhere(x, mesh)
    dims, value = dims_of(x), x.get_value()
    spec = spec_of(dims, value) if dims else PartitionSpec()
    return x.replace(NamedSharding(mesh, spec))

  return jax.tree.map(one, tree, is_leaf=is_variable)


def rows(tree: Any, shardings: Any) -> Iterator[Row]:
  """What lies where, of arrays or their shapes and as many shardings."""
  arrays = jax.tree_util.tree_leaves_with_path(tree)
  for (path, x), sharding in zip(
    arrays, jax.tree.leaves(shardings), strict=True
  ):
    keys = [
      str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", ""))))
      for k in path
    ]
    name = "/".join(key for key in keys if key != "value")
    here = sharding.shard_shape(x.shape)
    n_bytes = x.dtype.itemsize
    for size in here:
      n_bytes *= size
    yield Row(name, tuple(x.shape), str(x.dtype), sharding.spec, n_bytes)

"""The one table of which mesh axes share out which logical dim.

Dims are letters of the legend, in the order of an array's own; a stack of layers
has one more in front, which is shared out over nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec

from dsv3.config import Mesh


class Axes(NamedTuple):
  """Mesh axes of a dim: of activations, and more of weights at rest."""

  computed: tuple[str, ...] = ()
  stored: tuple[str, ...] = ()


TABLE = {
  "B": Axes(("data", "fsdp", "node", "expert")),
  "L": Axes(("context",)),
  "H": Axes(("tensor",)),
  "F": Axes(("tensor",)),
  "E": Axes(("node", "expert")),
  "D": Axes(stored=("fsdp",)),
  "Q": Axes(stored=("fsdp",)),
  "C": Axes(stored=("fsdp",)),
}
# Between steps a moment is also shared out over the axes whose devices hold the
# same weights (ZeRO-1, Sec. 3.2).
REPLICAS = ("data", "node", "expert")


def letters(dims: str) -> str:
  """One letter a dim: `E D 2 F` is `ED2F`."""
  return dims.replace(" ", "")


def axes_of(dims: str) -> tuple[str, ...]:
  """The mesh axes that compute different parts of these dims."""
  return tuple(
    axis for dim in letters(dims) for axis in TABLE.get(dim, Axes()).computed
  )


def computed(dims: str, ndim: int | None = None) -> PartitionSpec:
  """Of an array that is computed on, or a weight that a product reads."""
  names = letters(dims)
  parts = [TABLE.get(dim, Axes()).computed for dim in names]
  return _spec([()] * ((ndim or len(names)) - len(names)) + parts)


def stored(dims: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Of a weight between its uses: over `fsdp` too, which each axis is once."""
  return _spec(_stored(dims, shape, mesh))


def moment(dims: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Of what the optimizer keeps of a weight between steps: over replicas too.

  The first dim that they divide is cut; where they divide none, all hold all.
  """
  parts = _stored(dims, shape, mesh)
  for axis in REPLICAS:
    n = mesh.along(axis)
    if n == 1 or any(axis in part for part in parts):
      continue
    first = len(shape) - len(letters(dims))
    for i in [*range(first, len(shape)), *range(first)]:
      if shape[i] % (_size(parts[i], mesh) * n) == 0:
        parts[i] = (*parts[i], axis)
        break
  return _spec(parts)


def _stored(dims, shape, mesh: Mesh) -> list[tuple[str, ...]]:
  names, used = letters(dims), set()
  parts = [()] * (len(shape) - len(names))
  for dim, size in zip(names, shape[len(parts) :]):
    axes = TABLE.get(dim, Axes())
    part = tuple(a for a in axes.computed + axes.stored if a not in used)
    assert size % _size(part, mesh) == 0, (dims, shape, mesh)
    used |= set(part)
    parts.append(part)
  return parts


def _size(axes: Sequence[str], mesh: Mesh) -> int:
  size = 1
  for axis in axes:
    size *= mesh.along(axis)
  return size


def _spec(parts: Sequence[tuple[str, ...]]) -> PartitionSpec:
  one = lambda part: part[0] if len(part) == 1 else part or None
  return PartitionSpec(*map(one, parts))

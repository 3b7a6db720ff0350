"""The devices as a mesh, inner axes where links are fast."""

import collections
import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from dsv3.config import ConfigError, Mesh

# Outer first; `node` and `expert` are the two parts of the config's `expert`.
# Pipelines are not run, so no array has an axis `stage`.
ORDER = ("data", "fsdp", "node", "expert", "context", "tensor")


def make(sizes: Mesh, devices: Sequence[jax.Device] | None = None):
  """The jax.sharding.Mesh of these sizes, on the first devices there are.

  Devices of one slice (of a TPU), or of one node, have the fast links. Outer axes
  go over slices and inner ones stay within: with `expert` over nodes, the experts
  of a node are neighbours, as node-limited routing has them (Sec. 2.1.2).
  """
  devices, shape, per_slice = _slices(sizes, devices)
  n_slices = len(per_slice)
  if n_slices == 1:
    grid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  else:
    check_even(per_slice)
    over, within = split(shape, n_slices)
    grid = mesh_utils.create_hybrid_device_mesh(
      within,
      over,
      devices,
      process_is_granule=devices[0].platform == "cpu",
      allow_split_physical_axes=True,
    )
  # Auto axes: jax.make_mesh would make them Explicit, which shard_map refuses.
  return jax.sharding.Mesh(
    grid, ORDER, axis_types=(AxisType.Auto,) * len(ORDER)
  )


def nodes_of_experts(
  sizes: Mesh, devices: Sequence[jax.Device] | None = None
) -> int:
  """Over how many nodes, or slices, the experts of a layer are dealt by `make`."""
  _, shape, per_slice = _slices(sizes, devices)
  over, _ = split(shape, len(per_slice))
  return math.prod(over[ORDER.index(axis)] for axis in ("node", "expert"))


def _slices(sizes: Mesh, devices: Sequence[jax.Device] | None):
  """The devices of a mesh, its shape, and how many are of each slice or node."""
  devices = list(jax.devices() if devices is None else devices)[: sizes.size]
  shape = [sizes.along(axis) for axis in ORDER]
  return devices, shape, collections.Counter(map(_slice_of, devices))


def unbuilt(sizes: Mesh) -> jax.sharding.AbstractMesh:
  """A mesh of these sizes without devices: enough to say what lies where."""
  shape = tuple(sizes.along(axis) for axis in ORDER)
  return jax.sharding.AbstractMesh(
    shape, ORDER, axis_types=(AxisType.Auto,) * len(ORDER)
  )


def split(shape: Sequence[int], n_slices: int) -> tuple[list[int], list[int]]:
  """Every size as a factor over slices and one within, outer axes first.

  >>> split([2, 1, 8, 8, 1, 1], 16)
  ([2, 1, 8, 1, 1, 1], [1, 1, 1, 8, 1, 1])
  """
  over, rest = [], n_slices
  for size in shape:
    over.append(math.gcd(size, rest))
    rest //= over[-1]
  assert rest == 1, (shape, n_slices)  # the sizes multiply to all devices
  return over, [size // n for size, n in zip(shape, over)]


def check_even(per_slice: Mapping[int, int]) -> None:
  """Raises ConfigError where a mesh takes a part of some slice or node."""
  if len(set(per_slice.values())) > 1:
    counts = ", ".join(map(str, per_slice.values()))
    raise ConfigError(
      f"config.mesh: found a size that takes {counts} devices of the nodes, "
      "wanted as many of each"
    )


def _slice_of(device: jax.Device) -> int:
  """What a device has fast links within; a CPU has them within its process."""
  if device.platform == "cpu":
    return device.process_index
  return getattr(device, "slice_index", 0)

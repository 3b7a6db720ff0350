"""Which meshes there can be, and what is said of one that cannot."""

import types

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dsv3.config import ConfigError, Mesh
from dsv3.parallel import mesh, sizes, table
from tests import micro


@pytest.mark.parametrize(
  "diff, words",
  [
    ({"mesh.data": 0}, ("config.mesh.data", "found 0")),
    (
      {"mesh.data": -1, "mesh.fsdp": -1},
      ("config.mesh", "-1 for data and fsdp"),
    ),
    ({"mesh.data": -1, "mesh.fsdp": 3}, ("config.mesh.data=-1", "3", "8 dev")),
    ({"mesh.stage": 2}, ("config.mesh.stage", "found 2", "dsv3 plan")),
    ({"mesh.data": 16}, ("config.mesh", "16 devices", "the 8 there are")),
    (
      {"mesh.expert": 4, "mesh.expert_nodes": 3},
      ("config.mesh.expert_nodes", "found 3", "mesh.expert = 4"),
    ),
    (
      {"mesh.expert": 4, "mesh.expert_nodes": 4},
      ("config.mesh.expert_nodes", "found 4", "n_groups = 2"),
    ),
    ({"mesh.expert": 8}, ("config.mesh.expert", "n_routed = 4")),
    ({"mesh.expert": 2, "model.ffn": "dense"}, ("config.mesh.expert", "dense")),
    ({"mesh.tensor": 4}, ("config.mesh.tensor", "n_heads = 2")),
    ({"mesh.context": 5}, ("config.mesh.context", "seq_len = 32")),
    (
      {"mesh.fsdp": 4, "model.attention.kv_rank": 6},
      ("config.mesh.fsdp", "kv_rank = 6"),
    ),
    ({"mesh.data": 8}, ("config.schedule.batch_size", "8 x 1", "data=8")),
    (
      {"mesh.data": 4, "train.microbatches": 2},
      ("config.schedule.batch_size", "4 x 2"),
    ),
    (
      {"mesh.data": 2, "model.precision.recipe": "delayed"},
      ("config.model.precision.recipe", "delayed", "data=2"),
    ),
    (
      {"mesh.data": 2, "model.precision.changes": ("fprop_x=e4m3 *x*",)},
      ("config.model.precision.recipe", "wanted tiles", "data=2"),
    ),
    (
      {"mesh.tensor": 2, "model.precision.changes": ("fprop_x=e4m3 1x128",)},
      ("config.mesh.tensor", "tiles are not cut"),
    ),
    (
      {"mesh.tensor": 2, "model.precision.recipe": "deepseek_v3"},
      ("config.mesh.tensor", "deepseek_v3"),
    ),
  ],
)
def test_a_mesh_that_cannot_be_is_said_with_its_field(diff, words):
  with pytest.raises(ConfigError) as error:
    values = micro.config_of(diff)
    sizes.check_run(sizes.resolve(values.mesh, 8), values, 8)
  assert "\n" not in str(error.value)
  assert all(word in str(error.value) for word in words), error.value


def test_one_axis_takes_the_devices_that_are_left():
  values = micro.config_of({"mesh.data": -1, "mesh.expert": 2})
  found = sizes.resolve(values.mesh, 8)
  assert found == Mesh(data=4, expert=2)
  assert found.size == 8 and found.ranks == 8
  sizes.check_run(sizes.resolve(values.mesh, 8), values_of_8(), 8)
  on_nodes = Mesh(data=-1, expert=4, expert_nodes=2)
  assert sizes.resolve(on_nodes, 8).data == 2


def values_of_8():
  return micro.config_of(
    {"schedule.batch_size": 8, "schedule.batch_size_start": 8}
  )


def test_axes_lie_from_the_outer_to_the_inner():
  """Neighbours on the innermost axis are neighbours among the devices."""
  made = mesh.make(Mesh(data=2, expert=2, tensor=2))
  assert made.axis_names == (
    "data",
    "fsdp",
    "node",
    "expert",
    "context",
    "tensor",
  )
  found = [device.id for device in made.devices.flat]
  assert found == [device.id for device in jax.devices()[:8]]


@pytest.mark.parametrize(
  "shape, slices, wanted",
  [
    ([2, 1, 64, 1, 1], 16, ([2, 1, 8, 1, 1], [1, 1, 8, 1, 1])),
    ([4, 8, 1, 1, 1], 4, ([4, 1, 1, 1, 1], [1, 8, 1, 1, 1])),
    ([1, 2, 1, 2, 8], 4, ([1, 2, 1, 2, 1], [1, 1, 1, 1, 8])),
  ],
)
def test_outer_axes_go_over_the_slices(shape, slices, wanted):
  assert mesh.split(shape, slices) == wanted


def test_a_mesh_of_parts_of_nodes_is_said():
  mesh.check_even({0: 8, 1: 8})
  with pytest.raises(ConfigError, match="config.mesh.*8, 4 devices"):
    mesh.check_even({0: 8, 1: 4})


V3 = Mesh(data=2, fsdp=4, expert=8, tensor=2)


@pytest.mark.parametrize(
  "dims, shape, stored, moment",
  [  # of layers in front; `2` and `N` are cut by nothing
    (
      "E D 2 F",
      (58, 256, 7168, 2, 2048),
      P(None, ("node", "expert"), "fsdp", None, "tensor"),
      P(None, ("node", "expert", "data"), "fsdp", None, "tensor"),
    ),
    (
      "Q HN",
      (61, 1536, 128, 128),
      P(None, "fsdp", "tensor", None),
      P(None, ("fsdp", "data", "expert"), "tensor", None),
    ),
    (
      "D Q",
      (61, 7168, 1536),
      P(None, "fsdp", None),
      P(None, ("fsdp", "data", "expert"), None),
    ),
    ("W D", (6, 8), P(None, "fsdp"), P("data", "fsdp")),
  ],
)
def test_weights_and_moments_lie_as_the_table_says(dims, shape, stored, moment):
  """ZeRO-1: what the optimizer keeps is over the replicas too (Sec. 3.2)."""
  assert table.stored(dims, shape, V3) == stored
  assert table.moment(dims, shape, V3) == moment


@pytest.mark.parametrize(
  "sizes_of, nodes",
  [
    ({"data": 4, "expert": 8}, 1),  # within a node
    ({"expert": 32}, 4),
    ({"expert": 32, "expert_nodes": 4}, 4),
    ({"data": 2, "expert": 16}, 2),
    ({"expert": 16, "expert_nodes": 4}, 2),  # of half a node each: no node
  ],
)
def test_over_how_many_nodes_experts_lie(sizes_of, nodes):
  devices = [
    types.SimpleNamespace(platform="gpu", slice_index=i // 8) for i in range(32)
  ]
  assert mesh.nodes_of_experts(Mesh(**sizes_of), devices) == nodes

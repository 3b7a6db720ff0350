"""Arrangements of devices, and what a user gets wrong about them."""

import pytest

from dsv3 import config, overlay, plan
from dsv3.config import ConfigError
from dsv3.plan import mesh, pipeline

V3 = config.build(overlay.load("v3_671b"))


def test_one_axis_takes_the_rest():
  assert mesh.parse("data=2,expert=64,stage=-1", 2048) == plan.Mesh(
    data=2, expert=64, stage=16
  )


@pytest.mark.parametrize(
  "text, words",
  [
    ("pipe=3", ("pipe=3", "stage")),
    ("data", ("data", "axis=size")),
    ("data=0", ("data", "found 0")),
    ("data=two", ("data", "found two")),
    ("data=-1,fsdp=-1", ("data and fsdp",)),
    ("data=2,data=4", ("data", "twice")),
    ("expert=48,data=-1", ("data=-1", "48", "64 chips")),
  ],
)
def test_what_is_no_mesh_is_said(text, words):
  with pytest.raises(ConfigError) as error:
    mesh.parse(text, 64)
  assert "--mesh" in str(error.value) and "\n" not in str(error.value)
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
  "sizes, change, words",
  [
    ({"expert": 64}, {}, ("64 devices", "--chips = 2048")),
    ({"expert": 512, "data": 4}, {}, ("expert", "n_routed = 256")),
    ({"tensor": 256, "data": 8}, {}, ("tensor", "n_heads = 128")),
    ({"stage": 64, "data": 32}, {}, ("stage", "n_layers = 61")),
    ({"context": 2048}, {"microbatches": 1}, ("context", "seq_len = 4096")),
    ({"data": 2048}, {}, ("schedule.batch_size", "2048 x 16")),
    ({"expert": 64, "stage": 32}, {"schedule": "none"}, ("--schedule",)),
    ({"expert": 64, "stage": 32}, {"schedule": "gpipe"}, ("gpipe", "zb1p")),
    (
      {"expert": 64, "stage": 32},
      {"microbatches": 8},
      ("--microbatches", "32"),
    ),
  ],
)
def test_what_does_not_divide_is_said(sizes, change, words):
  given = {"batch": 15_360, "microbatches": 16}
  given["schedule"] = "1f1b" if sizes.get("stage", 1) > 1 else "none"
  if sizes.get("context") == 2048:
    sizes = {"context": 4096 * 2}
    chips = 8192
  else:
    chips = 2048
  with pytest.raises(ConfigError) as error:
    mesh.check(plan.Mesh(**sizes), V3, chips, **{**given, **change})
  assert all(word in str(error.value) for word in words), error.value


def test_experts_of_v3_lie_on_8_nodes():
  found = plan.Mesh(data=2, expert=64, stage=16)
  assert found.domains("expert", 8) == 8
  assert found.domains("expert", 72) == 1
  assert plan.Mesh(expert=64, tensor=2).domains("expert", 8) == 16
  assert plan.Mesh(expert=64, tensor=2).domains("tensor", 8) == 1


# Table 2 of the report; F, B, W, F&B in turn.
@pytest.mark.parametrize(
  "schedule, wanted",
  [
    ("1f1b", 15 * (3 + 7)),
    ("zb1p", 15 * (3 + 7 - 2 * 2)),
    ("dualpipe", 7 * (9 + 7 - 3 * 2)),
    ("interleaved", 15 * (3 + 7) / 5),
  ],
)
def test_table2_bubbles(schedule, wanted):
  chunk = pipeline.Chunk(forward=3, backward=7, weights=2, pair=9)
  # Of the same 16 stages in eight devices, each with two of them.
  whole = pipeline.Chunk(forward=6, backward=14, weights=4, pair=18)
  assert pipeline.bubble("dualpipev", 8, whole) == 7 * (9 + 7 - 3 * 2)
  assert pipeline.bubble(schedule, 16, chunk, virtual=5) == wanted
  assert pipeline.bubble(schedule, 1, chunk) == 0


def test_table2_parameters_and_activations():
  for schedule, copies, held in (
    ("1f1b", 1, 16), ("zb1p", 1, 16), ("dualpipe", 2, 17), ("dualpipev", 1, 17),
  ):  # fmt: skip
    assert pipeline.copies(schedule) == copies
    assert pipeline.in_flight(schedule, 16, 120) == held
    assert pipeline.in_flight(schedule, 16, 4) == 4
  assert pipeline.in_flight("interleaved", 16, 120, 4) == 16 + 15 / 4

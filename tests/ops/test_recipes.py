"""Recipes as data: the report's is the report's, and errors name the nearest."""

import pytest

from dsv3.ops import gemm, recipes
from dsv3.ops.fp8 import Operand
from dsv3.ops.products import Products

TILE, ACROSS, SQUARE = (1, 128), (128, 1), (128, 128)


def passes(role="", swiglu=False):
  recipe = recipes.recipe("deepseek_v3")
  return gemm.passes_of(recipe, role, "bfloat16", Products(), swiglu=swiglu)


def test_sec332_the_recipe_of_the_report():
  """E4M3 everywhere; tiles along each contraction, blocks for weights alone."""
  found = passes()
  assert found.fprop_x == found.dgrad_g == Operand("e4m3", TILE, "float32")
  assert found.fprop_w == found.dgrad_w == Operand("e4m3", SQUARE, "float32")
  assert found.wgrad_x == found.wgrad_g == Operand("e4m3", ACROSS, "float32")
  assert found.kept == found.fprop_x  # turned for Wgrad from there
  assert recipes.recipe("deepseek_v3").scaling == "online"


def test_sec333_after_attention_and_swiglu():
  found = passes("attention_out")
  assert found.kept == Operand("e5m6", TILE, "power2")
  assert found.fprop_x == Operand("e4m3", TILE, "power2")
  assert passes(swiglu=True).kept == Operand("e4m3", TILE, "float32")


def test_sec333_what_is_dispatched_has_power_of_two_scales():
  """Rows before the experts' up-projection, gradients before the down one."""
  assert passes("expert_in").fprop_x == Operand("e4m3", TILE, "power2")
  assert passes("expert_in").dgrad_g.scale == "float32"
  assert passes("expert_out").dgrad_g == Operand("e4m3", TILE, "power2")
  assert passes("expert_out").fprop_x.scale == "float32"


def test_appb2_blockwise_differs_in_the_operands_of_dgrad_alone():
  ours, theirs = (
    vars(recipes.recipe(name)) for name in ("deepseek_v3", "blockwise_128")
  )
  differ = {key for key in ours if ours[key] != theirs[key]}
  assert differ == {"name", "dgrad_g", "dispatch_g"}
  assert theirs["dgrad_g"].tile == SQUARE


def test_mxfp8_has_32_along_every_contraction():
  r = recipes.recipe("mxfp8")
  along = {"fprop_x": 1, "fprop_w": 0, "dgrad_g": 1, "dgrad_w": 1}
  along |= {"wgrad_x": 0, "wgrad_g": 0}
  for name, dim in along.items():
    how = getattr(r, name)
    assert (how.tile[dim], how.tile[1 - dim], how.scale) == (32, 1, "e8m0"), (
      name
    )


def test_bf16_quantises_nothing_and_the_others_do():
  assert [n for n, r in recipes.RECIPES.items() if not r.quantises] == ["bf16"]


def test_a_recipe_is_a_few_changes_of_another():
  changed = recipes.recipe("deepseek_v3", ["dgrad_g=e4m3 128x128"])
  assert changed.dgrad_g == Operand("e4m3", SQUARE)
  assert changed.wgrad_g == recipes.recipe("deepseek_v3").wgrad_g


@pytest.mark.parametrize(
  "name, changes, words",
  [
    ("deepseek_v4", (), "found 'deepseek_v4'.*did you mean deepseek_v3"),
    ("bf16", ["fprop=e4m3 1x128"], "did you mean fprop_x"),
    ("bf16", ["fprop_x"], "wanted FIELD=VALUE"),
    ("bf16", ["fprop_x=e4m4 1x128"], "found 'e4m4 1x128', wanted bf16 or"),
    ("bf16", ["rounding=up"], "found 'up', wanted one of nearest, stochastic"),
    ("delayed", ["history=0"], "found '0', wanted steps"),
    ("deepseek_v3", ["scaling=delayed"], "wanted tiles of"),
    ("deepseek_v3", ["wgrad_x=e4m3 96x1"], "would have rows of two experts"),
    ("deepseek_v3", ["dgrad_g=e4m3 256x128"], "would have rows of two experts"),
    (
      "deepseek_v3",
      ["accumulation=promoted", "dispatch_x=e4m3 1x16"],
      "along the sums of fprop of experts",
    ),
    ("deepseek_v3", ["accumulation=hopper"], "wanted tiles of"),
  ],
)
def test_what_is_no_recipe_is_named(name, changes, words):
  with pytest.raises(ValueError, match=words):
    recipes.recipe(name, changes)

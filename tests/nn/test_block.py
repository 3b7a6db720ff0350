"""Blocks under recomputation, baselines of attention, weights from a seed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from dsv3.nn import block, transformer
from dsv3.ops import gemm
from tests import micro

SEGMENTS_BL = jnp.ones((2, 32), jnp.int32)


def saved(remat, ffn, capsys) -> list[str]:
  """A line for every array that a block keeps for its gradient."""
  model = micro.config_of({"model.remat": remat}).model
  made = block.Block(
    model, ffn, gemm=gemm.plain("float32"), key=jax.random.key(0)
  )
  capsys.readouterr()
  print_saved_residuals(
    lambda module, x: block.run(module, x, SEGMENTS_BL, remat)[0],
    made,
    jnp.ones((2, 32, 32)),
  )
  lines = capsys.readouterr().out.splitlines()
  free = ("from the argument", "from a constant", "from a literal")
  return [line for line in lines if not any(word in line for word in free)]


@pytest.mark.parametrize("ffn, n_ffn", [("dense", 1), ("moe", 2)])
def test_sec323_paper_keeps_latents_attention_and_swiglu_inputs_alone(
  ffn, n_ffn, capsys
):
  """So norms, up-projections and SwiGLU's output are computed again."""
  lines = saved("paper", ffn, capsys)
  named = [line.split("named '")[-1].split("'")[0] for line in lines]
  wanted = ["c_q", "c_kv", "k_r", "attention_out", "attention_lse", "middle"]
  assert sorted(named) == sorted(wanted + n_ffn * ["ffn_gate_up"])
  assert sorted(set(named)) == sorted(block.KEPT)


def test_full_recomputation_keeps_nothing_and_none_keeps_more(capsys):
  assert saved("full", "moe", capsys) == []
  everything = saved("none", "moe", capsys)
  assert any("(RmsNorm.__call__)" in line for line in everything)


@functools.cache
def parameters(**diff):
  """Weights from seed 0 of the micro model with these fields of `model`."""
  model = micro.config_of(
    {f"model.{k.replace('__', '.')}": v for k, v in diff.items()}
  ).model
  key = jax.random.key(0)
  make = lambda: transformer.split(transformer.make_model(model, key))[1]
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(make())
  }


def test_mha_is_gqa_with_a_key_head_for_every_head():
  mha = parameters(attention__kind="mha", attention__n_kv_heads=1)
  gqa = parameters(attention__kind="gqa", attention__n_kv_heads=2)
  assert mha.keys() == gqa.keys()
  for name in mha:
    np.testing.assert_array_equal(mha[name], gqa[name], name)


def test_weights_of_the_main_model_do_not_depend_on_mtp():
  without, with_mtp = parameters(mtp__depth=0), parameters(mtp__depth=1)
  more = with_mtp.keys() - without.keys()
  assert more == {name for name in with_mtp if "mtp" in name}
  assert len(more) > 10
  for name in without:
    np.testing.assert_array_equal(without[name], with_mtp[name], name)


def test_sec42_weights_are_normal_with_the_config_s_deviation():
  found = parameters(init_std=0.006)
  for name, leaf in found.items():
    assert leaf.dtype == jnp.float32
    if "gain" in name:
      np.testing.assert_array_equal(leaf, 1)
    elif leaf.size > 4000:
      assert float(leaf.std()) == pytest.approx(0.006, rel=0.05), name
      assert abs(float(leaf.mean())) < 6e-4, name
  first, second = found["['moe']['ffn']['experts']['w_gate_up'].value"]
  assert not np.array_equal(first, second)  # layers are drawn apart

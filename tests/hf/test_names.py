"""All tensors of the real checkpoint have their place, and the other way round."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.hf import configs, names, read
from dsv3.nn import transformer
from tests import micro

HERE = pathlib.Path(__file__).parent
R1 = json.loads((HERE / "r1_config.json").read_text())


def published() -> dict[str, tuple]:
  """Name, shape and dtype of the 91,991 tensors of DeepSeek-R1, from patterns."""
  out = {}
  for rule in json.loads((HERE / "r1_tensors.json").read_text()):
    first, last = rule.get("layers", (0, 0))
    for layer in range(first, last + 1):
      low, high = rule.get("experts", (0, 0))
      for expert in range(low, high + 1):
        name = rule["name"].format(L=layer, E=expert)
        out[name] = tuple(rule["shape"]), rule["dtype"]
  return out


def test_all_91991_tensors_of_the_release_map_to_ours_and_back():
  model = config.build(configs.from_hf(R1)).model
  ours = {}
  for tensor in names.tensors(model):
    ours[tensor.name] = tensor.shape, tensor.dtype
    if tensor.dtype == "F8_E4M3":
      ours[tensor.scale_name] = tensor.scale_shape, "F32"
  theirs = published()
  assert len(theirs) == 91_991
  assert ours == theirs
  size = sum(names.n_bytes(t, fp8=True) for t in names.tensors(model))
  assert size == 688_574_839_360


@pytest.mark.parametrize(
  "diff", [{}, {"model.attention.q_rank": 0}, {"model.mtp.depth": 2}]
)
def test_every_number_of_every_parameter_is_in_one_tensor(diff):
  """Each tensor of distinct numbers; every parameter then has them all once."""
  model = micro.config_of(diff).model
  trees = jax.eval_shape(
    lambda: transformer.split(transformer.make_model(model, jax.random.key(0)))[
      1:
    ]
  )
  filled = {
    read.path_text(path): np.zeros(leaf.shape, np.int64)
    for tree in trees
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  first = 1
  for tensor in (t for t in names.tensors(model) if not t.is_copy):
    size = int(np.prod(tensor.shape))
    numbers = np.arange(first, first + size).reshape(tensor.shape)
    first += size
    back = np.zeros_like(numbers)
    for part in tensor.parts:
      place = filled[part.path][part.at]
      assert not place.any(), part
      place[...] = part.of(numbers).reshape(place.shape)
      part.put(back, place)
    np.testing.assert_array_equal(back, numbers)
  assert all((value > 0).all() for value in filled.values())


def test_config_of_the_release_is_the_paper_s_network_and_comes_back():
  found = config.build(configs.from_hf(R1)).model
  paper = overlay.load("v3_671b", ["model.rope.yarn_factor=40.0"])
  wanted = config.build(paper).model
  differs = overlay.difference(
    dataclasses.asdict(wanted), dataclasses.asdict(found)
  )
  assert differs == {
    "mtp.concat": ("hidden_embedding", "embedding_hidden"),
    "precision.recipe": ("deepseek_v3", "bf16"),  # of training, not of weights
  }
  back = configs.to_hf(found)
  assert config.build(configs.from_hf(back)).model == found
  for key in back.keys() & R1.keys():
    assert back[key] == R1[key], key


V2_LITE = {  # what the released config says, where it differs from V3's
  "model_type": "deepseek_v2",
  "scoring_func": "softmax",
  "topk_method": "greedy",
  "norm_topk_prob": False,
  "q_lora_rank": None,
  "n_group": 1,
  "topk_group": 1,
  "n_shared_experts": 2,
  "routed_scaling_factor": 1.0,
  "num_nextn_predict_layers": 0,
}


def test_config_of_v2_lite_has_softmax_no_query_rank_and_mscale_of_0707():
  rope = R1["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}
  model = config.build(
    configs.from_hf(R1 | V2_LITE | {"rope_scaling": rope})
  ).model
  assert (model.moe.gate, model.moe.group_score) == ("softmax", "max")
  assert not model.moe.has_bias and not model.moe.normalize
  assert (model.attention.q_rank, model.mtp.depth) == (0, 0)
  assert model.rope.mscale == 0.707
  assert config.build(configs.from_hf(configs.to_hf(model))).model == model


@pytest.mark.parametrize(
  "change, wanted",
  [
    ({"model_type": "llama"}, "model_type: found 'llama'"),
    ({"sliding_window": 4096}, "unknown fields: sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings: found True"),
    ({"num_key_value_heads": 8}, "num_key_value_heads: found 8"),
    ({"topk_method": "sinkhorn"}, "topk_method 'sinkhorn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "found type 'linear'"),
    (
      {"rope_scaling": R1["rope_scaling"] | {"mscale": 0.5}},
      "mscale 0.5 and mscale_all_dim 1.0",
    ),
    (
      {"rope_scaling": R1["rope_scaling"] | {"attention_factor": 2}},
      "unknown fields: attention_factor",
    ),
    ({"num_experts_per_tok": 200}, "model.moe.top_k"),
  ],
)
def test_a_field_that_is_not_supported_is_named(change, wanted):
  with pytest.raises(ConfigError) as caught:
    config.build(configs.from_hf(R1 | change))
  assert wanted in str(caught.value) and "\n" not in str(caught.value)
  with pytest.raises(ConfigError, match="missing: hidden_size"):
    configs.from_hf({k: v for k, v in R1.items() if k != "hidden_size"})


@pytest.mark.parametrize(
  "diff, wanted",
  [
    ({"attention.kind": "gqa"}, "attention.kind: found gqa"),
    ({"ffn": "dense"}, "ffn: found dense"),
  ],
)
def test_a_network_that_the_release_cannot_be_is_named(diff, wanted):
  model = micro.config_of({f"model.{k}": v for k, v in diff.items()}).model
  with pytest.raises(ConfigError, match=wanted):
    configs.to_hf(model)

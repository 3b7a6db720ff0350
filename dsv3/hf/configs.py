"""`config.json` of a released model as a dsv3 config, and back.

A field is mapped, must have the one value that dsv3 can do, or says nothing
about the network. Any other is an error that names it: a field that is ignored
in silence is a network that is not the one of the weights.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dsv3 import config, overlay
from dsv3.config import ConfigError

_MAPPED = {
  "vocab_size": "vocab_size",
  "hidden_size": "dim",
  "num_hidden_layers": "n_layers",
  "intermediate_size": "dense_hidden",
  "rms_norm_eps": "norm_eps",
  "num_attention_heads": "attention.n_heads",
  "q_lora_rank": "attention.q_rank",  # null is our 0
  "kv_lora_rank": "attention.kv_rank",
  "qk_nope_head_dim": "attention.nope_dim",
  "qk_rope_head_dim": "attention.rope_dim",
  "v_head_dim": "attention.v_dim",
  "n_routed_experts": "moe.n_routed",
  "n_shared_experts": "moe.n_shared",
  "num_experts_per_tok": "moe.top_k",
  "moe_intermediate_size": "moe.hidden",
  "n_group": "moe.n_groups",
  "topk_group": "moe.top_groups",
  "norm_topk_prob": "moe.normalize",
  "routed_scaling_factor": "moe.routed_scale",
}
# topk_method: score of a group, bias.
_METHODS = {
  "noaux_tc": ("top2", "bias+sequence"),
  "group_limited_greedy": ("max", "sequence"),
  "greedy": ("max", "sequence"),
}
_ONLY = {  # fields that must have this value where they are there
  "hidden_act": "silu",
  "attention_bias": False,
  "tie_word_embeddings": False,
  "moe_layer_freq": 1,
  "rope_interleave": True,
  "mlp_bias": False,
}
_SILENT = frozenset(
  """
  architectures auto_map model_type torch_dtype dtype transformers_version
  bos_token_id eos_token_id pad_token_id use_cache attention_dropout
  initializer_range aux_loss_alpha seq_aux ep_size pretraining_tp
  max_position_embeddings head_dim qk_head_dim num_key_value_heads
  first_k_dense_replace num_nextn_predict_layers num_mtp_layers scoring_func
  topk_method rope_theta rope_scaling rope_parameters quantization_config
  _name_or_path output_router_logits num_local_experts return_dict chunk_size_feed_forward
  """.split()
)
_YARN = {  # field of rope_scaling: ours, and its default
  "factor": ("yarn_factor", 1.0),
  "original_max_position_embeddings": ("original_len", 4096),
  "beta_fast": ("beta_fast", 32.0),
  "beta_slow": ("beta_slow", 1.0),
  "mscale_all_dim": ("mscale", 0.0),
}


def from_hf(
  values: Mapping[str, Any], mtp_depth: int | None = None
) -> ConfigDict:
  """A dsv3 config whose network is that of a `config.json`.

  What is not the network (data, optimizer, schedule) is the report's.

  Args:
    mtp_depth: MTP modules that the folder holds, if not as many as it says.
  """
  kind = values.get("model_type")
  if kind not in ("deepseek_v3", "deepseek_v2"):
    raise ConfigError(
      f"config.json: model_type: found {kind!r}, wanted deepseek_v3 or "
      "deepseek_v2"
    )
  known = _MAPPED.keys() | _ONLY.keys() | _SILENT
  if unknown := sorted(values.keys() - known):
    raise ConfigError(f"config.json: unknown fields: {', '.join(unknown)}")
  for key, wanted in _ONLY.items():
    if values.get(key, wanted) != wanted:
      raise ConfigError(
        f"config.json: {key}: found {values[key]!r}, supported is {wanted!r}"
      )
  if missing := sorted(_MAPPED.keys() - values.keys() - {"q_lora_rank"}):
    raise ConfigError(f"config.json: missing: {', '.join(missing)}")
  _check_blocks(values.get("quantization_config"))
  heads = values["num_attention_heads"]
  if values.get("num_key_value_heads", heads) != heads:
    raise ConfigError(
      f"config.json: num_key_value_heads: found {values['num_key_value_heads']}"
      f", supported is num_attention_heads = {heads}"
    )
  diff = {
    f"model.{ours}": values[k] for k, ours in _MAPPED.items() if k in values
  }
  diff["model.attention.q_rank"] = values.get("q_lora_rank") or 0
  for ours in ("moe.n_groups", "moe.top_groups", "moe.n_shared"):
    if diff[f"model.{ours}"] is None:  # V2-Lite's
      diff[f"model.{ours}"] = 0 if ours == "moe.n_shared" else 1
  diff |= _gate(values, kind) | _rope(values)
  if mtp_depth is None:
    mtp_depth = mtp_layers(values)
  first = values.get("first_k_dense_replace", 0)
  dense = {"model.ffn": "dense"} if first >= diff["model.n_layers"] else {}
  tree = overlay.load(str(overlay.CONFIGS / "v3_671b.py"))
  return overlay.overlay(
    tree,
    diff
    | dense
    | {
      "name": kind,
      # Weights to look at and to decode with; training in FP8 is one diff away.
      "model.precision.recipe": "bf16",
      "model.attention.n_kv_heads": heads,
      "model.n_dense_layers": min(first, diff["model.n_layers"]),
      "model.mtp.depth": mtp_depth,
      # The order of eh_proj on disk, and the state that engines feed it.
      "model.mtp.concat": "embedding_hidden",
      "model.mtp.hidden": "after_norm",
    },
  )


def _check_blocks(found: Mapping[str, Any] | None) -> None:
  """FP8 blocks of 128 x 128 are the one quantisation that is read."""
  wanted = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
  }
  for key, value in wanted.items():
    if found and found.get(key, value) != value:
      raise ConfigError(
        f"config.json: quantization_config.{key}: found {found[key]!r}, "
        f"supported is {value!r}"
      )


def mtp_layers(values: Mapping[str, Any]) -> int:
  """MTP modules that a `config.json` speaks of."""
  key = "num_nextn_predict_layers"
  return values.get(key, values.get("num_mtp_layers", 0)) or 0


def _gate(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
  v3 = kind == "deepseek_v3"
  method = values.get("topk_method", "noaux_tc" if v3 else "greedy")
  gate = values.get("scoring_func", "sigmoid" if v3 else "softmax")
  if method not in _METHODS or gate not in ("sigmoid", "softmax"):
    raise ConfigError(
      f"config.json: found topk_method {method!r} and scoring_func {gate!r}, "
      f"supported are {', '.join(_METHODS)}, and sigmoid and softmax"
    )
  score, balancing = _METHODS[method]
  groups = {}
  if method == "greedy":  # all experts are one group, whatever n_group says
    groups = {"model.moe.n_groups": 1, "model.moe.top_groups": 1}
  return groups | {
    "model.moe.gate": gate,
    "model.moe.group_score": score,
    "model.moe.balancing": balancing,
  }


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
  """RoPE and YaRN, in the old fields or in `rope_parameters`."""
  scaling = dict(
    values.get("rope_parameters") or values.get("rope_scaling") or {}
  )
  theta = scaling.pop("rope_theta", values.get("rope_theta", 10_000.0))
  out = {"model.rope.theta": theta}
  kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
  scaling.pop("type", None)
  if kind == "default":
    return out
  if kind != "yarn":
    raise ConfigError(
      f"config.json: rope_scaling: found type {kind!r}, supported is yarn"
    )
  if unknown := sorted(scaling.keys() - _YARN.keys() - {"mscale"}):
    raise ConfigError(
      f"config.json: rope_scaling: unknown fields: {', '.join(unknown)}"
    )
  both = scaling.get("mscale"), scaling.get("mscale_all_dim")
  if both[0] != both[1]:  # cos and sin would carry a factor
    raise ConfigError(
      "config.json: rope_scaling: found mscale {} and mscale_all_dim {}, "
      "supported are equal ones".format(*both)
    )
  for key, (ours, default) in _YARN.items():
    out[f"model.rope.{ours}"] = scaling.get(key, default)
  return out


def to_hf(model: config.Model) -> dict[str, Any]:
  """The `config.json` of a model, in the fields of DeepSeek-V3's release.

  Raises ConfigError for a network that the release's code cannot be.
  """
  a, m, r = model.attention, model.moe, model.rope
  for ok, key, found, wanted in (
    (a.kind == "mla", "attention.kind", a.kind, "mla"),
    (model.ffn == "moe", "ffn", model.ffn, "moe"),
    (m.n_shared > 0, "moe.n_shared", m.n_shared, "1 or more"),
    (
      m.has_bias == (m.group_score == "top2"),
      "moe.group_score",
      m.group_score,
      "top2 with a bias, max without",
    ),
    (
      m.bias_form == "additive" or not m.has_bias,
      "moe.bias_form",
      m.bias_form,
      "additive",
    ),
    (
      m.has_bias or not model.mtp.depth,
      "moe.balancing",
      m.balancing,
      "one with a bias: V2 has no MTP",
    ),
  ):
    if not ok:
      raise ConfigError(
        f"config.model.{key}: found {found}, wanted {wanted}: Hugging Face's "
        "DeepSeek has nothing else"
      )
  kind = "deepseek_v3" if m.has_bias else "deepseek_v2"
  short = "V3" if m.has_bias else "V2"
  values = {
    "architectures": [f"Deepseek{short}ForCausalLM"],
    "model_type": kind,
    "first_k_dense_replace": model.n_dense_layers,
    "num_key_value_heads": a.n_heads,
    "num_nextn_predict_layers": model.mtp.depth,
    "scoring_func": m.gate,
    "topk_method": _method(m),
    "rope_theta": r.theta,
    "rope_scaling": None,
    "max_position_embeddings": int(r.original_len * r.yarn_factor),
    "torch_dtype": "bfloat16",
  }
  values |= _ONLY | {theirs: _find(model, o) for theirs, o in _MAPPED.items()}
  values["q_lora_rank"] = a.q_rank or None
  if r.yarn_factor > 1:
    values["rope_scaling"] = {
      "type": "yarn",
      "mscale": r.mscale,
      **{theirs: getattr(r, ours) for theirs, (ours, _) in _YARN.items()},
    }
  return dict(sorted(values.items()))


def _method(m: config.Moe) -> str:
  if m.has_bias:
    return "noaux_tc"
  return "greedy" if m.n_groups == 1 else "group_limited_greedy"


def _find(model: config.Model, path: str) -> Any:
  value = model
  for name in path.split("."):
    value = getattr(value, name)
  return value

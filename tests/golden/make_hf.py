"""Regenerates `hf_*.npz`: what Hugging Face's DeepseekV3 computes.

  python tests/golden/make_hf.py

Written with torch 2.13.0 (CPU) and transformers 5.23.0; nothing of dsv3 or of
the oracle is used. Each file is one small random model in float32, weights
already under our names and in our shapes:

  config        JSON, in the fields of the `model` group of a config
  versions      JSON
  rows          [2, 25] token ids: 24 inputs, labels one further
  param/...     all weights, float16 (each value is exact there, and in float32)
  logits/k      [2, 24 - k, W] of the main model (0) and of MTP depth k
  losses        [1 + depth] cross-entropy of each depth over the 48 main labels
  load          [MoE layers and MTP modules, E] tokens that chose an expert
  grad/...      gradients of losses[0] + 0.3 mean(losses[1:]) by some parameters;
                .../experts/w_gate/3 is that of expert 3 alone

Biases are positive but in `hf_mtp`: with negative ones it matters that the
experts of dropped groups are masked with -inf. transformers 5.23 does so;
older releases mask with 0.0 and give another file.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.modeling_layers import MtpModel

HERE = pathlib.Path(__file__).parent
MTP_WEIGHT = 0.3

BASE = {
  "vocab_size": 32,
  "dim": 12,
  "n_layers": 2,
  "n_dense_layers": 1,
  "dense_hidden": 20,
  "norm_eps": 1e-6,
  "attention": {
    "kind": "mla",
    "n_heads": 2,
    "q_rank": 10,
    "kv_rank": 9,
    "nope_dim": 8,
    "rope_dim": 4,
    "v_dim": 6,
  },
  "rope": {
    "theta": 10000.0,
    "yarn_factor": 1.0,
    "original_len": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
  },
  "moe": {
    "n_routed": 8,
    "n_shared": 1,
    "top_k": 2,
    "hidden": 8,
    "n_groups": 4,
    "top_groups": 2,
    "routed_scale": 2.5,
  },
  "mtp": {"depth": 0, "hidden": "after_norm"},
}
YARN = {  # its ramp runs over all four pairs; 24 tokens are past the length
  "theta": 100.0,
  "yarn_factor": 4.0,
  "original_len": 16,
  "beta_fast": 1.0,
  "beta_slow": 0.05,
}
VARIANTS = {  # name: fields that differ from BASE, and the range of the biases
  "q_rank": ({"n_layers": 3}, (0.1, 0.9)),
  "no_q_rank": ({"attention": {"q_rank": 0}}, (0.1, 0.9)),
  "yarn": ({"attention": {"rope_dim": 8}, "rope": YARN}, (0.1, 0.9)),
  "no_groups": (
    {"moe": {"n_groups": 1, "top_groups": 1, "n_shared": 2}},
    (0.1, 0.9),
  ),
  "mtp": ({"mtp": {"depth": 2}}, (-1.6, -0.8)),
}
GRADIENTS = (  # of the last layer, an MoE layer
  "attn/w_uq attn/w_qr attn/w_dkv attn/w_kr attn/w_uk attn/w_o ffn/centroid"
).split()
MTP_GRADIENTS = "mtp/0/proj mtp/0/enorm mtp/1/hnorm mtp/1/norm".split()


def merge(base: dict, changes: dict) -> dict:
  """`base` with nested `changes`."""
  out = dict(base)
  for key, value in changes.items():
    out[key] = merge(base[key], value) if isinstance(value, dict) else value
  return out


def hf_config(config: dict) -> transformers.DeepseekV3Config:
  """Our fields in the words of transformers."""
  attention, moe, rope = config["attention"], config["moe"], config["rope"]
  rope_parameters = {"rope_type": "default", "rope_theta": rope["theta"]}
  if rope["yarn_factor"] > 1:
    rope_parameters |= {
      "rope_type": "yarn",
      "factor": rope["yarn_factor"],
      "original_max_position_embeddings": rope["original_len"],
      "beta_fast": rope["beta_fast"],
      "beta_slow": rope["beta_slow"],
      "mscale": rope["mscale"],
      "mscale_all_dim": rope["mscale"],
    }
  return transformers.DeepseekV3Config(
    vocab_size=config["vocab_size"],
    hidden_size=config["dim"],
    intermediate_size=config["dense_hidden"],
    moe_intermediate_size=moe["hidden"],
    num_hidden_layers=config["n_layers"],
    first_k_dense_replace=config["n_dense_layers"],
    num_attention_heads=attention["n_heads"],
    num_key_value_heads=attention["n_heads"],
    q_lora_rank=attention["q_rank"] or None,
    kv_lora_rank=attention["kv_rank"],
    qk_nope_head_dim=attention["nope_dim"],
    qk_rope_head_dim=attention["rope_dim"],
    v_head_dim=attention["v_dim"],
    n_routed_experts=moe["n_routed"],
    n_shared_experts=moe["n_shared"],
    num_experts_per_tok=moe["top_k"],
    n_group=moe["n_groups"],
    topk_group=moe["top_groups"],
    routed_scaling_factor=moe["routed_scale"],
    norm_topk_prob=True,
    rms_norm_eps=config["norm_eps"],
    max_position_embeddings=max(64, rope["original_len"]),
    rope_parameters=rope_parameters,
    rope_interleave=True,
    num_mtp_layers=config["mtp"]["depth"],
    attn_implementation="eager",
    experts_implementation="eager",
  )


def randomize(model, bias_range, generator: torch.Generator) -> None:
  """Weights of order one on a coarse grid, which compresses well."""

  def grid(shape, std):
    draw = torch.randn(shape, generator=generator) * std
    return (draw / std * 8).round() / 8 * std

  with torch.no_grad():
    for name, weight in model.named_parameters():
      if name.endswith("norm.weight"):
        weight.copy_(1 + grid(weight.shape, 0.25))
      elif name == "model.embed_tokens.weight":
        weight.copy_(grid(weight.shape, 1.0))
      else:
        weight.copy_(grid(weight.shape, 0.25))
    for name, bias in model.named_buffers():
      if name.endswith("e_score_correction_bias"):
        low, high = bias_range
        draw = torch.rand(bias.shape, generator=generator)
        bias.copy_(((low + (high - low) * draw) * 64).round() / 64)


def ours(tensors: dict, config: dict) -> dict:
  """Weights (or their gradients) of transformers, under our names.

  A Linear of theirs is [out, in], ours [in, out].
  """
  out = {
    "embed": tensors["model.embed_tokens.weight"],
    "norm": tensors["model.norm.weight"],
    "head": tensors["lm_head.weight"].T,
  }
  for layer in range(config["n_layers"]):
    own = strip(tensors, f"model.layers.{layer}.")
    out |= prefix(f"layers/{layer}/", our_block(own, config))
  for k in range(config["mtp"]["depth"]):
    own = strip(tensors, f"mtp.layers.{k}.")
    out[f"mtp/{k}/enorm"] = own["enorm.weight"]
    out[f"mtp/{k}/hnorm"] = own["hnorm.weight"]
    out[f"mtp/{k}/norm"] = own["post_norm.weight"]
    # Theirs is [embedding; hidden], as released; ours the paper's order.
    on_embedding, on_hidden = np.split(own["eh_proj.weight"].T, 2)
    out[f"mtp/{k}/proj"] = np.concatenate([on_hidden, on_embedding])
    block = our_block(strip(own, "mtp_block."), config)
    out |= prefix(f"mtp/{k}/block/", block)
  return out


def our_block(own: dict, config: dict) -> dict:
  """A transformer block of theirs, dense or MoE."""
  out = {
    "attn_norm": own["input_layernorm.weight"],
    "ffn_norm": own["post_attention_layernorm.weight"],
  }
  out |= prefix("attn/", our_attention(strip(own, "self_attn."), config))
  mlp = strip(own, "mlp.")
  if "gate.weight" not in mlp:
    return out | prefix("ffn/", our_ffn(mlp))
  out["ffn/centroid"] = mlp["gate.weight"]
  if "gate.e_score_correction_bias" in mlp:  # among gradients there is none
    out["ffn/bias"] = mlp["gate.e_score_correction_bias"]
  gate, up = np.split(mlp["experts.gate_up_proj"], 2, axis=1)
  out["ffn/experts/w_gate"] = gate.swapaxes(1, 2)
  out["ffn/experts/w_up"] = up.swapaxes(1, 2)
  out["ffn/experts/w_down"] = mlp["experts.down_proj"].swapaxes(1, 2)
  return out | prefix("ffn/shared/", our_ffn(strip(mlp, "shared_experts.")))


def our_attention(own: dict, config: dict) -> dict:
  """MLA. Their q heads are [N | R], kv_b heads [N | V], kv_a is [C | R].

  The rope pairs are interleaved in both, so no channel moves.
  """
  attention = config["attention"]
  heads, n = attention["n_heads"], attention["nope_dim"]
  c = attention["kv_rank"]
  out = {"kv_norm": own["kv_a_layernorm.weight"]}
  if attention["q_rank"]:
    out["w_dq"] = own["q_a_proj.weight"].T
    out["q_norm"] = own["q_a_layernorm.weight"]
    q = own["q_b_proj.weight"].T
  else:
    q = own["q_proj.weight"].T
  q = q.reshape(q.shape[0], heads, -1)
  out["w_uq"], out["w_qr"] = q[..., :n], q[..., n:]
  kv_a = own["kv_a_proj_with_mqa.weight"].T
  out["w_dkv"], out["w_kr"] = kv_a[:, :c], kv_a[:, c:]
  kv_b = own["kv_b_proj.weight"].T.reshape(c, heads, -1)
  out["w_uk"], out["w_uv"] = kv_b[..., :n], kv_b[..., n:]
  w_o = own["o_proj.weight"].T
  out["w_o"] = w_o.reshape(heads, -1, config["dim"])
  return out


def our_ffn(own: dict) -> dict:
  """SwiGLU."""
  return {f"w_{k}": own[f"{k}_proj.weight"].T for k in ("gate", "up", "down")}


def strip(tensors: dict, start: str) -> dict:
  """The entries whose names begin with `start`, without it."""
  return {
    name.removeprefix(start): value
    for name, value in tensors.items()
    if name.startswith(start)
  }


def prefix(start: str, tensors: dict) -> dict:
  """The entries with `start` before their names."""
  return {start + name: value for name, value in tensors.items()}


class WithMtp(transformers.DeepseekV3ForCausalLM):
  """Their model with their MTP layers, teacher-forced on a row."""

  def __init__(self, config):
    super().__init__(config)
    depth = config.num_mtp_layers
    if depth:
      self.mtp = MtpModel(self, depth)

  def all_logits(self, rows: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the main model, then of MTP depth k for L - k positions."""
    inputs = rows[:, :-1]
    hidden = self.model(inputs, use_cache=False).last_hidden_state
    logits = [self.lm_head(hidden)]
    for k in range(1, self.config.num_mtp_layers + 1):
      length = inputs.shape[1] - k
      at = torch.arange(length)[None]
      embedded = self.model.embed_tokens(inputs[:, k:])
      hidden = self.mtp.layers[k - 1](
        embedded,
        hidden[:, :length],
        position_embeddings=self.model.rotary_emb(embedded, at),
        attention_mask=torch.full((length, length), -torch.inf).triu(1),
        position_ids=at,
        past_key_values=None,
      )
      logits.append(self.lm_head(hidden))
    return logits


def losses(logits: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
  """Cross-entropy of every depth over the number of main labels."""
  n_labels = rows[:, 1:].numel()
  return torch.stack(
    [
      torch.nn.functional.cross_entropy(
        x.flatten(0, 1), rows[:, k + 1 :].flatten(), reduction="sum"
      )
      / n_labels
      for k, x in enumerate(logits)
    ]
  )


def make(name: str, changes: dict, bias_range: tuple) -> None:
  """Writes `hf_<name>.npz`."""
  config = merge(BASE, changes)
  generator = torch.Generator().manual_seed(sum(map(ord, name)))
  model = WithMtp(hf_config(config)).float()
  randomize(model, bias_range, generator)
  rows = torch.randint(config["vocab_size"], (2, 25), generator=generator)
  load = []
  n_routed = config["moe"]["n_routed"]

  def count(module, args, out):
    load.append(torch.bincount(out[2].flatten(), minlength=n_routed).numpy())

  for module in model.modules():
    if type(module).__name__ == "DeepseekV3TopkRouter":
      module.register_forward_hook(count)
  logits = model.all_logits(rows)
  loss = losses(logits, rows)
  (loss[0] + MTP_WEIGHT * (loss[1:].mean() if len(loss) > 1 else 0)).backward()

  state = {k: v.numpy() for k, v in model.state_dict().items()}
  params = ours(state, config)
  arrays = {}
  for key, value in params.items():
    arrays[f"param/{key}"] = value.astype(np.float16)
    if not np.array_equal(value, arrays[f"param/{key}"]):
      raise AssertionError(f"{key} is not exact in float16")
  grads = {k: v.grad.numpy() for k, v in model.named_parameters()}
  grads = ours(grads, config)
  last = config["n_layers"] - 1
  kept = ["embed", *(f"layers/{last}/{name}" for name in GRADIENTS)]
  if config["mtp"]["depth"]:
    kept += MTP_GRADIENTS
  else:
    kept.append("head")
  for key in kept:
    arrays[f"grad/{key}"] = grads[key]
  expert = int(load[last - config["n_dense_layers"]].argmax())
  for part in ("gate", "down"):
    key = f"layers/{last}/ffn/experts/w_{part}"
    arrays[f"grad/{key}/{expert}"] = grads[key][expert]
  for k, x in enumerate(logits):
    arrays[f"logits/{k}"] = x.detach().numpy()
  np.savez_compressed(
    HERE / f"hf_{name}.npz",
    config=json.dumps(config),
    versions=json.dumps(
      {"torch": torch.__version__, "transformers": transformers.__version__}
    ),
    rows=rows.numpy().astype(np.int32),
    losses=loss.detach().numpy(),
    load=np.stack(load).astype(np.int32),
    **arrays,
  )


if __name__ == "__main__":
  for variant, (fields, biases) in VARIANTS.items():
    make(variant, fields, biases)

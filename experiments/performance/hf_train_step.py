"""Hugging Face's DeepseekV3 at the same sizes: forward, backward, AdamW.

  pip install -e '.[hf]'
  python experiments/performance/hf_train_step.py s30m --repeats=5

Compiled by torch, with transformers' grouped_mm experts: the fastest of its
ways on a CPU. Prints one JSON line, as `python -m dsv3.bench.train_step` does.
"""

import argparse
import json
import pathlib
import statistics
import time

import torch
import transformers

from dsv3 import config, overlay

HERE = pathlib.Path(__file__).parent


def hugging_face_config(model: config.Model) -> transformers.DeepseekV3Config:
  """The same network in Hugging Face's words."""
  a, m = model.attention, model.moe
  return transformers.DeepseekV3Config(
    vocab_size=model.vocab_size,
    hidden_size=model.dim,
    num_hidden_layers=model.n_layers,
    first_k_dense_replace=model.n_dense_layers,
    intermediate_size=model.dense_hidden,
    moe_intermediate_size=m.hidden,
    num_attention_heads=a.n_heads,
    num_key_value_heads=a.n_heads,
    q_lora_rank=a.q_rank or None,
    kv_lora_rank=a.kv_rank,
    qk_nope_head_dim=a.nope_dim,
    qk_rope_head_dim=a.rope_dim,
    v_head_dim=a.v_dim,
    n_routed_experts=m.n_routed,
    n_shared_experts=m.n_shared,
    num_experts_per_tok=m.top_k,
    n_group=m.n_groups,
    topk_group=m.top_groups,
    routed_scaling_factor=m.routed_scale,
    norm_topk_prob=m.normalize,
    rms_norm_eps=model.norm_eps,
    use_cache=False,
  )


def measure(name: str, batch_size: int, repeats: int, threads: int) -> dict:
  """Seconds of `repeats` steps after two that do not count, and what follows."""
  torch.manual_seed(0)
  torch.set_num_threads(threads)
  values = config.build(overlay.load(str(HERE / f"{name}.py")))
  model = transformers.AutoModelForCausalLM.from_config(
    hugging_face_config(values.model),
    attn_implementation="sdpa",
    experts_implementation="grouped_mm",
    dtype=torch.float32,
  )
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )
  shape = (batch_size, values.data.seq_len)
  ids = torch.randint(0, values.model.vocab_size, shape)

  def loss_of(ids):
    return model(input_ids=ids, labels=ids).loss

  loss_of = torch.compile(loss_of)
  seconds = []
  for i in range(repeats + 2):
    start = time.perf_counter()
    loss_of(ids).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if i >= 2:
      seconds.append(time.perf_counter() - start)
  tokens = ids.numel()
  return {
    "config": name,
    "stack": "transformers, torch.compile, grouped_mm",
    "tokens_per_second": round(tokens / statistics.median(seconds), 1),
    "fastest": round(tokens / min(seconds), 1),
    "slowest": round(tokens / max(seconds), 1),
    "repeats": repeats,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("config", choices=("s30m", "s100m"))
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--threads", type=int, default=2)
  args = parser.parse_args()
  print(
    json.dumps(measure(args.config, args.batch, args.repeats, args.threads))
  )


if __name__ == "__main__":
  main()

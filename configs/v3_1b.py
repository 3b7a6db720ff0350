"""The 1B mixture of the loss-free balancing paper, with V3's architecture.

Sizes and training of its Table 1 (arXiv 2408.15664): 1 dense and 9 MoE layers,
2 shared and 64 routed experts of which 6 a token, 2048 positions, 100B tokens.
Attention is MLA at ranks in V3's proportions; the paper's is unpublished.
"""

BASE = "v3_671b"
DIFF = {
  "name": "v3_1b",
  "model.vocab_size": 32_064,
  "model.dim": 1024,
  "model.n_layers": 10,
  "model.n_dense_layers": 1,
  "model.dense_hidden": 4096,  # unpublished; ours: 4 x dim
  "model.precision.recipe": "bf16",
  "model.attention.n_heads": 8,
  "model.attention.n_kv_heads": 8,
  "model.attention.q_rank": 0,
  "model.attention.kv_rank": 256,
  "model.moe.n_routed": 64,
  "model.moe.n_shared": 2,
  "model.moe.top_k": 6,
  "model.moe.hidden": 512,  # granularity 16/3 of 8/3 x dim, rounded to 128
  "model.moe.n_groups": 1,
  "model.moe.top_groups": 1,
  "model.moe.balancing": "bias",
  "model.mtp.depth": 0,
  "data.seq_len": 2048,
  "data.fim_rate": 0.0,
  "data.split_rate": 0.0,
  "schedule.time": "share",
  "schedule.warmup_steps": 1000,
  "schedule.lr_peak": 1e-3,
  "schedule.lr_end": 1e-4,
  "schedule.lr_last": 1e-4,
  "schedule.lr_constant_tokens": 0.0,  # a cosine over the whole run
  "schedule.lr_cosine_tokens": 14.8e12,
  "schedule.lr_last_tokens": 0.0,
  "schedule.bias_speed_tokens": 14.8e12,
  "schedule.batch_size": 1152,
  "schedule.batch_size_start": 1152,
  "train.tokens": 100e9,
  "train.steps": 40_000,
}

"""The report's small ablation model: 15.7B parameters, 2.4B active.

Its sizes are DeepSeek-V2-Lite's; the gate, the balancing and the schedule are
V3's. Trained for 1.33T tokens in Tables 4 and 5.
"""

BASE = "v3_671b"
DIFF = {
  "name": "v3_16b",
  "model.vocab_size": 102_400,
  "model.dim": 2048,
  "model.n_layers": 27,
  "model.n_dense_layers": 1,
  "model.dense_hidden": 10_944,
  "model.attention.n_heads": 16,
  "model.attention.n_kv_heads": 16,
  "model.attention.q_rank": 0,
  "model.moe.n_routed": 64,
  "model.moe.n_shared": 2,
  "model.moe.top_k": 6,
  "model.moe.hidden": 1408,
  "model.moe.n_groups": 1,
  "model.moe.top_groups": 1,
  "schedule.time": "share",
  "schedule.lr_peak": 4.2e-4,  # DeepSeek-V2-Lite's
  "schedule.lr_end": 4.2e-5,  # unpublished; ours: peak / 10, as V3
  "schedule.lr_last": 1.4e-5,  # unpublished; ours: peak / 30, as V3
  "schedule.batch_size": 4608,  # DeepSeek-V2-Lite's
  "schedule.batch_size_start": 4608,
  "train.tokens": 1.33e12,  # Tables 4 and 5
}

"""The report's large ablation model: 228.7B parameters, 20.9B active.

Its sizes are DeepSeek-V2's with V3's vocabulary and three dense layers, the
combination that meets both published counts (Sec. 4.5). Trained for 540B
tokens in Table 4 and 578B in Table 5.
"""

BASE = "v3_671b"
DIFF = {
  "name": "v3_230b",
  "model.dim": 5120,
  "model.n_layers": 60,
  "model.dense_hidden": 12_288,
  "model.moe.n_routed": 160,
  "model.moe.n_shared": 2,
  "model.moe.top_k": 6,
  "model.moe.hidden": 1536,
  "model.moe.top_groups": 3,
  "schedule.time": "share",
  "schedule.lr_peak": 2.4e-4,  # DeepSeek-V2's; the ablation's is unpublished
  "schedule.lr_end": 2.4e-5,  # unpublished; ours: peak / 10, as V3
  "schedule.lr_last": 8e-6,  # unpublished; ours: peak / 30, as V3
  "schedule.batch_size": 9216,  # DeepSeek-V2's
  "schedule.batch_size_start": 2304,  # DeepSeek-V2's
  "schedule.batch_ramp_stages": 3,  # so that the stairs are multiples of 2304
  "train.tokens": 540e9,  # Table 4
}

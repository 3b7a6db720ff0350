"""The first stage of context extension: 4K to 32K in 1000 steps (Sec. 4.3).

Goes on from the weights of the pre-training run.
"""

BASE = "v3_671b"
DIFF = {
  "name": "v3_671b_32k",
  "model.rope.yarn_factor": 40.0,  # Sec. 4.3: s, the same in both stages
  "data.seq_len": 32_768,  # Sec. 4.3
  "schedule.horizon_tokens": 1000 * 1920 * 32_768.0,
  "schedule.warmup_steps": 0,  # unpublished; ours
  "schedule.lr_peak": 7.3e-6,  # Sec. 4.3: as at the end of pre-training
  "schedule.lr_constant_tokens": 1000 * 1920 * 32_768.0,
  "schedule.lr_cosine_tokens": 0.0,
  "schedule.lr_end": 7.3e-6,
  "schedule.lr_last_tokens": 0.0,
  "schedule.mtp_weight": 0.1,  # unpublished; ours: as it was last
  "schedule.bias_speed": 0.0,  # unpublished; ours: as it was last
  "schedule.batch_size": 1920,  # Sec. 4.3
  "schedule.batch_size_start": 1920,
  "schedule.batch_ramp_tokens": 0.0,
  "train.start_from": "runs/v3_671b",
  "train.tokens": 1000 * 1920 * 32_768.0,  # Sec. 4.3: 1000 steps
}

"""The model of the FP8 comparison: tiny, in BF16, with rows of 128 tokens.

Widths are not all multiples of 128, so that tiles at an edge are in it too.
"""

BASE = "tiny"
DIFF = {
  "name": "fp8",
  "model.dtype": "bfloat16",
  "model.layers": "unrolled",
  "data.seq_len": 128,
  "schedule.warmup_steps": 30,
  "train.steps": 1000,
  "train.max_minutes": 0.0,
  "train.log_every": 1,
  "train.eval_every": 0,
  "train.checkpoint_every": 500,
}

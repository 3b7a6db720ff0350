"""The model of experiments/fp8 at a sixth of its learning rate.

There two runs that differ in rounding alone part by 1 to 2%: nothing smaller can
be seen. `float32` here shows what rounding alone does.
"""

BASE = "../fp8/base"
DIFF = {
  "name": "fp8_calm",
  "schedule.lr_peak": 5e-4,
  "schedule.lr_end": 5e-5,
  "schedule.lr_last": 2e-5,
  "train.final_eval_batches": 64,
  "train.checkpoint_every": 1000,
}

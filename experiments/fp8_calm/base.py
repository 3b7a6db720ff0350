"""The model of experiments/fp8 at the report's learning rate, 2.2e-4 (Sec. 4.2).

There, at 3e-3, two runs that differ in rounding alone part by 1 to 2%, and at
5e-4 still by 0.3%: nothing smaller can be seen. `float32` here shows what
rounding alone does.
"""

BASE = "../fp8/base"
DIFF = {
  "name": "fp8_calm",
  "schedule.lr_peak": 2.2e-4,
  "schedule.lr_end": 2.2e-5,
  "schedule.lr_last": 7.3e-6,
  "train.final_eval_batches": 64,
  "train.checkpoint_every": 1000,
}

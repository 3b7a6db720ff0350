"""`experiments/ablation.py` with two rows a step: on budgets this small, steps are what
a larger model has too few of."""

BASE = "../ablation"
DIFF = {
  "name": "ladder",
  "schedule.batch_size": 2,
  "schedule.batch_size_start": 2,
  "train.log_every": 20,
  "train.final_eval_batches": 512,
  "train.checkpoint_every": 1000,
}

"""`tiny` as it is, for 250 steps, and with a tenth of the files held out."""

BASE = "tiny"
DIFF = {
  "name": "balance_rest",
  "data.heldout": 0.1,
  "train.steps": 250,
  "train.max_minutes": 0.0,
  "train.log_every": 1,
  "train.eval_every": 0,
  "train.final_eval_batches": 128,
  "train.checkpoint_every": 50,
  "train.checkpoints_kept": 6,
}

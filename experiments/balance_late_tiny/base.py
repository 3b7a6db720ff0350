"""As `experiments/balance_rest`: `tiny` itself, for 250 steps."""

BASE = "../balance_rest/base"
DIFF = {
  "name": "balance_late_tiny",
  "train.checkpoint_every": 250,
  "train.checkpoints_kept": 1,
}

"""The tiny config at a length of which twelve runs fit into half an hour."""

BASE = "tiny"
DIFF = {
  "name": "balance",
  "train.steps": 200,
  "train.log_every": 1,
  "train.eval_every": 100,
  "train.checkpoint_every": 100,
  "train.checkpoints_kept": 1,
}

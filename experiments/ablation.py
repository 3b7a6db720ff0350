"""The size at which this repository answers questions on two CPU cores.

`tiny` with shorter rows and a quarter of the steps: a run takes half a minute to
a minute, so that an arm of three seeds is cheap.
"""

BASE = "tiny"
DIFF = {
  "name": "ablation",
  "data.seq_len": 128,
  "train.steps": 250,
  "train.max_minutes": 0.0,
  "train.log_every": 1,
  "train.eval_every": 0,
  "train.final_eval_batches": 128,
  "train.checkpoint_every": 250,
  "train.checkpoints_kept": 1,
}

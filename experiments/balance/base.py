"""As `experiments/ablation.py`, and longer: a bias of speed 0.003 takes some 250 steps
to what the first gradients do to the load."""

BASE = "../ablation"
DIFF = {"name": "balance", "train.steps": 400, "train.final_eval_batches": 256}

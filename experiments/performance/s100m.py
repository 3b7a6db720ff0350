"""The 100M class of the comparison: what other stacks can run as well."""

BASE = "v3_100m"
DIFF = {
  "name": "s100m",
  "model.dtype": "float32",
  "model.remat": "none",
  "model.mtp.depth": 0,
  "model.moe.balancing": "bias",
  "optimizer.moment_dtype": "float32",
  "train.ema_decay": 0.0,
}

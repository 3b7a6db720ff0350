"""The model that all arms go on with: experiments/fp8's in BF16, 2,000 steps."""

BASE = "../fp8/base"
DIFF = {
  "name": "fp8_start",
  "train.steps": 2000,
  "train.seed": 100,
  "train.checkpoint_every": 2000,
}

"""300 steps more of a trained model, at a rate where rounding changes little."""

BASE = "../fp8_calm/base"
DIFF = {
  "name": "fp8_trained",
  "train.start_from": "runs/fp8_start",
  "schedule.warmup_steps": 50,
  "train.steps": 300,
}

"""The few efficiencies that are fitted, and the spread they leave.

Written by `python -m dsv3.plan.backtest --write`; a test regenerates them.
Shares of the peak that a large dense product reaches inside a whole step.
"""

SHARE = {
  ("blackwell", "bf16"): 0.4742,
  ("blackwell", "fp8"): 0.5082,
  ("hopper", "bf16"): 0.617,
  ("hopper", "fp8"): 0.3855,
  ("tpu", "bf16"): 0.4215,
  ("tpu", "fp8"): 0.274,
}
# Measured over planned tokens/s, the least and the most of the anchors.
SPREAD = {
  ("blackwell", "bf16"): (0.9, 1.104),
  ("blackwell", "fp8"): (0.6, 1.184),
  ("hopper", "bf16"): (0.78, 1.1),
  ("hopper", "fp8"): (0.9, 1.1),
  ("tpu", "bf16"): (0.9, 1.1),
  ("tpu", "fp8"): (0.9, 1.1),
}
# Of a CPU's measured product (`here.chip`): the mean, least and most of four
# runs (tiny on two machines, 30M, 100M: 0.48, 0.72, 1.24, 1.44); the first is the
# README's run of 2026-11-27, two cores of an AMD EPYC, 6bc7480.
SHARE["cpu", "bf16"] = 0.97
SPREAD["cpu", "bf16"] = (0.49, 1.48)
# FP8 is emulated there, in steps twice as long (experiments/performance).
SHARE["cpu", "fp8"] = SHARE["cpu", "bf16"] / 2
SPREAD["cpu", "fp8"] = SPREAD["cpu", "bf16"]

# Share of the roofline that decoding reaches in servers.
SERVED = 0.724
# Seconds that a layer of decoding costs beyond its roofline.
LAYER = 0.0001714
# Least and most of measured over planned decoding speed.
SERVED_SPREAD = (0.374, 1.579)

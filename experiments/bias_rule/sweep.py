"""How should the bias move, and how should it count?"""

from dsv3.lab.sweep import arms, chain, product

BASE = "../ablation"
BASELINE = "sign=0.003"
METRICS = ["loss", "max_vio"]


def runs():
  bias = {"model.moe.balancing": "bias"}
  step = lambda kind, speed: (
    f"{kind}={speed}",
    {"model.moe.bias_step": kind, "schedule.bias_speed": speed},
  )
  steps = [step("sign", speed) for speed in (0.0003, 0.003, 0.03)]
  steps += [step("proportional", speed) for speed in (0.003, 0.03)]
  softmax = {"model.moe.gate": "softmax"}
  others = arms(
    {
      "multiplicative": {"model.moe.bias_form": "multiplicative"},
      "softmax": softmax,
      "softmax+proportional": softmax | {"model.moe.bias_step": "proportional"},
    }
  )
  return product([("", bias)], chain(steps, others))

"""Many small experts or few large ones, with and without a shared one?"""

from dsv3.lab.sweep import arms

BASE = "../ablation"
BASELINE = "16_of_96"


def runs():
  # Equal parameters and FLOPs: experts times their width stay, of all and of a
  # token's, shared ones included. No groups, which 15 and 14 experts have not.
  split = lambda n, k, width, shared=0: {
    "model.moe.n_routed": n,
    "model.moe.top_k": k,
    "model.moe.hidden": width,
    "model.moe.n_shared": shared,
    "model.moe.n_groups": 1,
    "model.moe.top_groups": 1,
  }
  return arms(
    {
      "8_of_192": split(8, 2, 192),
      "16_of_96": split(16, 4, 96),
      "32_of_48": split(32, 8, 48),
      "1_shared": split(15, 3, 96, shared=1),
      "2_shared": split(14, 2, 96, shared=2),
    }
  )

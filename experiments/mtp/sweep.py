"""What do MTP modules bring, to the loss and to decoding?"""

import statistics

from dsv3.lab.sweep import arms

BASE = "../ablation"
BASELINE = "depth=0"


def runs():
  # The main model is the same: equal main parameters and FLOPs (Table 4).
  return arms({f"depth={n}": {"model.mtp.depth": n} for n in range(3)})


def measure(workdir):
  """Shares of the drafts that are kept on held-out text, by position, greedy."""
  from dsv3.data.batches import Batches
  from dsv3.eval import drafting
  from dsv3.infer import acceptance
  from dsv3.train.restore import restore

  trained = restore(workdir)
  if not trained.values.model.mtp.depth:
    return {}
  heldout = Batches(trained.values, 0, "heldout")
  greedy = drafting.SAMPLINGS["greedy"]
  kept = drafting.accepted(trained.model, heldout, n_drafts=2, sampling=greedy)
  rates = acceptance(kept, 2)
  return {f"accepted_{i}": rate for i, rate in enumerate(rates, 1)}


def answer(lines, folder):
  """Acceptance of every arm."""
  notes = []
  for name, of_arm in lines.items():
    for key in ("accepted_1", "accepted_2"):
      found = [line["final"][key] for line in of_arm if key in line["final"]]
      if found:
        notes.append(
          f"{name}: {key.replace('_', ' at position ')}: "
          f"{statistics.fmean(found):.1%} of the drafts, n = {len(found)}, "
          f"{min(found):.1%} to {max(found):.1%}."
        )
  return notes

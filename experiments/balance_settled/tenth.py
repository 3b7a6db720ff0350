"""MaxVio_global with a bias against a tenth of what the sequence-wise loss leaves."""

from dsv3.lab import bootstrap


def answer(lines, folder):
  """A note on every arm that has two seeds with `sequence`, for `dsv3 compare`."""
  vio = {
    arm: {line["seed"]: line["final"]["max_vio"] for line in found}
    for arm, found in lines.items()
  }
  base, notes = vio.pop("sequence", {}), []
  for arm, own in vio.items():
    seeds = sorted(own.keys() & base.keys())
    if len(seeds) < 2:
      continue
    ratio = sum(own[s] for s in seeds) / sum(base[s] for s in seeds)
    each = ", ".join(f"{own[s] / base[s]:.3f}" for s in seeds)
    over = bootstrap.interval([own[s] - base[s] / 10 for s in seeds])
    notes.append(
      f"MaxVio_global of {arm} to that of sequence: {ratio:.3f} of the means, "
      f"{each} by seed; minus a tenth of it {over.mean:+.3f} ({over.low:+.3f} "
      f"to {over.high:+.3f})."
    )
  return notes

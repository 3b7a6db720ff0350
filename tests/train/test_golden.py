"""Losses of the first 8 steps, to the last digits.

A refactor leaves them as they are. A change of numerics writes new ones, in a
commit that says why:

  python -m tests.train.test_golden
"""

import json
import pathlib

import pytest

from tests.train import steps

FILE = pathlib.Path(__file__).parent.parent / "golden" / "losses.json"
NAMES = ("loss", "loss/main", "loss/mtp_1", "loss/sequence", "grad_norm")


def first_losses() -> dict[str, list[float]]:
  """Metrics of 8 steps on random tokens, by name, with 7 digits."""
  prepared = steps.prepared()
  state, out = prepared.start, {name: [] for name in NAMES}
  for seed in range(8):
    batch = steps.random_batch(prepared.values, seed)
    state, metrics = prepared.step(state, batch)
    for name in NAMES:
      out[name].append(float(f"{float(metrics[name]):.7g}"))
  return out


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_stored_ones(name):
  """Other CPUs sum in another order: 2e-6, and 1e-4 for the gradient's norm."""
  relative = 1e-4 if name == "grad_norm" else 2e-6
  wanted = json.loads(FILE.read_text())[name]
  assert first_losses()[name] == pytest.approx(wanted, rel=relative)


if __name__ == "__main__":
  FILE.write_text(json.dumps(first_losses(), indent=1) + "\n")

"""A small corpus made on the spot, and configs that read it."""

import random

import pytest

from tests import micro

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


def text(seed: int, n_words: int) -> str:
  """Words, digits, punctuation before line ends, and letters of two bytes."""
  rng = random.Random(seed)
  ends = [" ", " ", " ", ".\n", ";\n", "é ", "):\n\n"]
  return "".join(
    rng.choice(WORDS) + rng.choice(ends) for _ in range(n_words)
  ) + str(rng.randrange(10**6))


@pytest.fixture
def folder(tmp_path):
  """Sixty files of 1 to 60 words, some of them in a subfolder."""
  root = tmp_path / "corpus"
  (root / "sub").mkdir(parents=True)
  for i in range(60):
    where = root / "sub" if i % 3 else root
    (where / f"{i:02}.txt").write_text(text(i, 1 + i))
  return root


@pytest.fixture
def config_of(tmp_path, folder):
  """Makes a micro config over the folder, with dotted keys of `data`."""

  def make(*sources: str, **diff):
    data = {
      "sources": sources or (str(folder),),
      "cache": str(tmp_path / "cache"),
      "heldout": 0.2,
      **diff,
    }
    return micro.config_of({f"data.{k}": v for k, v in data.items()})

  return make

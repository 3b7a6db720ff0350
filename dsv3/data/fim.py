"""What is done to a document's tokens before packing (Sec. 4.1).

Both keep the text: fill-in-the-middle moves its parts, a split cuts a token in
two. Each adds a number of tokens that is known beforehand, so that packing
knows the length of every document without its tokens.
"""

import numpy as np

from dsv3.data.tokenizer import Fim, Splits

MARKS = 3  # tokens that fill-in-the-middle adds
SHORTEST = 3  # tokens of a document that has a prefix, a middle and a suffix


def fill_in_the_middle(
  ids: np.ndarray, marks: Fim, rng: np.random.Generator
) -> np.ndarray:
  """Prefix, suffix, middle: the PSM order, framed by its marks (Sec. 4.1).

  The two cuts are uniform over all pairs that leave no part empty. They fall
  between tokens: where the report's fall is unpublished, and cuts inside of
  tokens would change the number of tokens.
  """
  low, high = np.sort(rng.choice(len(ids) - 1, 2, replace=False)) + 1
  prefix, middle, suffix = ids[:low], ids[low:high], ids[high:]
  return np.concatenate(
    [[marks.begin], prefix, [marks.hole], suffix, [marks.end], middle]
  ).astype(ids.dtype)


def split_merged(
  ids: np.ndarray, splits: Splits, count: int, rng: np.random.Generator
) -> np.ndarray:
  """`count` tokens of punctuation and line ends fall in two (Sec. 4.1).

  Against the bias of prompts that end between the two: without splits a model
  has never seen such a boundary.
  """
  (merged,) = np.nonzero(splits.first_W[ids] >= 0)
  chosen = np.sort(rng.choice(merged, count, replace=False))
  out = ids.copy()
  out[chosen] = splits.first_W[ids[chosen]]
  return np.insert(out, chosen + 1, splits.second_W[ids[chosen]])

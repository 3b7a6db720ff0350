"""Is it still the text and the tokenizer that a checkpoint was trained with?"""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from dsv3.config import ConfigError
from dsv3.data.batches import Batches
from dsv3.data.tokenizer import Tokenizer


def describe(data: Batches) -> dict[str, Any]:
  """What a checkpoint's meta keeps; imported weights have nothing of it."""
  return {"corpus": data.identity(), "tokenizer": data.tokenizer.digest}


def check_tokenizer(meta: Mapping[str, Any], tokens: Tokenizer) -> None:
  """ConfigError if a checkpoint's weights have learnt other token ids."""
  found, wanted = tokens.digest, meta.get("tokenizer", tokens.digest)
  if found != wanted:
    raise ConfigError(
      f"config.data.tokenizer: found digest {found}, wanted {wanted}, that of "
      "the checkpoint: the file has changed since"
    )


def other_text(meta: Mapping[str, Any], data: Batches) -> str | None:
  """How the text of a checkpoint and what is found now differ, or None."""
  found = data.identity()
  wanted = meta.get("corpus", found)
  if found == wanted:
    return None
  pairs = [p for p in zip_longest(found, wanted) if p[0] != p[1]]
  return f"corpus: found {pairs[0][0]}, the checkpoint's is {pairs[0][1]}"

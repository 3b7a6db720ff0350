"""How many of the tokens that MTP modules draft are kept (Sec. 5.4.3).

Decoded for real, from the beginnings of held-out documents.
"""

import itertools

from dsv3.data.batches import Batches
from dsv3.infer import Decoder, Sampling, generate
from dsv3.nn.transformer import Transformer

SAMPLINGS = {"greedy": Sampling(temperature=0.0), "sampled": Sampling()}


def accepted(
  model: Transformer | Decoder,
  heldout: Batches,
  *,
  n_drafts: int,
  sampling: Sampling,
  n_texts: int = 16,
  n_tokens: int = 64,
) -> list[int]:
  """Drafts that were kept, of every round of `n_texts` texts.

  Prompt and completion have up to `n_tokens` each; a completion does not stop
  at the end of its document.
  """
  tokens = heldout.tokenizer
  texts = itertools.islice(heldout.texts(), n_texts)
  prompts = [
    [tokens.start_id, *tokens.encode(text[: 8 * n_tokens])][:n_tokens]
    for text in texts
  ]
  found = generate(
    model, prompts, max_tokens=n_tokens, sampling=sampling, drafts=n_drafts
  )
  return [n for completion in found for n in completion.accepted]

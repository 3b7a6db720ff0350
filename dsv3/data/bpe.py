"""Training of a byte-level BPE tokenizer (Sec. 4.1)."""

import os
import pathlib
from collections.abc import Iterable

from dsv3.data.tokenizer import Bytes

# What may not merge, in this order (Sec. 4.1; the patterns are those of the
# released tokenizer): numbers by three digits, runs of Chinese and Japanese,
# then words, punctuation together with line ends, and white space.
_PATTERNS = (
  r"\p{N}{1,3}",
  r"[一-龥぀-ゟ゠-ヿ]+",
  r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
  r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
  r"| ?[\p{P}\p{S}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def train_bpe(
  texts: Iterable[str], vocab_size: int, out: str | pathlib.Path
) -> None:
  """Writes the tokenizer.json of a BPE of `vocab_size` tokens (Sec. 4.1).

  The six specials of `Bytes` come first, then the 256 bytes, then merges. The
  same texts in the same order give the same file.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
      for pattern in _PATTERNS
    ]
    + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(Bytes.names),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(texts, trainer)
  out = pathlib.Path(out)
  temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
  made.save(str(temporary))
  temporary.replace(out)

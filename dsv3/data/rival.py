"""The first rival of a language model: a general compressor."""

import zlib
from collections.abc import Iterable


def compressed_bpb(texts: Iterable[str]) -> float:
  """Bits per byte of `gzip -9` over all texts as one stream.

  It adapts to the text it is measured on, and has seen no other.

  >>> compressed_bpb(["a" * 1000]) < 0.3
  True
  """
  packer = zlib.compressobj(9, wbits=31)  # 31: in gzip's frame
  before = after = 0
  for text in texts:
    raw = text.encode()
    before += len(raw)
    after += len(packer.compress(raw))
  after += len(packer.flush())
  return 8 * after / before

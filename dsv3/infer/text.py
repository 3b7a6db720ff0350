"""Text out of token ids that come a few at a time."""

from collections.abc import Iterator

from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.generate import Step

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextReader:
  """Reads the first sequence of a `stream`, and counts the drafts it kept."""

  def __init__(self, tokens: Tokenizer):
    self._tokens = tokens
    self.accepted: list[int] = []  # of every speculative round
    self.text = ""  # all of it, so far

  def read(self, steps: Iterator[Step]) -> Iterator[str]:
    """Pieces of text as they come; a character in pieces waits for its end."""
    seen = []
    for step in steps:
      seen += [t for t in step.tokens[0] if t != self._tokens.eos_id]
      if step.accepted[0] is not None:
        self.accepted.append(step.accepted[0])
      text = self._tokens.decode(seen)
      if not text.endswith(_BROKEN):
        yield self._more(text)
    yield self._more(self._tokens.decode(seen))

  def _more(self, text: str) -> str:
    new, self.text = text[len(self.text) :], text
    return new

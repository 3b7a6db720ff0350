"""A conversation with a model, turn by turn."""

from collections.abc import Iterator

from dsv3.config import ConfigError
from dsv3.data.chat_template import ChatTemplate
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.decoder import Decoder
from dsv3.infer.generate import stream
from dsv3.infer.text import TextReader


class Conversation:
  """The messages so far; every reply reads all of them again."""

  def __init__(
    self,
    decoder: Decoder,
    tokens: Tokenizer,
    template: ChatTemplate,
    system: str | None = None,
  ):
    self._decoder, self._tokens, self._template = decoder, tokens, template
    self.messages: list[dict[str, str]] = []
    if system:
      self._add("system", system)

  def _add(self, role: str, text: str) -> None:
    if mark := self._tokens.first_mark(text):
      raise ConfigError(
        f"message: found the special token {mark}, wanted plain text"
      )
    self.messages.append({"role": role, "content": text})

  def reply(self, text: str, **options) -> Iterator[str]:
    """The reply to `text` in pieces; the options are those of `stream`.

    Raises ConfigError for a text that spells a special token: it could end its
    own turn, and speak for another.
    """
    self._add("user", text)
    prompt = self._tokens.encode_marked(self._template.render(self.messages))
    reader = TextReader(self._tokens)
    stop = [self._tokens.eos_id]
    yield from reader.read(
      stream(self._decoder, [prompt], stop=stop, **options)
    )
    self.messages.append({"role": "assistant", "content": reader.text})

"""Text to token ids and back (Sec. 4.1).

`bytes` needs nothing; any byte-level tokenizer.json does, DeepSeek's included.
Special tokens come from packing and from chat templates, never from text.
"""

import functools
import gzip
import hashlib
import json
import pathlib
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dsv3.config import ConfigError


class Fim(NamedTuple):
  """Ids that frame prefix, suffix and middle."""

  hole: int
  begin: int
  end: int


class Splits(NamedTuple):
  """For every id, the two tokens that a merged token falls into, or -1."""

  first_W: np.ndarray
  second_W: np.ndarray


class Tokenizer(Protocol):
  """What the rest of the package needs of one."""

  digest: str  # identity: token shards of another one are refused
  vocab_size: int  # largest id + 1
  eos_id: int
  start_id: int  # what stands before a text that stands alone
  bos_id: int
  pad_id: int
  fim: Fim | None
  splits: Splits

  def encode(self, text: str) -> np.ndarray:
    """Ids of `text`, int32, no specials among them."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The same for many texts, on all cores where that helps."""

  def encode_marked(self, text: str) -> np.ndarray:
    """Ids of a rendered chat template: names of specials stand for them."""

  def first_mark(self, text: str) -> str | None:
    """The first name of a special token in `text`."""

  def decode(self, ids: np.ndarray) -> str:
    """The text of `ids`, specials by name; broken UTF-8 shows as U+FFFD."""

  def token_bytes(self, ids: np.ndarray) -> int:
    """Bytes of text that `ids` stand for; specials and ids below 0 are none."""


def load(name: str, vocab_size: int) -> Tokenizer:
  """`bytes`, or the tokenizer.json (or .json.gz) at the path `name`.

  Raises:
    ConfigError: the file is missing or no byte-level tokenizer, lacks an
      end-of-sentence token, or has ids that a model of `vocab_size` has not.
  """
  made = Bytes() if name == "bytes" else JsonTokenizer(name)
  if made.vocab_size > vocab_size:
    raise ConfigError(
      f"config.model.vocab_size: found {vocab_size}, wanted at least the "
      f"{made.vocab_size} tokens of config.data.tokenizer = {name}"
    )
  return made


class Bytes:
  """Every byte of UTF-8 is a token; six specials follow."""

  digest = "bytes"
  eos_id, bos_id, pad_id = 256, 257, 258
  start_id = eos_id  # a document of ours follows the end of the one before it
  fim = Fim(hole=259, begin=260, end=261)
  vocab_size = 262
  splits = Splits(np.full(262, -1, np.int32), np.full(262, -1, np.int32))
  names = ("<|eos|>", "<|bos|>", "<|pad|>") + tuple(
    f"<|fim_{part}|>" for part in Fim._fields
  )

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def encode_marked(self, text: str) -> np.ndarray:
    parts = re.split(_any_of(self.names), text)
    ids = [
      [256 + self.names.index(part)] if i % 2 else self.encode(part)
      for i, part in enumerate(parts)
    ]
    return np.concatenate(ids).astype(np.int32)

  def first_mark(self, text: str) -> str | None:
    return _first_mark(self.names, text)

  def decode(self, ids: np.ndarray) -> str:
    ids = np.asarray(ids)
    (marks,) = np.nonzero(ids > 255)
    parts, begin = [], 0
    for at in (*marks, len(ids)):
      text = ids[begin:at].astype(np.uint8).tobytes()
      parts.append(text.decode(errors="replace"))
      if at < len(ids):
        number = int(ids[at]) - 256
        # Ids past the specials: a model may have more rows than we have names.
        known = number < len(self.names)
        parts.append(self.names[number] if known else f"<|{ids[at]}|>")
      begin = at + 1
    return "".join(parts)

  def token_bytes(self, ids: np.ndarray) -> int:
    return int(((ids >= 0) & (ids < 256)).sum())


# Names of special tokens: DeepSeek's, ours, then what other releases use.
_EOS = (
  *("<｜end▁of▁sentence｜>", "<|eos|>", "<|endoftext|>", "<|end_of_text|>"),
  *("<eos>", "</s>"),
)
_BOS = (
  "<｜begin▁of▁sentence｜>",
  "<|bos|>",
  "<|begin_of_text|>",
  "<bos>",
  "<s>",
)
_PAD = ("<｜▁pad▁｜>", "<|pad|>", "<pad>")
_FIM = {  # others name the mark after the part that follows it
  "hole": ("<｜fim▁hole｜>", "<|fim_hole|>", "<|fim_suffix|>", "<fim_suffix>"),
  "begin": (
    "<｜fim▁begin｜>",
    "<|fim_begin|>",
    "<|fim_prefix|>",
    "<fim_prefix>",
  ),
  "end": ("<｜fim▁end｜>", "<|fim_end|>", "<|fim_middle|>", "<fim_middle>"),
}


class JsonTokenizer:
  """A byte-level tokenizer.json, run by the `tokenizers` library.

  Where it has no token for the begin of a sentence or for padding, the end of
  a sentence serves; without the three FIM tokens `fim` is None. Texts start
  with the begin of a sentence where tokenizer_config.json beside the file says
  `add_bos_token`, as released models have learnt it.
  """

  def __init__(self, name: str):
    raw = _read(name)
    self.digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    self._tokenizer = _parse(raw, name)
    vocab = self._tokenizer.get_vocab()
    self.vocab_size = max(vocab.values()) + 1
    eos = _first(vocab, _EOS)
    if eos is None:
      raise ConfigError(
        f"{name}: found no end-of-sentence token, wanted one of "
        + " ".join(_EOS)
      )
    self.eos_id = eos
    self.bos_id = _first(vocab, _BOS, eos)
    self.start_id = self.bos_id if _adds_bos(name) else eos
    self.pad_id = _first(vocab, _PAD, eos)
    fim = {part: _first(vocab, names) for part, names in _FIM.items()}
    self.fim = None if None in fim.values() else Fim(**fim)
    self._bytes_W = self._count_bytes(vocab)

  def encode(self, text: str) -> np.ndarray:
    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    return np.array(ids, np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    made = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(one.ids, np.int32) for one in made]

  def encode_marked(self, text: str) -> np.ndarray:
    self._tokenizer.encode_special_tokens = False
    try:
      return self.encode(text)
    finally:
      self._tokenizer.encode_special_tokens = True

  def first_mark(self, text: str) -> str | None:
    added = self._tokenizer.get_added_tokens_decoder().values()
    return _first_mark([token.content for token in added], text)

  def decode(self, ids: np.ndarray) -> str:
    ids = [int(i) for i in ids]
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def token_bytes(self, ids: np.ndarray) -> int:
    return int(self._bytes_W[ids[ids >= 0]].sum())

  @functools.cached_property
  def splits(self) -> Splits:
    """The merged tokens of punctuation and line ends (Sec. 4.1).

    Those that make exactly two tokens when their punctuation and their line
    ends are encoded apart, so that a split adds one token, no more.
    """
    first_W, second_W = np.full((2, self.vocab_size), -1, np.int32)
    for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
      if token[-1] not in "Ċč" or token[0] in "Ċč":
        continue  # Ċ and č name the bytes of line ends; most tokens stop here
      text = self._tokenizer.decode([i])
      head = text.rstrip("\r\n")
      if head == text or not _is_punctuation(head):
        continue
      pair = self.encode(head), self.encode(text[len(head) :])
      if len(pair[0]) == len(pair[1]) == 1:
        first_W[i], second_W[i] = pair[0][0], pair[1][0]
    return Splits(first_W, second_W)

  def _count_bytes(self, vocab: Mapping[str, int]) -> np.ndarray:
    bytes_W = np.zeros(self.vocab_size, np.int32)
    for token, i in vocab.items():
      bytes_W[i] = len(token)  # the byte-level alphabet: a character a byte
    for i, added in self._tokenizer.get_added_tokens_decoder().items():
      bytes_W[i] = 0 if added.special else len(added.content.encode())
    return bytes_W


def _adds_bos(name: str) -> bool:
  path = pathlib.Path(name).expanduser().parent / "tokenizer_config.json"
  try:
    return bool(json.loads(path.read_text()).get("add_bos_token"))
  except FileNotFoundError:
    return False
  except (OSError, ValueError, AttributeError) as error:
    raise ConfigError(f"{path}: damaged: {error}") from error


def _any_of(names: Sequence[str]) -> str:
  return "(" + "|".join(map(re.escape, names)) + ")"


def _first_mark(names: Sequence[str], text: str) -> str | None:
  found = re.search(_any_of(names), text) if names else None
  return found and found.group()


def _is_punctuation(text: str) -> bool:
  text = text.removeprefix(" ")
  return bool(text) and all(unicodedata.category(c)[0] in "PS" for c in text)


def _first(vocab: Mapping[str, int], names, default: int | None = None):
  return next((vocab[n] for n in names if n in vocab), default)


def _read(name: str) -> bytes:
  try:
    raw = pathlib.Path(name).expanduser().read_bytes()
    return gzip.decompress(raw) if name.endswith(".gz") else raw
  except (OSError, EOFError, zlib.error) as error:
    raise ConfigError(
      f"config.data.tokenizer: {name}: {error}; wanted `bytes` or the path of "
      "a tokenizer.json"
    ) from error


def _parse(raw: bytes, name: str):
  import tokenizers

  try:
    made = tokenizers.Tokenizer.from_buffer(raw)
  except Exception as error:  # the library raises no narrower class
    raise ConfigError(
      f"{name}: {error}; wanted the JSON of a tokenizer"
    ) from error
  if "ByteLevel" not in repr(made.decoder):
    raise ConfigError(
      f"{name}: found no ByteLevel decoder, wanted a byte-level tokenizer: "
      "bits per byte count the bytes of its tokens"
    )
  # Text that spells a special token stays text. (DeepSeek's file calls its FIM
  # marks not special, so it is said again.)
  known = {
    *_EOS,
    *_BOS,
    *_PAD,
    *(name for names in _FIM.values() for name in names),
  }
  added = [t.content for t in made.get_added_tokens_decoder().values()]
  made.add_special_tokens([name for name in added if name in known])
  made.encode_special_tokens = True
  made.no_padding()
  made.no_truncation()
  return made

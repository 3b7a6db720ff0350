"""Needle in a haystack over context length and document depth (Fig. 8).

A haystack is documents of a corpus, one after another. A needle is a sentence
with a name and a number, hidden in it. The prompt ends with the start of the
same sentence, so a base model can answer by going on: no instruction tuning is
asked for. A prompt is a pure function of the corpus and of (seed, length,
depth, trial); two cells of a trial have the same needle and the same text, and
differ in nothing but length and depth.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import Config, ConfigError
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer import Decoder

_BETWEEN = "\n\n"  # documents of a haystack, which is one document to the model
_SHIFT = 1 / 32  # of the haystack: so far a needle moves to a sentence's end
_STOPS = (".", "!", "?", "。", "！", "？")


class Prompt(NamedTuple):
  """What a model reads, and what it should say next."""

  tokens: list[int]
  answer: list[int]
  begin: int  # index of the needle's first token
  end: int


class Reply(NamedTuple):
  """What a model says at every token of an answer, the ones before given.

  Up to its first wrong token `tokens` is the greedy completion, so greedy
  decoding gives the answer where all of them are right, and nowhere else.
  """

  tokens: list[int]  # the likeliest at each place
  log_probs: list[float]  # of the answer's tokens


Ask = Callable[[Sequence[Prompt]], list[Reply]]


class Haystack:
  """Prompts out of any texts."""

  def __init__(self, texts: Iterable[str], tokens: Tokenizer):
    self._texts = tuple(texts)
    self._tokens = tokens
    self._documents: dict[int, np.ndarray] = {}  # encoded when first needed
    spelt = [tokens.decode(np.array([i])) for i in range(tokens.vocab_size)]
    self._line_W = np.array([text.endswith("\n") for text in spelt])
    self._stop_W = np.array([text.endswith(_STOPS) for text in spelt])
    self._space_W = np.array([text[:1].isspace() for text in spelt])

  def prompt(
    self, length: int, depth: float, trial: int, seed: int = 0
  ) -> Prompt:
    """A prompt that has exactly `length` tokens together with its answer.

    It starts with the end token, as a document of the training data does. The
    needle has `depth` percent of the haystack before it, or a little more or
    less, at the nearest end of a line or a sentence within 1/32 of the
    haystack. No text occurs twice.

    Raises:
      ConfigError: for a depth outside of 0 to 100, a length that a needle does
        not fit in, and a corpus shorter than the haystack. (A repeated corpus
        would be another task: the second copy of a text is easy to predict.)
    """
    if not 0 <= depth <= 100:
      raise ConfigError(f"depth: found {depth:g}, wanted 0 to 100 percent")
    rng = np.random.default_rng((seed, trial))
    needle, cue, answer = self._needle(rng)
    n = length - 1 - len(needle) - len(cue) - len(answer)
    if n < 1:
      raise ConfigError(
        f"length: found {length}, wanted at least {length - n + 1} tokens: the "
        "needle and the question take the others"
      )
    hay = self._hay(rng.permutation(len(self._texts)), n, length)
    cut = self._place(hay, depth / 100 * n)
    before, after = hay[:cut].tolist(), hay[cut:].tolist()
    tokens = [self._tokens.start_id, *before, *needle, *after, *cue]
    return Prompt(tokens, answer, 1 + cut, 1 + cut + len(needle))

  def _needle(self, rng) -> tuple[list[int], list[int], list[int]]:
    """Ids of a sentence, of its start, and of what is to follow that."""
    name = "".join(
      consonant + vowel
      for consonant, vowel in zip(
        rng.choice(list("bdfgklmnprstvz"), 4), rng.choice(list("aeiou"), 4)
      )
    ).capitalize()
    number = rng.integers(10_000, 100_000)
    start = f"\nThe magic number of {name} is "
    cue = self._tokens.encode(start).tolist()
    whole = self._tokens.encode(f"{start}{number}").tolist()
    # Some tokenizers have tokens of a space and digits: a prompt that ends
    # with the space alone would have a past that no text has.
    pairs = enumerate(zip(cue, whole))
    same = next((i for i, (a, b) in pairs if a != b), len(cue))
    needle = self._tokens.encode(f"{start}{number}.\n").tolist()
    return needle, whole[:same], whole[same:]

  def _hay(self, order: Sequence[int], n: int, length: int) -> np.ndarray:
    """The first `n` tokens of the documents in this order."""
    parts, found = [], 0
    for i in order:
      if i not in self._documents:
        self._documents[i] = self._tokens.encode(self._texts[i] + _BETWEEN)
      parts.append(self._documents[i])
      found += len(parts[-1])
      if found >= n:
        return np.concatenate(parts)[:n]
    raise ConfigError(
      f"config.data.sources: found {found:,} tokens of text, wanted {n:,} for "
      f"a haystack of length {length:,}: give more text or a smaller length"
    )

  def _place(self, hay: np.ndarray, wanted: float) -> int:
    """The index nearest to `wanted` where a line or sentence has ended."""
    ends = np.ones(len(hay) + 1, bool)  # before the first, after the last
    stops = self._stop_W[hay[:-1]] & self._space_W[hay[1:]]
    ends[1:-1] = self._line_W[hay[:-1]] | stops
    (places,) = np.nonzero(ends)
    nearest = int(places[np.abs(places - wanted).argmin()])
    near = abs(nearest - wanted) <= _SHIFT * len(hay)
    return nearest if near else round(wanted)


def asker(decoder: Decoder, *, batch: int = 8, chunk: int = 512) -> Ask:
  """Asks a model: prefill of the prompt, then a step for each known token.

  Args:
    batch: prompts at once. Long ones need much memory: all keys and values of
      a layer while they are read.
    chunk: positions of prefill that are computed at once.
  """

  def ask(prompts: Sequence[Prompt]) -> list[Reply]:
    groups = range(0, len(prompts), batch)
    return [
      reply
      for first in groups
      for reply in _replies(decoder, prompts[first : first + batch], chunk)
    ]

  return ask


def _replies(
  decoder: Decoder, prompts: Sequence[Prompt], chunk: int
) -> list[Reply]:
  lengths = [len(prompt.answer) for prompt in prompts]
  answer_BL = np.zeros((len(prompts), max(lengths)), np.int32)
  for row, prompt in zip(answer_BL, prompts):
    row[: len(prompt.answer)] = prompt.answer
  logits_BW, past = decoder.prefill(
    [prompt.tokens for prompt in prompts], max(lengths), chunk
  )
  looks = []
  for i, tokens_B in enumerate(jnp.asarray(answer_BL.T)):
    looks.append(_look(logits_BW, tokens_B))
    if i + 1 < max(lengths):
      logits_BW, past = decoder.step(tokens_B, past)
  best_BL, log_probs_BL = (np.stack(x, 1) for x in zip(*jax.device_get(looks)))
  return [
    Reply(best_BL[b, :n].tolist(), log_probs_BL[b, :n].tolist())
    for b, n in enumerate(lengths)
  ]


@jax.jit
def _look(logits_BW, tokens_B):
  """The likeliest token of each row, and the log-probability of `tokens_B`."""
  log_p_BW = jax.nn.log_softmax(logits_BW)
  picked_B1 = jnp.take_along_axis(log_p_BW, tokens_B[:, None], axis=1)
  return logits_BW.argmax(1), picked_B1[:, 0]


def score(
  ask: Ask,
  haystack: Haystack,
  lengths: Sequence[int],
  depths: Sequence[float],
  trials: int,
  seed: int = 0,
) -> Iterator[dict[str, Any]]:
  """A row for each length and depth, as they are measured (Fig. 8).

  `recall` is the share of the `n` prompts that greedy decoding answers, and
  `log_prob` the mean over all tokens of the right answers, in nats: what still
  tells models apart that answer none. With a byte tokenizer an answer is five
  digits, and a model that knows no more than that has -2.30, ln(1/10).

  Raises ConfigError at once, before the model is asked, where a prompt cannot
  be made (`Haystack.prompt`).
  """
  for length in (min(lengths), max(lengths)):
    for depth in depths:
      haystack.prompt(length, depth, 0, seed)
  return (
    _row(ask, haystack, length, depth, trials, seed)
    for length in lengths
    for depth in depths
  )


def _row(ask, haystack, length, depth, trials, seed) -> dict[str, Any]:
  prompts = [haystack.prompt(length, depth, t, seed) for t in range(trials)]
  replies = ask(prompts)
  right = [p.answer == r.tokens for p, r in zip(prompts, replies, strict=True)]
  log_probs = [x for reply in replies for x in reply.log_probs]
  return {
    "length": length,
    "depth": depth,
    "recall": sum(right) / trials,
    "log_prob": sum(log_probs) / len(log_probs),
    "n": trials,
  }


def trained_length(values: Config) -> int:
  """Longest context the model is made for: its rows, or YaRN's (Sec. 4.3)."""
  rope = values.model.rope
  extended = rope.original_len * rope.yarn_factor
  rows = values.data.seq_len
  return int(max(rows, extended)) if rope.yarn_factor > 1 else rows


def write(
  rows: Sequence[dict[str, Any]],
  path: str | pathlib.Path,
  about: dict[str, Any],
) -> None:
  """JSON of `about`, what was measured, and of `rows`, one on a line."""
  lines = ",\n".join(map(json.dumps, rows))
  text = f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n'
  pathlib.Path(path).write_text(text)


def table(rows: Iterable[dict[str, Any]]) -> str:
  """Recall and log-probability as text: a column a length, a line a depth.

  >>> row = {"length": 512, "depth": 50, "recall": 0.8, "log_prob": -0.2}
  >>> print(table([row]))
  depth %          512
       50   0.80 -0.20
  """
  cells = {(row["depth"], row["length"]): row for row in rows}
  depths = sorted({depth for depth, _ in cells})
  lengths = sorted({length for _, length in cells})
  lines = ["depth %" + "".join(f"{length:>13,}" for length in lengths)]
  for depth in depths:
    found = [cells.get((depth, length)) for length in lengths]
    texts = [
      f"{row['recall']:.2f} {row['log_prob']:.2f}" if row else ""
      for row in found
    ]
    lines.append(f"{depth:>7.4g}" + "".join(f"{text:>13}" for text in texts))
  return "\n".join(lines)

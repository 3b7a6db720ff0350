"""Text that goes on from prompts, with the latent cache."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import ConfigError
from dsv3.infer import speculative
from dsv3.infer.decoder import Decoder, one_step
from dsv3.infer.sampling import Sampling, choose
from dsv3.infer.speculative import Round
from dsv3.nn.transformer import Transformer


class Completion(NamedTuple):
  """What followed a prompt."""

  tokens: list[int]  # without the stop token
  log_probs: list[float]  # of each, under the model's own distribution
  stopped: bool  # by a stop token, not by the number of tokens
  accepted: list[int]  # drafts that were kept, of each speculative round


class Step(NamedTuple):
  """What is new of every sequence: a token, or with drafts some more."""

  tokens: list[list[int]]  # empty of a sequence that has ended
  log_probs: list[list[float]]
  accepted: list[int | None]  # drafts kept; None if none was judged


def stream(
  model: Transformer | Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop: Sequence[int] = (),
  drafts: int = 0,
  chunk: int = 512,
) -> Iterator[Step]:
  """Yields a `Step` for every run of the model, until all sequences have ended.

  A stop token is yielded and then ends its sequence. What is drawn for a
  sequence depends on the seed and its place among the prompts, not on how many
  others there are; on a CPU a bfloat16 model rounds otherwise from 512 rows in a
  run on (sequences times tokens), and a text may turn there.

  Args:
    model: a model, or a Decoder of it, which keeps what is compiled.
    prompts: token ids, of unequal lengths, none empty.
    drafts: tokens that MTP modules draft for each run of the main model
      (`dsv3.infer.speculative`). They change how fast text comes, not which:
      greedy it is the same but for ties within rounding, sampled it has the
      same distribution.
    chunk: positions of prefill that are computed at once.

  Raises:
    ConfigError: an empty prompt, an argument out of range, or drafts of a model
      without MTP modules.
  """
  sampling.check()
  for name, value, least in (
    ("max_tokens", max_tokens, 1),
    ("drafts", drafts, 0),
    ("chunk", chunk, 1),
  ):
    if value < least:
      raise ConfigError(f"{name}: found {value}, wanted {least} or more")
  decoder = model if isinstance(model, Decoder) else Decoder(model)
  keys_B = jax.vmap(
    functools.partial(jax.random.fold_in, jax.random.key(seed))
  )(jnp.arange(len(prompts)))
  wanted = {"max_tokens": max_tokens, "sampling": sampling, "chunk": chunk}
  if drafts:
    wanted["n_drafts"] = drafts
    found = speculative.rounds(decoder, prompts, keys_B, **wanted)
  else:
    found = _one_by_one(decoder, prompts, keys_B, **wanted)
  left = [max_tokens] * len(prompts)
  for i, part in enumerate(found):
    step = _cut(part, left, stop, judged=drafts > 0 and i > 0)
    yield step
    if not any(left):
      return


def _cut(part: Round, left: list[int], stop, judged: bool) -> Step:
  """The Step of a round; counts down what is `left` of each sequence."""
  step = Step([], [], [])
  rows = zip(*(np.asarray(x).tolist() for x in part))
  for b, (tokens, log_probs, n_new) in enumerate(rows):
    step.accepted.append(n_new - 1 if judged and left[b] else None)
    tokens = tokens[: min(n_new, left[b])]
    ends = [i + 1 for i, token in enumerate(tokens) if token in stop]
    tokens = tokens[: min(ends, default=None)]
    left[b] = 0 if ends else left[b] - len(tokens)
    step.tokens.append(tokens)
    step.log_probs.append(log_probs[: len(tokens)])
  return step


def _one_by_one(
  decoder: Decoder, prompts, keys_B, *, max_tokens, sampling, chunk
) -> Iterator[Round]:
  """Plain decoding: a token of every sequence a round."""
  logits_BW, cache = decoder.prefill(prompts, max_tokens, chunk)
  drawn = _draw(logits_BW, keys_B, 0, sampling)
  step = decoder.compiled(_draw_next, "cache", sampling=sampling)
  one_B = np.ones(len(prompts), np.int32)
  for i in range(1, max_tokens + 1):
    shown = drawn
    if i < max_tokens:  # runs while the caller looks at this token
      *drawn, cache = step(decoder.weights, cache, shown[0], keys_B, i)
    tokens_B, log_probs_B = shown
    yield Round(tokens_B[:, None], log_probs_B[:, None], one_B)


def _draw_next(weights, cache, tokens_B, keys_B, i, *, graphdef, sampling):
  """A step and what is drawn from it: one program, launched once."""
  logits_BW, cache = one_step(weights, cache, tokens_B, graphdef=graphdef)
  return *_draw(logits_BW, keys_B, i, sampling), cache


@functools.partial(jax.jit, static_argnames="sampling")
def _draw(logits_BW, keys_B, i, sampling):
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
  return jax.vmap(choose, (0, 0, None))(logits_BW, keys_B, sampling)


def generate(
  model: Transformer | Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  stop: Sequence[int] = (),
  **kwargs,
) -> list[Completion]:
  """The completions of all prompts; the arguments are those of `stream`."""
  out = [Completion([], [], False, []) for _ in prompts]
  for step in stream(model, prompts, stop=stop, **kwargs):
    for b, (tokens, log_probs, accepted) in enumerate(zip(*step)):
      if accepted is not None:
        out[b].accepted.append(accepted)
      if tokens and tokens[-1] in stop:
        out[b] = out[b]._replace(stopped=True)
        tokens = tokens[:-1]
      out[b].tokens.extend(tokens)
      out[b].log_probs.extend(log_probs[: len(tokens)])
  return out

"""Text that goes on from prompts, with the latent cache."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import ConfigError
from dsv3.infer.decoder import Decoder
from dsv3.infer.sampling import Sampling, choose
from dsv3.nn.transformer import Transformer


class Completion(NamedTuple):
  """What followed a prompt."""

  tokens: list[int]  # without the stop token
  log_probs: list[float]  # of each, under the model's own distribution
  stopped: bool  # by a stop token, not by the number of tokens


class Step(NamedTuple):
  """One more token of every sequence that still goes on."""

  tokens_B: np.ndarray  # int32; -1 of a sequence that has ended
  log_probs_B: np.ndarray


def stream(
  model: Transformer | Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop: Sequence[int] = (),
  chunk: int = 512,
) -> Iterator[Step]:
  """Yields a `Step` a token, until all sequences have ended.

  A stop token is yielded and then ends its sequence. What is drawn for a
  sequence depends on the seed and its place among the prompts, not on how many
  others there are.

  Args:
    model: a model, or a Decoder of it, which keeps what is compiled.
    prompts: token ids, of unequal lengths, none empty.
    chunk: positions of prefill that are computed at once.
  """
  sampling.check()
  if max_tokens < 1:
    raise ConfigError(f"max_tokens: found {max_tokens}, wanted 1 or more")
  decoder = model if isinstance(model, Decoder) else Decoder(model)
  logits_BW, cache = decoder.prefill(prompts, max_tokens, chunk)
  keys_B = jax.vmap(
    functools.partial(jax.random.fold_in, jax.random.key(seed))
  )(jnp.arange(len(prompts)))
  going_B = np.ones(len(prompts), bool)
  for i in range(max_tokens):
    tokens_B, log_probs_B = _draw(logits_BW, keys_B, i, sampling)
    if i < max_tokens - 1:  # runs while the caller looks at this token
      logits_BW, cache = decoder.step(tokens_B, cache)
    found_B = np.where(going_B, tokens_B, -1)
    yield Step(found_B, np.asarray(log_probs_B))
    going_B &= ~np.isin(found_B, stop)
    if not going_B.any():
      return


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
  out = [Completion([], [], False) for _ in prompts]
  for step in stream(model, prompts, stop=stop, **kwargs):
    for b, token in enumerate(step.tokens_B.tolist()):
      if token in stop:
        out[b] = out[b]._replace(stopped=True)
      elif token >= 0:
        out[b].tokens.append(token)
        out[b].log_probs.append(float(step.log_probs_B[b]))
  return out

"""Log-probabilities of given continuations, for many requests at once.

Requests that share all tokens but the last share a row. Shapes are few, so
that a pass compiles seldom, and no array holds the logits of all positions.

A letter beside the legend: `J` choices for the last token of a row.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3.infer import cache

CHUNK = 64  # positions that go through the head at once; divides all lengths


class Ask(NamedTuple):
  """What a request wants of a row of the batch."""

  index: int  # of the request
  n_labels: int  # tokens of the continuation, of which the last is
  last: int


class Batch(NamedTuple):
  """Rows of inputs, and the tokens whose probability is asked for."""

  tokens_BL: np.ndarray
  length_B: np.ndarray
  labels_BL: np.ndarray  # the token after each position, or -1: not asked for
  last_BJ: np.ndarray  # choices for the token after the last


class Scores(NamedTuple):
  """Log-probabilities in nats, and what greedy decoding would write."""

  log_p_BL: jax.Array
  greedy_BL: jax.Array  # whether the label is the likeliest
  last_log_p_BJ: jax.Array
  last_greedy_B: jax.Array  # the likeliest token


def lay_out(
  keys: Sequence[Sequence[int]], asks: Sequence[list[Ask]], batch_size: int
) -> Batch:
  """Inputs and requests as arrays of one of few shapes."""
  n_rows = few_rows(len(keys), batch_size)
  n_choices = few_rows(max(map(len, asks)))
  tokens_BL = np.zeros((n_rows, cache.round_up(max(map(len, keys)))), np.int32)
  batch = Batch(
    tokens_BL,
    np.zeros(n_rows, np.int32),
    np.full_like(tokens_BL, -1),
    np.zeros((n_rows, n_choices), np.int32),
  )
  for b, (key, row) in enumerate(zip(keys, asks, strict=True)):
    first = len(key) - max(ask.n_labels for ask in row)
    batch.tokens_BL[b, : len(key)] = key
    batch.length_B[b] = len(key)
    batch.labels_BL[b, first : len(key) - 1] = key[first + 1 :]
    batch.last_BJ[b, : len(row)] = [ask.last for ask in row]
  return batch


@functools.partial(jax.jit, static_argnames="graphdef")
def score(weights: nnx.State, batch: Batch, *, graphdef) -> Scores:
  """The scores of a batch, in the memory of one chunk of logits.

  A chunk of positions without a label does not go through the head.
  """
  model = nnx.merge(graphdef, weights)
  tokens_BL, length_B, labels_BL, last_BJ = batch
  inside_BL = jnp.arange(tokens_BL.shape[1]) < length_B[:, None]
  hidden_BLD = model(tokens_BL, inside_BL.astype(jnp.int32)).hidden[0]

  def score(part):
    hidden_BLD, labels_BL = part
    return jax.lax.cond(
      (labels_BL >= 0).any(),
      lambda: _of_labels(model.logits(hidden_BLD), labels_BL),
      lambda: (jnp.zeros(labels_BL.shape), jnp.zeros(labels_BL.shape, bool)),
    )

  parts = _chunks(hidden_BLD), _chunks(labels_BL)
  log_p_BL, greedy_BL = jax.tree.map(_join, jax.lax.map(score, parts))
  last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
  last_B1D = jnp.take_along_axis(hidden_BLD, last_B11, axis=1)
  last_BW = model.logits(last_B1D)[:, 0]
  last_log_p_BJ = jnp.take_along_axis(
    jax.nn.log_softmax(last_BW), last_BJ, axis=-1
  )
  return Scores(log_p_BL, greedy_BL, last_log_p_BJ, last_BW.argmax(-1))


def _of_labels(logits_BLW, labels_BL):
  label_BL1 = jnp.maximum(labels_BL, 0)[..., None]
  logit_BL = jnp.take_along_axis(logits_BLW, label_BL1, axis=-1)[..., 0]
  log_p_BL = logit_BL - jax.nn.logsumexp(logits_BLW, axis=-1)
  return log_p_BL, logits_BLW.argmax(-1) == labels_BL


def _chunks(x_BL: jax.Array) -> jax.Array:
  """[B, L, ...] as [L / chunk, B, chunk, ...]."""
  n_rows, length, *rest = x_BL.shape
  split = x_BL.reshape(n_rows, length // CHUNK, CHUNK, *rest)
  return jnp.moveaxis(split, 1, 0)


def _join(x: jax.Array) -> jax.Array:
  """The inverse of `_chunks`, of [L / chunk, B, chunk]."""
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def answer(
  scores: Scores, b: int, x: int, length: int, ask: Ask
) -> tuple[float, bool]:
  """Log-probability of a continuation, and whether greedy would write it."""
  span = slice(length - ask.n_labels, length - 1)
  log_p = scores.log_p_BL[b, span].sum(dtype=np.float64)
  greedy = scores.greedy_BL[b, span].all()
  return (
    float(log_p + scores.last_log_p_BJ[b, x]),
    bool(greedy and scores.last_greedy_B[b] == ask.last),
  )


def few_rows(n: int, most: int | None = None) -> int:
  """The next power of two, `most` at most: a new shape compiles anew."""
  power = 1 << (n - 1).bit_length()
  return power if most is None else min(power, most)

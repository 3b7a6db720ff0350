"""Speculative decoding: MTP modules draft, the main model judges (Sec. 2.2).

A round runs the main model once, over the newest token and N drafts. It keeps
the drafts up to the first that is rejected, and one token of its own after
them: 1 to N + 1 tokens, distributed as without drafts (Leviathan et al. 2023,
Sec. 2.3). Greedy, a draft is kept if it is the likeliest token.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3.config import ConfigError
from dsv3.infer import mtp
from dsv3.infer.cache import Cache
from dsv3.infer.decoder import Decoder, Past
from dsv3.infer.network import Window, run_blocks
from dsv3.infer.sampling import Sampling, choose, filtered


class Round(NamedTuple):
  """New tokens of every sequence; of a row the first `n_B` count."""

  tokens_BN: jax.Array  # int32
  log_probs_BN: jax.Array  # under the model's own distribution
  n_B: jax.Array


class State(NamedTuple):
  """Between two rounds: a token that is chosen and not yet read, and drafts."""

  cache: Cache
  modules: mtp.Inputs
  token_B: jax.Array
  drafts_BN: jax.Array
  log_q_BNW: jax.Array


def judge(
  log_p_LW: jax.Array,
  drafts_N: jax.Array,
  log_q_NW: jax.Array,
  key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """How many drafts are kept, and the token after them.

  Draft x is kept with probability min(1, p(x) / q(x)). Where one is not, the
  token comes from max(p - q, 0), where all are, from the last p.

  Args:
    log_p_LW: the main model's log-probabilities at the N drafts and after.
    log_q_NW: those that each draft was drawn from.

  >>> p_LW = jnp.log(jnp.array([[0.0, 1.0], [0.5, 0.5]]))
  >>> q_NW = jnp.log(jnp.array([[0.5, 0.5]]))
  >>> [int(x) for x in judge(p_LW, jnp.array([0]), q_NW, jax.random.key(0))]
  [0, 1]
  """
  n = len(drafts_N)
  key_keep, key_draw = jax.random.split(key)
  log_p_N, log_q_N = (
    jnp.take_along_axis(x_NW[:n], drafts_N[:, None], axis=1)[:, 0]
    for x_NW in (log_p_LW, log_q_NW)
  )
  kept_N = jnp.log(jax.random.uniform(key_keep, (n,))) < log_p_N - log_q_N
  accepted = jnp.cumprod(kept_N.astype(jnp.int32)).sum()
  p_W = jnp.exp(log_p_LW[accepted])
  q_W = jnp.where(accepted < n, jnp.exp(log_q_NW[accepted.clip(0, n - 1)]), 0)
  rest_W = jnp.maximum(p_W - q_W, 0)
  # p = q up to rounding leaves nothing over.
  rest_W = jnp.where(rest_W.sum() > 0, rest_W, p_W)
  return accepted, jax.random.categorical(key_draw, jnp.log(rest_W))


def rounds(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  keys_B: jax.Array,
  *,
  n_drafts: int,
  max_tokens: int,
  sampling: Sampling,
  chunk: int,
) -> Iterator[Round]:
  """Yields the first token, then round after round, to `max_tokens` or more.

  Raises ConfigError for a model without MTP modules.
  """
  depth = decoder.model.mtp.depth
  if not depth:
    raise ConfigError(
      f"drafts: found {n_drafts}, wanted 0: the model has no MTP module"
    )
  room = max_tokens + n_drafts + depth + 1
  past = decoder.read(prompts, room, chunk, min(n_drafts, depth))
  found, state = start(decoder, past, keys_B, n_drafts, sampling)
  n_done_B = np.zeros(len(prompts), np.int64)
  for i in range(1, max_tokens + 1):
    shown = found
    n_done_B += np.asarray(shown.n_B)
    if n_done_B.min() < max_tokens:  # runs while the caller looks
      found, state = advance(decoder, state, keys_B, i, sampling)
    yield shown


def start(
  decoder: Decoder, past: Past, keys_B, n_drafts: int, sampling: Sampling
) -> tuple[Round, State]:
  """The token after the prompts, and the first drafts."""
  first = decoder.compiled(
    _start, "cache", sampling=sampling, n_drafts=n_drafts
  )
  return first(decoder.weights, *past, keys_B)


def advance(
  decoder: Decoder, state: State, keys_B, i: int, sampling: Sampling
) -> tuple[Round, State]:
  """Round `i`: judges the drafts, and makes the next ones."""
  judged = decoder.compiled(_round, "state", sampling=sampling)
  return judged(decoder.weights, state, keys_B, i)


def _start(
  weights, cache, hidden_BD, modules, keys_B, *, graphdef, sampling, n_drafts
):
  net = nnx.merge(graphdef, weights)
  x_BLD = hidden_BD[:, None]
  keys_BN = _keys(keys_B, 0, n_drafts + 1)
  token_B, log_prob_B = jax.vmap(choose, (0, 0, None))(
    net.logits(net.norm(x_BLD))[:, 0], keys_BN[:, 0], sampling
  )
  one_B = jnp.ones_like(token_B)
  drafts_BN, log_q_BNW, cache, modules = mtp.draft(
    net,
    x_BLD,
    token_B[:, None],
    jnp.zeros_like(one_B),
    cache,
    modules,
    keys_BN[:, 1:],
    sampling,
  )
  state = State(cache, modules, token_B, drafts_BN, log_q_BNW)
  return Round(token_B[:, None], log_prob_B[:, None], one_B), state


def _round(weights, state, keys_B, i, *, graphdef, sampling):
  net, cache = nnx.merge(graphdef, weights), state.cache
  n_drafts = state.drafts_BN.shape[1]
  keys_BN = _keys(keys_B, i, n_drafts + 1)
  tokens_BL = jnp.concatenate([state.token_B[:, None], state.drafts_BN], 1)
  window = Window(cache.length_B, jnp.ones_like(tokens_BL), absorbed=True)
  x_BLD, cache = run_blocks(net, tokens_BL, cache, window)
  logits_BLW = net.logits(net.norm(x_BLD))
  log_p_BLW = jax.vmap(jax.vmap(filtered, (0, None)), (0, None))(
    logits_BLW, sampling
  )
  accepted_B, token_B = jax.vmap(judge)(
    log_p_BLW, state.drafts_BN, state.log_q_BNW, keys_BN[:, 0]
  )
  place_L = jnp.arange(n_drafts + 1)
  next_BL = jnp.where(
    place_L == accepted_B[:, None],
    token_B[:, None],
    jnp.pad(state.drafts_BN, ((0, 0), (0, 1))),
  )
  log_probs_BL = jnp.take_along_axis(
    jax.nn.log_softmax(logits_BLW), next_BL[..., None], axis=2
  )[..., 0]
  # What the rejected drafts left in the cache is stale from here on.
  cache = cache._replace(length_B=cache.length_B + accepted_B + 1)
  drafts_BN, log_q_BNW, cache, modules = mtp.draft(
    net,
    x_BLD,
    next_BL,
    accepted_B,
    cache,
    state.modules,
    keys_BN[:, 1:],
    sampling,
  )
  state = State(cache, modules, token_B, drafts_BN, log_q_BNW)
  return Round(next_BL, log_probs_BL, accepted_B + 1), state


def _keys(keys_B, i, n):
  """`n` keys for each sequence in round `i`."""
  of_round = lambda key: jax.random.split(jax.random.fold_in(key, i), n)
  return jax.vmap(of_round)(keys_B)


def acceptance(accepted: Iterable[int], n_drafts: int) -> list[float]:
  """Share of rounds that kept draft 1, 2, ..., with all drafts before it.

  Their sum and 1 are the tokens of a round of the main model.

  >>> acceptance([0, 2, 1, 1], 2)
  [0.75, 0.25]
  """
  accepted = list(accepted)
  n_rounds = max(len(accepted), 1)
  return [sum(a > i for a in accepted) / n_rounds for i in range(n_drafts)]

"""Sampling with one full forward pass a token: slow, plain, the reference."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3.nn.transformer import Transformer


def generate(
  model: Transformer,
  prompt: Sequence[int],
  n_tokens: int,
  *,
  length: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  seed: int = 0,
) -> Iterator[int]:
  """Yields `n_tokens` token ids that follow `prompt`.

  The model sees the last `length` tokens, the length it was trained at. Zero
  `temperature` takes the likeliest token; `top_p` draws from the smallest set
  of tokens with at least that probability.
  """
  graphdef, weights = nnx.split(model)
  draw = functools.partial(_next_token, graphdef=graphdef)
  key = jax.random.key(seed)
  tokens = list(prompt)
  for i in range(n_tokens):
    seen = tokens[-length:]
    tokens_L = np.zeros(length, np.int32)
    tokens_L[: len(seen)] = seen
    token = draw(
      weights,
      tokens_L,
      len(seen),
      jax.random.fold_in(key, i),
      temperature,
      top_p,
    )
    tokens.append(int(token))
    yield tokens[-1]


@functools.partial(jax.jit, static_argnames="graphdef")
def _next_token(
  weights, tokens_L, n_seen, key, temperature, top_p, *, graphdef
):
  """The token after the first `n_seen`; what follows them is padding."""
  model = nnx.merge(graphdef, weights)
  segments_L = (jnp.arange(tokens_L.size) < n_seen).astype(jnp.int32)
  out = model(tokens_L[None], segments_L[None])
  last_BLD = jax.lax.dynamic_slice_in_dim(out.hidden[0], n_seen - 1, 1, axis=1)
  return choose(model.logits(last_BLD)[0, 0], key, temperature, top_p)


def choose(
  logits_W: jax.Array, key: jax.Array, temperature, top_p
) -> jax.Array:
  """A token id drawn from the logits, as `generate` says.

  >>> logits_W = jnp.log(jnp.array([0.1, 0.6, 0.3]))
  >>> int(choose(logits_W, jax.random.key(0), 0.0, 1.0))
  1
  """
  scaled_W = logits_W / jnp.maximum(temperature, 1e-6)
  order_W = jnp.argsort(-scaled_W)
  p_W = jax.nn.softmax(scaled_W[order_W])
  # A token stays while those before it have less than top_p: the first always.
  kept_W = jnp.cumsum(p_W) - p_W < top_p
  kept_W = kept_W.at[0].set(True)
  drawn = jax.random.categorical(key, jnp.where(kept_W, jnp.log(p_W), -jnp.inf))
  return order_W[jnp.where(temperature > 0, drawn, 0)]

"""Drawing the next token: temperature, top-k, top-p, min-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.config import ConfigError


class Sampling(NamedTuple):
  """How a token is drawn. The defaults draw from the model's distribution."""

  temperature: float = 1.0  # 0: the likeliest
  top_k: int = 0  # so many of the likeliest; 0: all
  top_p: float = 1.0  # the fewest whose probabilities reach it
  min_p: float = 0.0  # those at least so likely, relative to the likeliest

  def check(self) -> None:
    """Raises ConfigError for a value that is out of range."""
    for name, ok, wanted in (
      ("temperature", self.temperature >= 0, "0 or more"),
      ("top_k", self.top_k >= 0, "0 (all) or more"),
      ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
      ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
    ):
      if not ok:
        raise ConfigError(
          f"{name}: found {getattr(self, name)}, wanted {wanted}"
        )


def filtered(logits_W: jax.Array, sampling: Sampling) -> jax.Array:
  """Log-probabilities after the temperature; -inf for what is left out.

  The filters all look at the distribution after the temperature, and the
  likeliest token always stays.

  >>> p_W = jnp.array([0.1, 0.6, 0.3])
  >>> [f"{x:.2f}" for x in jnp.exp(filtered(jnp.log(p_W), Sampling(top_k=2)))]
  ['0.00', '0.67', '0.33']
  """
  if sampling.temperature <= 0:
    best_W = jnp.arange(logits_W.size) == jnp.argmax(logits_W)
    return jnp.where(best_W, 0.0, -jnp.inf)
  scaled_W = logits_W / sampling.temperature
  if (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0):
    return jax.nn.log_softmax(scaled_W)  # a sort of all tokens takes long
  order_W = jnp.argsort(-scaled_W)
  p_W = jax.nn.softmax(scaled_W[order_W])
  place_W = jnp.arange(p_W.size)
  # A token stays while those before it have less than top_p.
  kept_W = jnp.cumsum(p_W) - p_W < sampling.top_p
  if sampling.top_k:
    kept_W &= place_W < sampling.top_k
  kept_W &= p_W >= sampling.min_p * p_W[0]
  kept_W = kept_W.at[0].set(True)
  log_p_W = jax.nn.log_softmax(jnp.where(kept_W, scaled_W[order_W], -jnp.inf))
  return jnp.zeros_like(log_p_W).at[order_W].set(log_p_W)


def choose(
  logits_W: jax.Array, key: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
  """A token id, and its log-probability under the model's own distribution.

  >>> logits_W = jnp.log(jnp.array([0.1, 0.6, 0.3]))
  >>> int(choose(logits_W, jax.random.key(0), Sampling(temperature=0.0))[0])
  1
  """
  if sampling.temperature <= 0:
    token = jnp.argmax(logits_W)
  else:
    token = jax.random.categorical(key, filtered(logits_W, sampling))
  return token, jax.nn.log_softmax(logits_W)[token]

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
      (
        "temperature",
        self.temperature == 0 or self.temperature >= 1e-4,
        "0 (the likeliest) or 1e-4 or more",
      ),
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

  The filters all look at the distribution after the temperature. The likeliest
  token always stays, and of equally likely ones all or none.

  >>> p_W = jnp.array([0.1, 0.6, 0.3])
  >>> [f"{x:.2f}" for x in jnp.exp(filtered(jnp.log(p_W), Sampling(top_k=2)))]
  ['0.00', '0.67', '0.33']
  """
  if sampling.temperature <= 0:
    best_W = jnp.arange(logits_W.size) == jnp.argmax(logits_W)
    return jnp.where(best_W, 0.0, -jnp.inf)
  scaled_W = logits_W / sampling.temperature
  if (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0):
    return jax.nn.log_softmax(scaled_W)
  p_W = jax.nn.softmax(scaled_W)
  least = jnp.maximum(_least(p_W, sampling), sampling.min_p * p_W.max())
  return jax.nn.log_softmax(jnp.where(p_W >= least, scaled_W, -jnp.inf))


def _least(p_W: jax.Array, sampling: Sampling) -> jax.Array:
  """The least probability that stays, by top_p and top_k.

  A token stays while those likelier than it have less than top_p together, and
  are fewer than top_k. Where that begins is found by bisection, bit by bit: the
  bits of floats above 0 are in the floats' order, and a sort takes far longer.
  """
  k = sampling.top_k or p_W.size

  def halve(_, bounds):  # it begins after `low`, at `high` at the latest
    low, high = bounds
    middle = jnp.maximum((low + high) // 2, 0)  # -1 has the bits of a NaN
    likelier_W = p_W > jax.lax.bitcast_convert_type(middle, jnp.float32)
    stays = likelier_W.sum() < k
    if sampling.top_p < 1:  # rounded, the sum of nearly all may reach 1
      stays &= jnp.where(likelier_W, p_W, 0).sum() < sampling.top_p
    return jnp.where(stays, low, middle), jnp.where(stays, middle, high)

  most = jax.lax.bitcast_convert_type(p_W.max(), jnp.int32)
  _, high = jax.lax.fori_loop(0, 31, halve, (jnp.int32(-1), most))
  return jax.lax.bitcast_convert_type(high, jnp.float32)


def first_largest(x_W: jax.Array) -> jax.Array:
  """`argmax`, in two reductions that a CPU vectorises: half the time; no NaN.

  >>> int(first_largest(jnp.array([1.0, 3.0, 3.0])))
  1
  """
  index_W = jnp.arange(x_W.size)
  return jnp.min(jnp.where(x_W == x_W.max(), index_W, x_W.size - 1))


def choose(
  logits_W: jax.Array, key: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
  """A token id, and its log-probability under the model's own distribution.

  >>> logits_W = jnp.log(jnp.array([0.1, 0.6, 0.3]))
  >>> int(choose(logits_W, jax.random.key(0), Sampling(temperature=0.0))[0])
  1
  """
  if sampling.temperature <= 0:
    token = first_largest(logits_W)
  else:
    token = jax.random.categorical(key, filtered(logits_W, sampling))
  return token, logits_W[token] - jax.nn.logsumexp(logits_W)

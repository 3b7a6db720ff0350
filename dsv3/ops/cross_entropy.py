"""Cross-entropy of the output head in the memory of a chunk (Eq. 23, 24)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLoss(NamedTuple):
  """Sums over all labelled positions; one with label -1 counts nothing."""

  cross_entropy: jax.Array  # nats
  log_z_squared: jax.Array  # the z-loss; log_z is the log-sum-exp of logits
  correct: jax.Array  # int32: labels that had the largest logit


def cross_entropy(
  hidden_BLD: jax.Array,
  head_DW: jax.Array,
  labels_BL: jax.Array,
  *,
  z_loss: bool = False,
  chunk: int = 128,
) -> TokenLoss:
  """Cross-entropy of the output head, without keeping the logits (Eq. 23, 24).

  Positions go through the head `chunk` at a time. The gradient is made in the
  forward pass, while a chunk's logits are at hand, so memory is one chunk of
  logits and no matmul is done twice. Operands in the type of `hidden_BLD`,
  logits and sums float32. Without `z_loss` the gradient of log_z_squared is
  zero.
  """
  chunk = min(chunk, labels_BL.shape[1])
  rest = -labels_BL.shape[1] % chunk
  if rest:
    hidden_BLD = jnp.pad(hidden_BLD, ((0, 0), (0, rest), (0, 0)))
    labels_BL = jnp.pad(labels_BL, ((0, 0), (0, rest)), constant_values=-1)
  return _token_loss(hidden_BLD, head_DW, labels_BL, z_loss, chunk)


def _chunks(x_BL, chunk: int) -> jax.Array:
  """[B, L, ...] as [L / chunk, B, chunk, ...]; the sharded dim B stays whole."""
  n_sequences, length, *rest = x_BL.shape
  split = x_BL.reshape(n_sequences, length // chunk, chunk, *rest)
  return jnp.moveaxis(split, 1, 0)


def _chunk_loss(hidden_BLD, head_DW, labels_BL):
  """TokenLoss of a chunk, and what its gradient needs."""
  logits_BLW = jnp.einsum(
    "BLD,DW->BLW",
    hidden_BLD,
    head_DW.astype(hidden_BLD.dtype),
    precision="highest" if hidden_BLD.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
  valid_BL = labels_BL >= 0
  top_BL = logits_BLW.max(-1)
  log_z_BL = top_BL + jnp.log(jnp.exp(logits_BLW - top_BL[..., None]).sum(-1))
  label_BL1 = jnp.maximum(labels_BL, 0)[..., None]
  logit_BL = jnp.take_along_axis(logits_BLW, label_BL1, axis=-1)[..., 0]
  loss = TokenLoss(
    jnp.where(valid_BL, log_z_BL - logit_BL, 0.0).sum(),
    jnp.where(valid_BL, log_z_BL**2, 0.0).sum(),
    (valid_BL & (logit_BL >= top_BL)).sum(dtype=jnp.int32),
  )
  return loss, (logits_BLW, log_z_BL, valid_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_loss(hidden_BLD, head_DW, labels_BL, z_loss, chunk):
  del z_loss

  def add(total, part):
    loss, _ = _chunk_loss(part[0], head_DW, part[1])
    return jax.tree.map(jnp.add, total, loss), None

  parts = (_chunks(hidden_BLD, chunk), _chunks(labels_BL, chunk))
  return jax.lax.scan(add, _nothing(), parts)[0]


def _nothing() -> TokenLoss:
  return TokenLoss(jnp.float32(0), jnp.float32(0), jnp.int32(0))


def _token_loss_forward(hidden_BLD, head_DW, labels_BL, z_loss, chunk):
  dtype = hidden_BLD.dtype
  product = functools.partial(
    jnp.einsum,
    precision="highest" if dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )

  def gradients(d_logits_BLW, h_BLD):
    d_logits_BLW = d_logits_BLW.astype(dtype)
    d_hidden = product("BLW,DW->BLD", d_logits_BLW, head_DW.astype(dtype))
    return d_hidden.astype(dtype), product("BLD,BLW->DW", h_BLD, d_logits_BLW)

  def add(carry, part):
    total, d_heads = carry
    h_BLD, labels = part
    loss, (logits, log_z, valid) = _chunk_loss(h_BLD, head_DW, labels)
    p_BLW = jnp.where(valid[..., None], jnp.exp(logits - log_z[..., None]), 0.0)
    one_hot = labels[..., None] == jnp.arange(logits.shape[-1])
    d_logits = [p_BLW - one_hot]
    if z_loss:
      d_logits.append(2.0 * log_z[..., None] * p_BLW)
    d_hiddens, d_new = zip(*(gradients(d, h_BLD) for d in d_logits))
    carry = jax.tree.map(jnp.add, (total, d_heads), (loss, d_new))
    return carry, d_hiddens

  n_grads = 2 if z_loss else 1
  d_heads = (jnp.zeros(head_DW.shape, jnp.float32),) * n_grads
  parts = (_chunks(hidden_BLD, chunk), _chunks(labels_BL, chunk))
  (loss, d_heads), d_hiddens = jax.lax.scan(add, (_nothing(), d_heads), parts)
  d_hiddens = tuple(
    jnp.moveaxis(d, 0, 1).reshape(hidden_BLD.shape) for d in d_hiddens
  )
  return loss, (d_hiddens, d_heads, jnp.zeros(0, head_DW.dtype))


def _token_loss_backward(z_loss, chunk, residuals, gradient):
  del chunk
  d_hiddens, d_heads, like_head = residuals
  weights = (gradient.cross_entropy, gradient.log_z_squared)[: 1 + z_loss]
  d_hidden = sum(w * d for w, d in zip(weights, d_hiddens))
  d_head = sum(w * d for w, d in zip(weights, d_heads))
  return (
    d_hidden.astype(d_hiddens[0].dtype),
    d_head.astype(like_head.dtype),
    None,
  )


_token_loss.defvjp(_token_loss_forward, _token_loss_backward)

"""The forward pass over a window of new tokens, beside what is cached.

A window is L new slots of every sequence. All rows of a plain window begin at
one slot, and run keys and values of all heads; an absorbed one begins where
each sequence ends. Both write the latents of the window into the cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3.infer import cache as caches
from dsv3.infer.cache import Cache, Layer
from dsv3.nn import mla, moe
from dsv3.nn.block import unstack
from dsv3.nn.mla import attend, rope_frequencies
from dsv3.nn.transformer import Transformer


class Network(nnx.Module):
  """A Transformer with lists of blocks and MTP modules in place of stacks.

  Inside a step every slice of a stack would be a copy of it. `products` are for
  absorbed attention, `head_dot` for the output head if `Transformer.logits` is not.
  """

  def __init__(
    self,
    model: Transformer,
    products: mla.Products = mla.PRODUCTS,
    head_dot: Callable | None = None,
  ):
    self.embed, self.head, self.norm = model.embed, model.head, model.norm
    stacks = [getattr(model, n) for n in ("dense", "moe") if hasattr(model, n)]
    self.blocks = nnx.List([b for stack in stacks for b in unstack(stack)])
    modules = unstack(model.mtp) if hasattr(model, "mtp") else []
    self.modules = nnx.List(modules)
    for block in [*self.blocks, *(module.block for module in modules)]:
      w_uk_HNC, w_uv_HCV = block.attention.by_head()
      block.w_uk_HNC, block.w_uv_HCV = nnx.Param(w_uk_HNC), nnx.Param(w_uv_HCV)
      block.products = products
    self.model, self.placement = model.model, model.placement
    self.head_dot = head_dot

  embedding = Transformer.embedding

  def logits(self, hidden_BLD: jax.Array) -> jax.Array:
    """As `Transformer.logits`."""
    if self.head_dot:
      return self.head_dot(hidden_BLD, self.head[...])
    return Transformer.logits(self, hidden_BLD)


class Window(NamedTuple):
  """Which slots are new."""

  offset_B: jax.Array  # int32, slot of the first
  inside_BL: jax.Array  # int32, 0 for padding, which is routed to no expert
  absorbed: bool  # else in the plain form, all rows from offset_B[0]


def run_blocks(
  net: Network, tokens_BL: jax.Array, cache: Cache, window: Window
) -> tuple[jax.Array, Cache]:
  """The stream after the last block, [B, L, D], and the cache.

  The length of the cache stays: the caller says how many of the tokens count.
  """
  x_BLD, layers = net.embedding(tokens_BL), []
  for block, layer in zip(net.blocks, cache.layers, strict=True):
    x_BLD, layer = run_block(block, x_BLD, layer, window)
    layers.append(layer)
  return x_BLD, cache._replace(layers=tuple(layers))


def run_block(
  block, x_BLD: jax.Array, layer: Layer, window: Window, first: int = 0
) -> tuple[jax.Array, Layer]:
  """A block over the window; slots from `first` on see none before it."""
  h_BLD = block.attention_norm(x_BLD)
  u_BLD, layer = _attention(block, h_BLD, layer, window, first)
  x_BLD = x_BLD + u_BLD
  u_BLD = block.ffn_norm(x_BLD)
  if isinstance(block.ffn, moe.Moe):
    return x_BLD + _experts(block.ffn, u_BLD, window.inside_BL), layer
  return x_BLD + block.ffn(u_BLD), layer


def _experts(ffn: moe.Moe, u_BLD, inside_BL) -> jax.Array:
  """The output for so many sequences and positions as the devices divide.

  What is added for that is padding, which is routed to no expert.
  """
  n_rows, length = inside_BL.shape
  more = [
    (0, -n % ffn.placement.parts(d)) for n, d in ((n_rows, "B"), (length, "L"))
  ]
  u_BLD = jnp.pad(u_BLD, (*more, (0, 0)))
  y_BLD, _ = ffn(u_BLD, jnp.pad(inside_BL, more))
  return y_BLD[:n_rows, :length]


def _attention(block, h_BLD, layer, window, first):
  attention = block.attention
  offset_B, inside_BL, absorbed = window
  slots_BL = offset_B[:, None] + jnp.arange(h_BLD.shape[1])
  turns = rope_frequencies(attention.model), slots_BL
  q = attention.queries(h_BLD, *turns)
  layer = caches.write(layer, *attention.latent(h_BLD, *turns), offset_B)
  slots_M = jnp.arange(layer.c_kv_BMC.shape[1])
  if absorbed:
    sees_BLM = slots_BL[..., None] >= slots_M
    sees_BLM &= (slots_BL[..., None] < first) | (slots_M >= first)
    with_each = block.w_uk_HNC[...], block.w_uv_HCV[...], block.products
    return attention.absorbed(q, *layer.values(), sees_BLM, *with_each), layer
  c_kv_BMC, k_r_BMR = (x.astype(h_BLD.dtype) for x in layer.values())
  k, v = attention.expand(c_kv_BMC, k_r_BMR)
  segment = lambda slots: 1 + (slots >= first).astype(jnp.int32)
  o_BLHV = attend(
    q,
    k,
    v,
    segment(slots_BL) * inside_BL,
    attention.model,
    segments_BM=jnp.broadcast_to(segment(slots_M), k.shape[:2]),
    start=offset_B[0],
  )
  return attention.output(o_BLHV), layer


def at(x_BLD: jax.Array, index_B: jax.Array) -> jax.Array:
  """One position of each sequence, [B, D]."""
  return jnp.take_along_axis(x_BLD, index_B[:, None, None], axis=1)[:, 0]

"""A model that keeps its past: prefill in chunks, then one token at a time.

Prefill runs the plain form (keys and values of all heads, flash attention), a
decode step the absorbed one (`Mla.absorbed`). Both compute the same; the first
is cheaper where many queries share the keys, the second where one reads a long
past.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.infer import cache as caches
from dsv3.infer.cache import Cache
from dsv3.nn import moe
from dsv3.nn.block import unstack
from dsv3.nn.mla import attend, rope_frequencies
from dsv3.nn.transformer import Transformer


class Decoder:
  """Weights laid out for decoding, and the two compiled functions.

  The layers are unstacked once, here: inside the step every slice of a stack
  would be a copy of it. Raises ConfigError for attention without a latent.
  """

  def __init__(self, model: Transformer, *, cache_dtype: str | None = None):
    self.model: config.Model = model.model
    if self.model.attention.kind != "mla":
      raise ConfigError(
        "config.model.attention.kind: found "
        f"{self.model.attention.kind}, wanted mla: only it has a latent cache"
      )
    if cache_dtype not in (None, *caches.DTYPES):
      raise ConfigError(
        f"cache: found {cache_dtype}, wanted one of {', '.join(caches.DTYPES)}"
      )
    self.cache_dtype = cache_dtype
    self._graphdef, self._weights = nnx.split(_Unstacked(model))
    run = functools.partial(_extend, graphdef=self._graphdef)
    self._prefill = jax.jit(
      functools.partial(run, absorbed=False), donate_argnums=1
    )
    self._step = jax.jit(
      functools.partial(run, absorbed=True), donate_argnums=1
    )

  def empty(self, n_sequences: int, capacity: int) -> Cache:
    """A cache for so many tokens of so many sequences."""
    return caches.empty(self.model, n_sequences, capacity, self.cache_dtype)

  def prefill(
    self, prompts: Sequence[Sequence[int]], room: int, chunk: int = 512
  ) -> tuple[jax.Array, Cache]:
    """Logits after the last token of each prompt, float32 [B, W], and the past.

    Prompts may be of unequal lengths, none empty. The cache has `room` for that
    many tokens more. `chunk` positions are computed at once: what bounds memory.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or not lengths.all():
      raise ConfigError("prompts: found an empty one, wanted at least a token")
    longest = int(lengths.max())
    chunk = min(chunk, _round_up(longest))
    n_chunks = -(-longest // chunk)
    tokens_BL = np.zeros((len(prompts), n_chunks * chunk), np.int32)
    for row, prompt in zip(tokens_BL, prompts):
      row[: len(prompt)] = prompt
    capacity = _round_up(max(n_chunks * chunk, longest + room))
    cache, logits_BW = self.empty(len(prompts), capacity), None
    for first in range(0, n_chunks * chunk, chunk):
      part = tokens_BL[:, first : first + chunk]
      new_B = np.clip(lengths - first, 0, chunk)
      found_BW, cache = self._prefill(self._weights, cache, part, new_B, first)
      ends_B1 = (new_B > 0)[:, None]  # of some the last chunk was before
      logits_BW = (
        found_BW if first == 0 else jnp.where(ends_B1, found_BW, logits_BW)
      )
    return logits_BW, cache

  def step(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits after one more token of each sequence, and the longer past.

    The cache that goes in is used up: its memory holds the one that comes out.
    """
    new_B = jnp.ones_like(cache.length_B)
    return self._step(self._weights, cache, tokens_B[:, None], new_B, None)


def _round_up(n: int) -> int:
  """To a multiple of 64: sizes that differ compile anew."""
  return -(-n // 64) * 64


class _Unstacked(nnx.Module):
  """A Transformer with a list of blocks, without MTP modules."""

  def __init__(self, model: Transformer):
    self.embed, self.head, self.norm = model.embed, model.head, model.norm
    stacks = [getattr(model, n) for n in ("dense", "moe") if hasattr(model, n)]
    self.blocks = nnx.List([b for stack in stacks for b in unstack(stack)])
    self.model = model.model


def _extend(weights, cache, tokens_BL, new_B, first, *, graphdef, absorbed):
  """Logits after the last of `new_B` new tokens of each row, and the cache.

  `first`: in the plain form, the position of all rows' first new token.
  """
  model = nnx.merge(graphdef, weights)
  length = tokens_BL.shape[1]
  inside_BL = (jnp.arange(length) < new_B[:, None]).astype(jnp.int32)
  offset_B = (
    cache.length_B if absorbed else jnp.full_like(cache.length_B, first)
  )
  x_BLD = model.embed[...][tokens_BL].astype(model.model.dtype)
  layers = []
  for block, layer in zip(model.blocks, cache.layers, strict=True):
    h_BLD = block.attention_norm(x_BLD)
    u_BLD, layer = _attention(
      block.attention, h_BLD, layer, offset_B, inside_BL, absorbed
    )
    x_BLD = x_BLD + u_BLD
    u_BLD = block.ffn_norm(x_BLD)
    if isinstance(block.ffn, moe.Moe):
      x_BLD = x_BLD + block.ffn(u_BLD, inside_BL)[0]
    else:
      x_BLD = x_BLD + block.ffn(u_BLD)
    layers.append(layer)
  last_B11 = jnp.maximum(new_B - 1, 0)[:, None, None]
  last_BD = jnp.take_along_axis(x_BLD, last_B11, axis=1)[:, 0]
  logits_BW = Transformer.logits(model, model.norm(last_BD)[:, None])[:, 0]
  return logits_BW, Cache(tuple(layers), cache.length_B + new_B)


def _attention(mla, h_BLD, layer, offset_B, inside_BL, absorbed):
  turns, offset_B1 = rope_frequencies(mla.model), offset_B[:, None]
  q = mla.queries(h_BLD, turns, offset_B1)
  layer = caches.write(layer, *mla.latent(h_BLD, turns, offset_B1), offset_B)
  if absorbed:
    positions_BL = offset_B1 + jnp.arange(h_BLD.shape[1])
    sees_BLM = positions_BL[..., None] >= jnp.arange(layer.c_kv_BMC.shape[1])
    return mla.absorbed(q, *layer, sees_BLM), layer
  c_kv_BMC, k_r_BMR = (x.astype(h_BLD.dtype) for x in layer)
  k, v = mla.expand(c_kv_BMC, k_r_BMR)
  o = attend(
    q, k, v, mla.w_o, inside_BL, mla.model, mla.gemm, start=offset_B[0]
  )
  return o, layer

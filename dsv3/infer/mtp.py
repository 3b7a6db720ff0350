"""MTP modules beside the cache: what they read of a text, what they draft.

Module k joins h^(k-1) of position i with token i + k (Eq. 21). Here its slots
are counted by that token: in slot s every module reads token s + 1, and module
k > 1 what module k - 1 made of slot s - 1. Then all modules have read a text to
the same slot, and are rolled back by the same length. Attention knows the
distance of slots alone, so to count them from elsewhere changes nothing. The
k - 1 slots that begin a module's past have no such input and are seen by none.
"""

import jax
import jax.numpy as jnp

from dsv3.infer.cache import Cache
from dsv3.infer.network import Network, Window, at, run_block
from dsv3.infer.sampling import Sampling, filtered

# What module k - 1 made of the slot before the window, for k = 2, 3, ...
Inputs = tuple[jax.Array, ...]


def read(
  net: Network,
  x_BLD: jax.Array,
  next_BL: jax.Array,
  cache: Cache,
  before: Inputs,
  window: Window,
  last_B: jax.Array,
) -> tuple[Cache, Inputs]:
  """The modules over a chunk of prompts, and what they go on with.

  Args:
    x_BLD: the main model's stream after its last block.
    next_BL: the token that follows each.
    last_B: place of each prompt's last token, counted from the chunk's first.
  """
  h_BLD, layers, after = _handed_on(net, net.norm, x_BLD), [], []
  for k, layer in enumerate(cache.modules):
    if k:
      after.append(carry(before[k - 1], h_BLD, last_B - 1))
      h_BLD = jnp.concatenate([before[k - 1][:, None], h_BLD[:, :-1]], axis=1)
    x_BLD, layer = _run(net, k, h_BLD, next_BL, layer, window)
    h_BLD = _handed_on(net, net.modules[k].norm, x_BLD)
    layers.append(layer)
  return cache._replace(modules=tuple(layers)), tuple(after)


def carry(old_BD: jax.Array, x_BLD: jax.Array, index_B: jax.Array):
  """The position `index_B` or the last before it; the old one if all are later."""
  found_BD = at(x_BLD, jnp.clip(index_B, 0, x_BLD.shape[1] - 1))
  return jnp.where((index_B >= 0)[:, None], found_BD, old_BD)


def draft(
  net: Network,
  x_BLD: jax.Array,
  next_BL: jax.Array,
  accepted_B: jax.Array,
  cache: Cache,
  before: Inputs,
  keys_BN: jax.Array,
  sampling: Sampling,
) -> tuple[jax.Array, jax.Array, Cache, Inputs]:
  """N tokens that may follow, and their distributions.

  Draft k comes from module k. Past the last module, that one is applied again,
  to its own output and the newest draft, one slot on: it stands in for the main
  model, whose hidden state that output predicts.

  Args:
    x_BLD: the main model's stream in the newest slots, of which the first
      `accepted_B` + 1 count; `cache.length_B` is already cut to them.
    next_BL: the token that follows each; the last that counts is newly drawn.
    keys_BN: a key for every draft.

  Returns:
    drafts_BN; log_q_BNW, the log-probabilities they were drawn from; the cache,
    whose modules hold the slots that count, and stale ones behind; the inputs.
  """
  layers, after, drafts, log_qs = list(cache.modules), [], [], []
  last_B = accepted_B
  offset_B = cache.length_B - accepted_B - 1
  h_BLD = _handed_on(net, net.norm, x_BLD)
  for n in range(keys_BN.shape[1]):
    if 0 < n < len(layers):  # the next module has one slot more, the draft's
      after.append(at(h_BLD, accepted_B))
      h_BLD = jnp.concatenate([before[n - 1][:, None], h_BLD], axis=1)
      last_B = last_B + 1
      slots_L = jnp.arange(h_BLD.shape[1])
      next_BL = jnp.pad(next_BL, ((0, 0), (0, 1)))
      next_BL = jnp.where(
        slots_L == last_B[:, None], drafts[-1][:, None], next_BL
      )
    elif n:  # the last module again
      h_BLD, next_BL = at(h_BLD, last_B)[:, None], drafts[-1][:, None]
      offset_B, last_B = offset_B + last_B + 1, jnp.zeros_like(last_B)
    k = min(n, len(layers) - 1)
    inside_BL = jnp.arange(h_BLD.shape[1]) <= last_B[:, None]
    window = Window(offset_B, inside_BL.astype(jnp.int32), absorbed=True)
    x_BLD, layers[k] = _run(net, k, h_BLD, next_BL, layers[k], window)
    h_BLD = _handed_on(net, net.modules[k].norm, x_BLD)
    last_BD = net.modules[k].norm(at(x_BLD, last_B)[:, None])
    log_q_BW = jax.vmap(filtered, (0, None))(
      net.logits(last_BD)[:, 0], sampling
    )
    drafts.append(jax.vmap(jax.random.categorical)(keys_BN[:, n], log_q_BW))
    log_qs.append(log_q_BW)
  cache = cache._replace(modules=tuple(layers))
  return jnp.stack(drafts, 1), jnp.stack(log_qs, 1), cache, tuple(after)


def _run(net, k, h_BLD, next_BL, layer, window):
  module = net.modules[k]
  x_BLD = module.join(h_BLD, net.embedding(next_BL))
  return run_block(module.block, x_BLD, layer, window, first=k)


def _handed_on(net, norm, x_BLD):
  """What the next depth takes from a stream, as `model.mtp.hidden` says."""
  return x_BLD if net.model.mtp.hidden == "before_norm" else norm(x_BLD)

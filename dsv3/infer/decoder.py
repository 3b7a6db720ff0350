"""A model that keeps its past: prefill in chunks, then one token at a time.

Prefill runs the plain form (keys and values of all heads, flash attention), a
decode step the absorbed one (`Mla.absorbed`). Both compute the same; the first
is cheaper where many queries share the keys, the second where one reads a long
past.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.infer import cache as caches
from dsv3.infer import cpu, mtp
from dsv3.infer.cache import Cache
from dsv3.infer.network import Network, Window, run_blocks
from dsv3.infer.redundant import with_copies
from dsv3.nn.transformer import Transformer
from dsv3.ops.gemm import Gemm, plain
from dsv3.ops.placement import ONE_DEVICE, Placement
from dsv3.parallel import eplb


class Past(NamedTuple):
  """What prefill leaves behind."""

  cache: Cache
  hidden_BD: jax.Array  # of the last token, after the last block
  modules: mtp.Inputs  # what MTP modules go on with


class Decoder:
  """Weights laid out for decoding, and the compiled functions.

  A model on a mesh decodes there, sequences dealt to all devices; any number of
  them, padded where the devices do not divide it. `copies` are of busy experts, and
  where they lie.

  Raises ConfigError for attention without a latent.
  """

  def __init__(
    self,
    model: Transformer,
    *,
    cache_dtype: str | None = None,
    copies: eplb.Placement | None = None,
  ):
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
    dtype, placement = self.model.dtype, model.placement
    if jax.default_backend() == "cpu":
      self.dtype, cast = "float32", functools.partial(cpu.as_used, dtype=dtype)
      alone = placement is ONE_DEVICE
      gemm = cpu.gemm(dtype, alone=alone)
      others = cpu.products(alone=alone), gemm.dot
    else:
      self.dtype, cast = dtype, functools.partial(_as_used, dtype=dtype)
      gemm, others = plain(dtype, self.model.moe.kernel), ()

    def network(model):
      model = with_copies(model, copies) if copies else model
      return Network(model, *others)

    weights = cast(nnx.split(network(model))[1])
    self.weights = nnx.as_pure(weights)  # Variables cost 0.1 ms a call
    build = functools.partial(_transformer, gemm=gemm, placement=placement)
    self.graphdef = jax.eval_shape(
      lambda: nnx.split(network(build(self.model, self.dtype)))
    )[0]
    self._compiled = {}

  def compiled(self, function: Callable, donate: str | None = None, **static):
    """`function(weights, ..., graphdef=, **static)`, compiled once.

    As an argument of `jax.jit` the graph would be hashed in 0.4 ms a call.
    """
    key = function, *sorted(static.items())
    if key not in self._compiled:
      bound = functools.partial(function, graphdef=self.graphdef, **static)
      self._compiled[key] = jax.jit(bound, donate_argnames=donate)
    return self._compiled[key]

  def prefill(
    self, prompts: Sequence[Sequence[int]], room: int, chunk: int = 512
  ) -> tuple[jax.Array, Cache]:
    """Logits after the last token of each prompt, float32 [B, W], and the past.

    Prompts may be of unequal lengths, none empty. The cache has `room` for that
    many tokens more. `chunk` positions are computed at once: what bounds memory.
    """
    past = self.read(prompts, room, chunk)
    logits = self.compiled(_logits)
    return logits(self.weights, past.hidden_BD), past.cache

  def read(
    self,
    prompts: Sequence[Sequence[int]],
    room: int,
    chunk: int = 512,
    n_modules: int = 0,
  ) -> Past:
    """As `prefill`, without the logits; so many MTP modules read too."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or not lengths.all():
      raise ConfigError("prompts: found an empty one, wanted at least a token")
    self._check_tokens(prompts)
    longest = int(lengths.max())
    chunk = min(chunk, caches.round_up(longest))
    padded = -(-longest // chunk) * chunk
    tokens_BL = np.zeros((len(prompts), padded + 1), np.int32)
    for row, prompt in zip(tokens_BL, prompts):
      row[: len(prompt)] = prompt
    past = self._empty(
      len(prompts), caches.round_up(max(padded, longest + room)), n_modules
    )
    read = self.compiled(read_chunk, "past")
    for first in range(0, padded, chunk):
      part = tokens_BL[:, first : first + chunk + 1]
      past = read(self.weights, past, part, lengths, first)
    return past

  def _check_tokens(self, prompts) -> None:
    limit = self.model.vocab_size
    for prompt in prompts:
      if strange := [t for t in prompt if not 0 <= t < limit]:
        raise ConfigError(
          f"prompts: found token {strange[0]}, wanted 0 to {limit - 1}"
        )

  def _empty(self, n_sequences: int, capacity: int, n_modules: int) -> Past:
    cache = caches.empty(
      self.model, n_sequences, capacity, self.cache_dtype, n_modules
    )
    zeros_BD = lambda: jnp.zeros((n_sequences, self.model.dim), self.dtype)
    before = tuple(zeros_BD() for _ in range(n_modules - 1))
    return Past(cache, zeros_BD(), before)

  def step(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits after one more token of each sequence, and the longer past.

    The cache that goes in is used up: its memory holds the one that comes out.
    """
    step = self.compiled(one_step, "cache")
    return step(self.weights, cache, tokens_B)


def _transformer(
  model: config.Model, dtype: str, *, gemm: Gemm, placement: Placement
) -> Transformer:
  """The model of a config, computing in `dtype`; no operand is quantised."""
  values = dataclasses.replace(model, dtype=dtype)
  return Transformer(
    values, gemm=gemm, key=jax.random.key(0), placement=placement
  )


def _as_used(weights: nnx.State, dtype: str) -> nnx.State:
  """Matrices in the type that every product casts them to: cast once.

  Norms and routers compute in float32 and stay.
  """

  def leaf(path, x):
    keys = {getattr(key, "key", None) for key in path}
    is_matrix = x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if is_matrix and "router" not in keys else x

  return jax.tree_util.tree_map_with_path(leaf, weights)


def read_chunk(weights, past, tokens_BL, lengths_B, first, *, graphdef):
  """Reads a chunk of all prompts, from slot `first`, and the token after it."""
  net = nnx.merge(graphdef, weights)
  tokens_BL, next_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
  n_tokens = tokens_BL.shape[1]
  new_B = jnp.clip(lengths_B - first, 0, n_tokens)
  offset_B = jnp.full_like(lengths_B, first)
  inside_BL = (jnp.arange(n_tokens) < new_B[:, None]).astype(jnp.int32)
  window = Window(offset_B, inside_BL, absorbed=False)
  x_BLD, cache = run_blocks(net, tokens_BL, past.cache, window)
  last_B = lengths_B - 1 - first
  cache, modules = mtp.read(
    net, x_BLD, next_BL, cache, past.modules, window, last_B
  )
  cache = cache._replace(length_B=cache.length_B + new_B)
  hidden_BD = mtp.carry(past.hidden_BD, x_BLD, last_B)
  return Past(cache, hidden_BD, modules)


def one_step(weights, cache, tokens_B, *, graphdef):
  """Logits [B, W] after one more token of each sequence, and the cache."""
  net = nnx.merge(graphdef, weights)
  tokens_BL = tokens_B[:, None]
  window = Window(cache.length_B, jnp.ones_like(tokens_BL), absorbed=True)
  x_BLD, cache = run_blocks(net, tokens_BL, cache, window)
  cache = cache._replace(length_B=cache.length_B + 1)
  return net.logits(net.norm(x_BLD))[:, 0], cache


def _logits(weights, hidden_BD, *, graphdef):
  net = nnx.merge(graphdef, weights)
  return net.logits(net.norm(hidden_BD[:, None]))[:, 0]

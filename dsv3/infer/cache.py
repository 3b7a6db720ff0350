"""The latent cache of MLA: what decoding keeps of the past (Sec. 2.1.1).

For every token and layer the normed latent and the shared rotated key, C + R
values, and nothing for each head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3 import config

# How each type is kept. Small floats are as bits: to write some of them among
# others, XLA's CPU would make all float32, and small again.
KEPT = {
  "float32": "float32", "bfloat16": "uint16", "float8_e4m3fn": "uint8",
}  # fmt: skip
DTYPES = tuple(KEPT)
_FLOATS = {jnp.dtype(kept): dtype for dtype, kept in KEPT.items()}


class Layer(NamedTuple):
  """The past in one layer, kept as `KEPT` says."""

  c_kv_BMC: jax.Array
  k_r_BMR: jax.Array

  def values(self) -> "Layer":
    """The same as floats."""

    def of(x):
      dtype = jnp.dtype(_FLOATS[x.dtype])
      same = dtype == x.dtype
      return x if same else jax.lax.bitcast_convert_type(x, dtype)

    return Layer(*map(of, self))


class Cache(NamedTuple):
  """The past of B sequences, each from slot 0; what lies past is stale.

  To roll back is to lower `length_B`: new tokens overwrite what is stale.
  """

  layers: tuple[Layer, ...]
  length_B: jax.Array  # int32, tokens of each sequence
  modules: tuple[Layer, ...] = ()  # of MTP modules, where they draft

  @property
  def capacity(self) -> int:
    return self.layers[0].c_kv_BMC.shape[1]


def empty(
  model: config.Model,
  n_sequences: int,
  capacity: int,
  dtype: str | None = None,
  n_modules: int = 0,
) -> Cache:
  """A cache for `capacity` tokens a sequence; dtype None is `model.dtype`."""
  dtype, a = KEPT[dtype or model.dtype], model.attention
  shape = (n_sequences, capacity)
  layers = tuple(
    Layer(
      jnp.zeros((*shape, a.kv_rank), dtype),
      jnp.zeros((*shape, a.rope_dim), dtype),
    )
    for _ in range(model.n_layers + n_modules)
  )
  return Cache(
    layers[: model.n_layers],
    jnp.zeros(n_sequences, jnp.int32),
    layers[model.n_layers :],
  )


def bytes_per_token(model: config.Model, dtype: str | None = None) -> int:
  """(C + R) x layers x item size.

  >>> from dsv3 import overlay
  >>> bytes_per_token(config.build(overlay.load("v3_671b")).model)
  70272
  """
  a = model.attention
  size = jnp.dtype(dtype or model.dtype).itemsize
  return (a.kv_rank + a.rope_dim) * model.n_layers * size


def write(layer: Layer, c_kv_BLC, k_r_BLR, offset_B) -> Layer:
  """Puts new tokens of each sequence at its own place."""

  def put(past_BMX, new_BLX):
    dtype = jnp.dtype(_FLOATS[past_BMX.dtype])
    if dtype == jnp.float8_e4m3fn:  # the cast would make NaN of 449
      new_BLX = jnp.clip(new_BLX, -448, 448)
    new_BLX = new_BLX.astype(dtype)
    if dtype != past_BMX.dtype:
      new_BLX = jax.lax.bitcast_convert_type(new_BLX, past_BMX.dtype)
    one = lambda past, new, at: jax.lax.dynamic_update_slice(past, new, (at, 0))
    return jax.vmap(one)(past_BMX, new_BLX, offset_B)

  return Layer(put(layer.c_kv_BMC, c_kv_BLC), put(layer.k_r_BMR, k_r_BLR))


def round_up(n: int) -> int:
  """A length up to a quarter larger, of four to the octave: each compiles once.

  >>> [round_up(n) for n in (1, 65, 257, 600, 2049)]
  [64, 128, 320, 640, 2560]
  """
  step = max(64, (1 << (n - 1).bit_length()) // 8)
  return -(-n // step) * step

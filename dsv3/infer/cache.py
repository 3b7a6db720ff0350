"""The latent cache of MLA: what decoding keeps of the past (Sec. 2.1.1).

For every token and layer the normed latent and the shared rotated key, C + R
values, and nothing for each head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3 import config

DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
# A CPU would scatter small floats by converting the whole cache, there and back.
BITS = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}


class Layer(NamedTuple):
  """The past in one layer."""

  c_kv_BMC: jax.Array
  k_r_BMR: jax.Array


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
  dtype, a = dtype or model.dtype, model.attention
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
    if past_BMX.dtype == jnp.float8_e4m3fn:  # the cast would make NaN of 449
      new_BLX = jnp.clip(new_BLX, -448, 448)
    dtype, bits = past_BMX.dtype, BITS[past_BMX.dtype.itemsize]
    as_bits = lambda x: jax.lax.bitcast_convert_type(x.astype(dtype), bits)
    one = lambda past, new, at: jax.lax.dynamic_update_slice(past, new, (at, 0))
    put_BMX = jax.vmap(one)(as_bits(past_BMX), as_bits(new_BLX), offset_B)
    return jax.lax.bitcast_convert_type(put_BMX, dtype)

  return Layer(put(layer.c_kv_BMC, c_kv_BLC), put(layer.k_r_BMR, k_r_BLR))


def round_up(n: int) -> int:
  """A length up to a quarter larger, of four to the octave: each compiles once.

  >>> [round_up(n) for n in (1, 65, 257, 600, 2049)]
  [64, 128, 320, 640, 2560]
  """
  step = max(64, (1 << (n - 1).bit_length()) // 8)
  return -(-n // step) * step

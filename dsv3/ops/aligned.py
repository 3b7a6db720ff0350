"""Rows of experts in blocks: no block of 128 rows holds two experts' rows.

Tiles of Wgrad go along the rows (`recipes.py`), and a tile must not mix
experts, or the scale of one would depend on its neighbour's tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # Sec. 3.3.2: the tile


class Aligned(NamedTuple):
  """Where sorted rows go when every expert begins at a multiple of BLOCK."""

  row_Z: jax.Array  # int32, the sorted row of every aligned one
  filled_Z: jax.Array  # bool, False for rows that are none
  place_A: jax.Array  # int32, the aligned row of every sorted one
  inside_A: jax.Array  # bool, False for rows past the last expert's
  load_E: jax.Array  # int32, rows of every expert, filled up to whole blocks
  expert_B: jax.Array  # int32, the expert of every block; the last's past it


def align(load_E: jax.Array, n_rows: int) -> Aligned:
  """The blocks of `n_rows` sorted rows, of which expert e has load_E[e].

  Z is the most that they can take: less than a block more an expert.

  >>> a = align(jnp.array([2, 0, 129]), 131)
  >>> a.load_E.tolist(), a.row_Z.shape, a.place_A[:3].tolist()
  ([128, 0, 256], (512,), [0, 1, 128])
  """
  n_experts = len(load_E)
  filled_E = -(-load_E // BLOCK) * BLOCK
  n_blocks = (n_rows + n_experts * (BLOCK - 1)) // BLOCK
  upto_E, filled_upto_E = jnp.cumsum(load_E), jnp.cumsum(filled_E)
  first_E, filled_first_E = upto_E - load_E, filled_upto_E - filled_E

  def owner(index, upto_E):
    # All compared at once: a search would be a loop.
    method = "compare_all"
    expert = jnp.searchsorted(upto_E, index, side="right", method=method)
    return jnp.minimum(expert, n_experts - 1)

  slot_Z, row_A = jnp.arange(n_blocks * BLOCK), jnp.arange(n_rows)
  expert_B = owner(slot_Z[::BLOCK], filled_upto_E)
  expert_Z = jnp.repeat(expert_B, BLOCK)
  within_Z = slot_Z - filled_first_E[expert_Z]
  filled_Z = within_Z < load_E[expert_Z]
  row_Z = jnp.where(filled_Z, first_E[expert_Z] + within_Z, 0)
  expert_A = owner(row_A, upto_E)
  inside_A = row_A < upto_E[-1]
  place_A = filled_first_E[expert_A] + row_A - first_E[expert_A]
  place_A = jnp.where(inside_A, place_A, 0)
  return Aligned(row_Z, filled_Z, place_A, inside_A, filled_E, expert_B)


def spread(x_A: jax.Array, aligned: Aligned) -> jax.Array:
  """Sorted rows as aligned ones, [Z, ...]; zeros where there is no row."""
  keep = aligned.filled_Z.reshape(-1, *[1] * (x_A.ndim - 1))
  return jnp.where(keep, x_A[aligned.row_Z], 0)


def blocks(x_A: jax.Array, aligned: Aligned) -> jax.Array:
  """Sorted rows as blocks of one expert's, [B, BLOCK, ...]."""
  x_Z = spread(x_A, aligned)
  return x_Z.reshape(-1, BLOCK, *x_Z.shape[1:])


def gather(x_Z: jax.Array, aligned: Aligned) -> jax.Array:
  """Aligned rows as sorted ones, [A, ...]; zeros past the last expert's."""
  keep = aligned.inside_A.reshape(-1, *[1] * (x_Z.ndim - 1))
  return jnp.where(keep, x_Z[aligned.place_A], 0)

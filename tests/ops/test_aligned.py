"""Rows of experts in blocks: each row once, and no block of two experts."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import aligned

LOADS = [[3, 0, 200, 128], [0, 0, 0, 0], [331, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_every_row_has_a_place_and_no_block_two_experts(load):
  n_rows, total = 331, sum(load)
  places = aligned.align(jnp.array(load, jnp.int32), n_rows)
  x_AI = np.arange(1, n_rows + 1, dtype=np.float32)[:, None] * np.ones((1, 2))
  x_ZI = np.asarray(aligned.spread(jnp.asarray(x_AI), places))
  assert len(x_ZI) % aligned.BLOCK == 0
  # Rows keep their order; between the experts there are zeros alone.
  np.testing.assert_array_equal(x_ZI[x_ZI[:, 0] > 0], x_AI[:total])
  owner_A = np.repeat(np.arange(4), load)
  for block, expert in zip(np.split(x_ZI, len(x_ZI) // 128), places.expert_B):
    rows = block[block[:, 0] > 0, 0].astype(int) - 1
    assert all(owner_A[rows] == int(expert))
  assert places.load_E.tolist() == [-(-n // 128) * 128 for n in load]
  back = np.asarray(aligned.gather(jnp.asarray(x_ZI), places))
  np.testing.assert_array_equal(back[:total], x_AI[:total])
  assert not back[total:].any()

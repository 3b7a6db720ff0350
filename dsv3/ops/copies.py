"""Experts with copies: which of them a token goes to (Sec. 3.4).

A slot holds an expert or a copy of one. slot_EC has the slots of every expert, and
-1 behind them where others have more.
"""

import jax
import jax.numpy as jnp
import numpy as np


def table(expert_S: np.ndarray, n_experts: int) -> np.ndarray:
  """slot_EC of the experts in all slots; each has one at least.

  >>> table(np.array([0, 1, 0, 2]), 3).tolist()
  [[0, 2], [1, -1], [3, -1]]
  """
  found = [np.flatnonzero(expert_S == e) for e in range(n_experts)]
  slot_EC = np.full((n_experts, max(map(len, found))), -1, np.int32)
  for row, slots in zip(slot_EC, found):
    row[: len(slots)] = slots
  return slot_EC


def choose(slot_EC: jax.Array, experts_TK: jax.Array, n_slots: int):
  """The slot of every choice: tokens take an expert's copies in turn.

  An expert past the last is none, and is `n_slots`.

  >>> slot_EC = jnp.array([[0, 2], [1, -1], [3, -1]])
  >>> choose(slot_EC, jnp.array([[0], [0], [2], [3]]), 4).ravel().tolist()
  [0, 2, 3, 4]
  """
  turn_T1 = jnp.arange(len(experts_TK))[:, None]
  n_copies_E = (slot_EC >= 0).sum(1)
  known_TK = jnp.minimum(experts_TK, len(slot_EC) - 1)
  slot_TK = slot_EC[known_TK, turn_T1 % n_copies_E[known_TK]]
  return jnp.where(experts_TK < len(slot_EC), slot_TK, n_slots)


def load_of_experts(slot_EC: jax.Array, load_S: jax.Array) -> jax.Array:
  """Tokens of every expert, from those of every slot.

  >>> slot_EC = jnp.array([[0, 2], [1, -1], [3, -1]])
  >>> load_of_experts(slot_EC, jnp.array([5, 1, 4, 2])).tolist()
  [9, 1, 2]
  """
  return jnp.where(slot_EC >= 0, load_S[slot_EC], 0).sum(1)

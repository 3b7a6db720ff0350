"""Which positions of a row the devices of `context` have, so that all do as much.

A query sees its past, so late positions cost more than early ones. Rows are cut into
two runs for every device, and device i has run i and run i from the end.
"""

import jax
import jax.numpy as jnp
import numpy as np


def order(n_devices: int) -> np.ndarray:
  """The runs of device 0, then of device 1, ...

  >>> order(4).tolist()
  [0, 7, 1, 6, 2, 5, 3, 4]
  """
  first = np.arange(n_devices)
  return np.stack([first, 2 * n_devices - 1 - first], axis=1).reshape(-1)


def deal(x: jax.Array, n_devices: int) -> jax.Array:
  """x with its last dim, of positions, in the order of the devices.

  >>> deal(jnp.arange(8), 2).tolist()
  [0, 1, 6, 7, 2, 3, 4, 5]
  """
  return _permute(x, order(n_devices), x.ndim - 1)


def gather_up(x: jax.Array, n_devices: int, axis: int) -> jax.Array:
  """The inverse of `deal`, along any dim."""
  return _permute(x, np.argsort(order(n_devices)), axis)


def starts(n_here: int, index, n_devices: int) -> tuple:
  """Positions at which the two runs of device `index` begin, of n_here in all."""
  n = n_here // 2
  return index * n, (2 * n_devices - 1 - index) * n


def _permute(x: jax.Array, runs: np.ndarray, axis: int) -> jax.Array:
  if len(runs) == 2:  # of one device
    return x
  cut = x.reshape(*x.shape[:axis], len(runs), -1, *x.shape[axis + 1 :])
  return jnp.take(cut, runs, axis=axis).reshape(x.shape)

"""Positions of a row over the devices of `context`: all have as much to do."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.parallel import positions


@pytest.mark.parametrize("n_devices", [1, 2, 4, 8])
def test_every_device_sees_as_much_of_the_past(n_devices):
  dealt = positions.deal(jnp.arange(64), n_devices).reshape(n_devices, -1)
  visits = (1 + dealt).sum(1)  # position l sees l + 1 keys
  assert (visits == 64 * 65 // 2 // n_devices).all()
  for device, here in enumerate(np.asarray(dealt)):
    first, second = positions.starts(len(here), device, n_devices)
    half = np.arange(len(here) // 2)
    np.testing.assert_array_equal(here, [*first + half, *second + half])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gathered_positions_are_in_their_order(axis):
  x = jnp.arange(3 * 24 * 2).reshape(3, 24, 2).swapaxes(1, axis)
  dealt = positions.deal(x.swapaxes(axis, 2), 3).swapaxes(axis, 2)
  assert not (dealt == x).all()
  np.testing.assert_array_equal(positions.gather_up(dealt, 3, axis), x)

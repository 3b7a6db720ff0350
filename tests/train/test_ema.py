"""The host's moving average is the device's."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.train.ema import HostEma
from dsv3.train.step import update_ema


def test_host_average_equals_the_device_average():
  params = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5)}
  host, device = HostEma(params, 0.9), jax.tree.map(jnp.copy, params)
  grow = jax.jit(
    lambda p: jax.tree.map(lambda x: 1.1 * x + 1, p), donate_argnums=0
  )
  for _ in range(20):
    params = grow(params)  # donates what the host has just been given
    device = update_ema(device, params, 0.9)
    host.update(params)
  found = host.wait()
  for name in ("a", "b"):
    np.testing.assert_allclose(found[name], device[name], rtol=1e-6)


def test_host_average_is_no_view_of_the_parameters():
  params = {"a": jnp.ones(4)}
  host = HostEma(params, 0.5)
  host.update({"a": jnp.full(4, 3.0)})
  np.testing.assert_array_equal(host.wait()["a"], np.full(4, 2.0))
  np.testing.assert_array_equal(params["a"], np.ones(4))

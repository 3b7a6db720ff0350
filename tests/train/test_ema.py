"""The host's moving average is the device's."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def test_host_average_of_parameters_on_several_devices():
  """Cut, cut and replicated, and replicated ones come back as they lie."""
  mesh = jax.make_mesh((2, 2), ("a", "b"))
  rng = np.random.default_rng(0)
  for spec in (P("a", "b"), P(None, "b"), P()):
    put = lambda x, spec=spec: jax.device_put(x, NamedSharding(mesh, spec))
    first, second = rng.normal(size=(2, 4, 6)).astype(np.float32)
    host = HostEma({"w": put(first)}, 0.75)
    host.update({"w": put(second)})
    found = host.wait()["w"]
    np.testing.assert_allclose(found, first + 0.25 * (second - first), 1e-6)
    assert isinstance(found, np.ndarray) == (spec == P())
    if spec != P():
      assert found.sharding.is_equivalent_to(put(first).sharding, 2)


def test_host_average_is_no_view_of_the_parameters():
  params = {"a": jnp.ones(4)}
  host = HostEma(params, 0.5)
  host.update({"a": jnp.full(4, 3.0)})
  np.testing.assert_array_equal(host.wait()["a"], np.full(4, 2.0))
  np.testing.assert_array_equal(params["a"], np.ones(4))

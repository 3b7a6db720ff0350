"""The device of this process as a chip, and a run's forecast on it."""

import dataclasses
import functools
import os
import time

from dsv3 import config
from dsv3.plan import answer, chips
from dsv3.plan.answer import Plan
from dsv3.plan.mesh import Mesh


@functools.cache
def chip(dtype: str) -> chips.Chip | None:
  """The chip of the first device; None for one that no sheet is known of.

  A CPU has no sheet: its peak is the rate of a product of two 1024 x 1024
  matrices of `dtype`, measured now, in a third of a second. An accelerator in
  float32 is not planned either: sheets state no rate for it.
  """
  import jax

  device = jax.devices()[0]
  if device.platform == "cpu":
    return _cpu(dtype)
  found = chips.of_device(device.device_kind) if dtype == "bfloat16" else None
  return found and of_one_device(found)


def of_one_device(chip: chips.Chip) -> chips.Chip:
  """What JAX counts as a device: of some chips it is a half."""
  n = chip.devices
  rates = ("bf16", "fp8", "hbm", "hbm_rate", "link_rate", "network_rate")
  parts = {rate: getattr(chip, rate) / n for rate in rates}
  return dataclasses.replace(chip, **parts, devices=1)


def _cpu(dtype: str) -> chips.Chip:
  import jax
  import jax.numpy as jnp
  import numpy as np

  one = jnp.ones((1024, 1024), dtype)
  dot = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
  share = (
    1 / jax.local_device_count()
  )  # virtual ones have the cores between them
  flops = share * 2 * 1024**3 / _fastest(lambda: dot(one).block_until_ready())
  block = np.ones(1 << 24, np.float32)
  other = np.empty_like(block)
  moved = share * 2 * block.nbytes / _fastest(lambda: np.copyto(other, block))
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return chips.Chip(
    name="cpu",
    kinds=("cpu",),
    family="cpu",
    bf16=flops,
    fp8=flops,
    hbm=share * memory,
    hbm_rate=moved,
    domain=1,
    link_rate=moved,
    network_rate=moved,
    torus=0,
    watts=1.0,
    price=None,
    source="measured: a matrix product, a copy",
  )


def _fastest(call) -> float:
  """Seconds of the fastest of five calls, after one that does not count."""
  call()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def forecast(values: config.Config, mesh: Mesh = Mesh()) -> Plan | None:
  """The plan of this run on a mesh of such devices; None if they are unknown."""
  found = chip(values.model.dtype)
  if found is None:
    return None
  return answer.of(
    values,
    chip=found,
    n_chips=mesh.size,
    mesh=mesh,
    microbatches=values.train.microbatches,
  )

"""The moving average of the parameters, in host memory (Sec. 3.2.3).

The report keeps it in CPU memory and updates it while the next step runs. Here
too: the device gives a copy of the parameters, a thread does the arithmetic.
"""

import concurrent.futures

import jax
import numpy as np
from flax import nnx


class HostEma:
  """ema += (1 - decay) * (params - ema), in float32 NumPy arrays."""

  def __init__(self, params: nnx.State, decay: float):
    self._ema = jax.tree.map(lambda p: np.array(p, np.float32), params)
    self._rate = np.float32(1 - decay)
    self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    self._busy: concurrent.futures.Future | None = None

  def update(self, params: nnx.State) -> None:
    """Takes `params` in; they may be donated once this returns."""
    jax.tree.map(lambda p: p.copy_to_host_async(), params)
    self.wait()  # at most one copy of the parameters waits for its turn
    # On a CPU `np.asarray` is a view, which the next step would write over.
    copy = jax.tree.map(np.array, params)
    self._busy = self._thread.submit(self._blend, copy)

  def _blend(self, params: nnx.State) -> None:
    for e, p in zip(jax.tree.leaves(self._ema), jax.tree.leaves(params)):
      p -= e
      p *= self._rate
      e += p

  def wait(self) -> nnx.State:
    """The average, once all updates are in it; it stays this object's."""
    if self._busy is not None:
      self._busy.result()
    return self._ema

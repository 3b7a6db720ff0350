"""The moving average of the parameters, in host memory (Sec. 3.2.3).

The report keeps it in CPU memory and updates it while the next step runs. Here
too: the device gives a copy of the parameters, a thread does the arithmetic. Of
several processes each has the average of what lies on its own devices.
"""

import concurrent.futures

import jax
import numpy as np
from flax import nnx

Parts = dict[str, np.ndarray]  # of an array, by what they are of it


class HostEma:
  """ema += (1 - decay) * (params - ema), in float32 NumPy arrays."""

  def __init__(self, average: nnx.State, decay: float):
    """`average`: what it begins with, where the parameters lie."""
    arrays, self._structure = jax.tree.flatten(average)
    self._like = [
      jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding)
      for x in arrays
    ]
    self._ema = [_copy(x) for x in arrays]
    self._rate = np.float32(1 - decay)
    self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    self._busy: concurrent.futures.Future | None = None

  def update(self, params: nnx.State) -> None:
    """Takes `params` in; they may be donated once this returns."""
    arrays = jax.tree.leaves(params)
    for x in arrays:
      for part in _parts(x).values():
        part.copy_to_host_async()
    self._finish()  # at most one copy of the parameters waits for its turn
    copies = [_copy(x) for x in arrays]
    self._busy = self._thread.submit(self._blend, copies)

  def _blend(self, copies: list[Parts]) -> None:
    for ema, new in zip(self._ema, copies, strict=True):
      for key, p in new.items():
        p -= ema[key]
        p *= self._rate
        ema[key] += p

  def _finish(self) -> None:
    if self._busy is not None:
      self._busy.result()

  def wait(self) -> nnx.State:
    """The average, once all updates are in it; it stays this object's.

    NumPy arrays where this process has them whole, else as the parameters lie.
    """
    self._finish()
    found = map(_joined, self._ema, self._like)
    return jax.tree.unflatten(self._structure, list(found))


def _parts(x: jax.Array) -> dict[str, jax.Array]:
  """The different ones of an array that lie on devices of this process."""
  return {str(shard.index): shard.data for shard in x.addressable_shards}


def _copy(x: jax.Array) -> Parts:
  # On a CPU `np.asarray` is a view, which the next step would write over.
  return {key: np.array(p, np.float32) for key, p in _parts(x).items()}


def _joined(parts: Parts, like: jax.ShapeDtypeStruct):
  where = like.sharding
  if where.is_fully_addressable and len(parts) == 1:
    return next(iter(parts.values()))
  part = lambda index: parts[str(index)].copy()  # on a CPU it would be a view
  return jax.make_array_from_callback(like.shape, where, part)

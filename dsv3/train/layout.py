"""Where the state and the batches of a run lie: its mesh, applied."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from dsv3 import config
from dsv3.ops.placement import ONE_DEVICE, Placement
from dsv3.parallel import mesh, placement, shardings, sizes
from dsv3.train import optimizer
from dsv3.train.state import TrainState, create
from dsv3.train.step import Batch


class Share(NamedTuple):
  """Rows of a batch that a process reads."""

  runs: tuple[range, ...]  # in their order, none next to another
  counts: bool  # of those with the same rows one counts what is in them

  def place(self, row: int) -> int:
    """The place of a row among them."""
    inside = next(i for i, run in enumerate(self.runs) if row in run)
    return sum(map(len, self.runs[:inside])) + row - self.runs[inside].start


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh of the devices that there are, and what goes where on it."""

  sizes: config.Mesh
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
  placement: Placement = ONE_DEVICE

  def of_state(self, like: TrainState) -> TrainState:
    """A sharding for every array of a state.

    The optimizer's state and the average of the parameters are over the
    replicas (ZeRO-1, Sec. 3.2), parameters over `fsdp` and what computes
    different parts of them; all else is everywhere.
    """
    where = (self.sizes, self.mesh)
    return shardings.everywhere(like, self.mesh).replace(
      params=shardings.weights(like.params, *where),
      opt_state=shardings.moments(like.opt_state, *where),
      ema=shardings.moments(like.ema, *where),
    )

  def everywhere(self) -> Any:
    """The sharding of what every device, so every process, is to have."""
    return shardings.everywhere(0, self.mesh)

  def of_batch(self) -> Batch:
    """A sharding for every array of a batch: rows dealt, positions cut."""
    return Batch(*(shardings.computed(dims, self.mesh) for dims in Batch.dims))

  def share(self, n_rows: int) -> Share:
    """The rows that the devices of this process compute on.

    All of them where two processes have some rows in common and others not.
    """
    sharding = self.of_batch().tokens_BL
    found, here = collections.defaultdict(set), jax.process_index()
    indices = sharding.devices_indices_map((n_rows, self.sizes.context))
    for device, (rows, _) in indices.items():
      found[device.process_index].add(range(*rows.indices(n_rows)))
    runs = {process: _joined(ranges) for process, ranges in found.items()}
    if sum(len(run) for some in set(runs.values()) for run in some) != n_rows:
      return Share((range(n_rows),), here == 0)
    with_these = [p for p, some in runs.items() if some == runs[here]]
    return Share(runs[here], here == min(with_these))

  def put_rows(self, batch: Batch, n_rows: int) -> Batch:
    """The global batch, of the rows that each process has (`share`)."""
    if jax.process_count() == 1:
      return batch
    share = self.share(n_rows)

    def one(x, sharding):
      def part(index):
        rows = range(*index[0].indices(n_rows))
        first = share.place(rows.start)
        return x[(slice(first, first + len(rows)), *index[1:])]

      shape = (n_rows, *x.shape[1:])
      return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, batch, self.of_batch())


def _joined(ranges: Iterable[range]) -> tuple[range, ...]:
  """The same numbers in as few ranges as there can be.

  >>> _joined([range(4, 6), range(0, 2), range(2, 4), range(8, 9)])
  (range(0, 6), range(8, 9))
  """
  out = []
  for one in sorted(ranges, key=lambda r: r.start):
    if out and one.start == out[-1].stop:
      one = range(out.pop().start, one.stop)
    out.append(one)
  return tuple(out)


def batch_like(values: config.Config, size: int) -> Batch:
  """Shapes of a batch of `size` sequences."""
  length = values.data.seq_len
  of = lambda *dims: jax.ShapeDtypeStruct((size, *dims, length), "int32")
  return Batch(of(), of(1 + values.model.mtp.depth), of())


def of_devices(
  values: config.Config, devices: Sequence[jax.Device] | None = None
) -> Layout:
  """The Layout on some devices, there or not; None: those that there are."""
  n_devices = jax.device_count() if devices is None else len(devices)
  found = sizes.resolve(values.mesh, n_devices)
  sizes.check_run(found, values, n_devices)
  made = mesh.make(found, devices)
  return Layout(found, made, placement.make(found, made))


def of_number(values: config.Config, n_devices: int) -> Layout:
  """The Layout of so many devices of which none is there: to be described."""
  found = sizes.resolve(values.mesh, n_devices)
  sizes.check_run(found, values, n_devices)
  return Layout(found, mesh.unbuilt(found))


def of_run(values: config.Config) -> Layout:
  """The Layout of a run; ConfigError, with the field, where none can be."""
  found = of_devices(values)
  taken, devices = found.sizes.size, jax.device_count()
  if jax.process_count() > 1 and taken != devices:
    raise config.ConfigError(
      f"config.mesh: found {found.sizes} of {taken} devices, wanted all "
      f"{devices} of the {jax.process_count()} processes"
    )
  return found


def describe(values: config.Config, where: Layout) -> str:
  """Every array of the state and the batch: its spec, its bytes on a device."""
  adam = optimizer.make(values.optimizer)
  like = jax.eval_shape(lambda: create(values, adam))[1]
  batch = batch_like(values, values.schedule.batch_size)
  rows = [
    *shardings.rows(like, where.of_state(like)),
    *shardings.rows(batch, where.of_batch()),
  ]
  cells = [("array", "shape", "dtype", "spec", "bytes a device")]
  cells += [
    (
      r.name,
      "x".join(map(str, r.shape)),
      r.dtype,
      _text(r.spec, where.sizes),
      f"{r.bytes:,}",
    )
    for r in rows
  ]
  widths = [max(len(row[i]) for row in cells) for i in range(5)]
  lines = [
    "  ".join(cell.ljust(w) for cell, w in zip(row[:4], widths))
    + f"  {row[4]:>{widths[4]}}"
    for row in cells
  ]
  total = sum(row.bytes for row in rows)
  return "\n".join(
    [*lines, f"{total:,} bytes on each of {where.sizes.size}: {where.sizes}"]
  )


def _text(spec, sizes: config.Mesh) -> str:
  """`-,expert,data+fsdp`: the axes of every dim that cut it.

  >>> from jax.sharding import PartitionSpec
  >>> spec = PartitionSpec(None, ("data", "fsdp"), "tensor")
  >>> _text(spec, config.Mesh(data=2, fsdp=4))
  '-,data+fsdp,-'
  """
  axes = [(part,) if isinstance(part, str) else part or () for part in spec]
  cut = ["+".join(a for a in part if sizes.along(a) > 1) for part in axes]
  return ",".join(part or "-" for part in cut) or "-"

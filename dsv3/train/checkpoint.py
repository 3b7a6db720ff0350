"""Checkpoints: atomic, asynchronous, the newest and the best kept.

A checkpoint `N` is the state after step N. Every part of it is an item of its
own, so that evaluation reads the parameters alone:

  params ema       nested dicts by name: moe/attention/w_uk; float32
  router           moe/ffn/router/bias; float32
  optimizer        1/first/..., 1/second/...: the moments; 1/count
  amax             of earlier steps, by Linear, under delayed scaling
  guarded          by Linear and layer: does the guard keep it high?
  counters         step, skipped, skipped_total
  meta             JSON: data position, seed, type and shape of every array

Orbax writes to a folder of another name and renames it, so a killed save
leaves no checkpoint rather than half of one.
"""

import contextlib
import gc
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from dsv3.errors import RunError
from dsv3.parallel import processes
from dsv3.train.trees import (
  Trees,
  by_name,
  dtypes,
  from_names,
  is_there,
  shapes,
)

_LOG = logging.getLogger("absl")  # which Orbax writes to
OPTIONAL = ("amax", "guarded")  # left out where a checkpoint has it otherwise


class _Errors(logging.Handler):
  """Keeps the last error that Orbax has logged: of several processes those that
  could write wait for the other, and no call of theirs or its returns."""

  def __init__(self):
    super().__init__(logging.ERROR)
    self.last: BaseException | None = None

  def emit(self, record: logging.LogRecord) -> None:
    if record.exc_info:
      self.last = record.exc_info[1]


class CheckpointError(RunError):
  """A checkpoint that cannot be read or written: one line, which and why."""


class Checkpoints:
  """The checkpoints of a run."""

  def __init__(
    self, folder: pathlib.Path, *, kept: int = 1, read_only: bool = False
  ):
    self.folder = pathlib.Path(folder).resolve()
    self._errors = _Errors()
    self._manager = None if read_only else self._manage(kept)

  def _manage(self, kept: int) -> ocp.CheckpointManager:
    _LOG.addHandler(self._errors)
    if processes.is_first():
      self._set_aside_unreadable_scores()
    processes.wait_for_all("scores of checkpoints read")
    score = lambda metrics: metrics["bits_per_byte"]
    best = checkpoint_managers.BestN(
      get_metric_fn=score,
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    policies = [checkpoint_managers.LatestN(kept), best]
    options = ocp.CheckpointManagerOptions(
      best_fn=score,  # without it Orbax leaves the metrics out of the folder
      best_mode="min",
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,  # of saves that were killed
    )
    return ocp.CheckpointManager(self.folder, options=options)

  @property
  def steps(self) -> list[int]:
    """Steps of all finished checkpoints, oldest first."""
    if self._manager is None:
      return sorted(ocp.utils.checkpoint_steps(self.folder))
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    trees: Trees,
    meta: Mapping[str, Any],
    bits_per_byte: float | None = None,
  ) -> None:
    """Starts to save; returns once the arrays may be donated.

    Raises CheckpointError, in every process, where the disk has no room for it.
    """
    self._check_room(step, trees)
    named = {item: by_name(tree) for item, tree in trees.items()}
    meta = {
      **meta,
      "dtypes": dtypes(named),
      "shapes": shapes(named),
    }
    items = {item: ocp.args.StandardSave(tree) for item, tree in named.items()}
    metrics = {"bits_per_byte": bits_per_byte} if bits_per_byte else None
    with self._told(f"step {step}"):
      self._manager.save(
        step,
        args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)),
        metrics=metrics,
        force=True,
      )

  @contextlib.contextmanager
  def _told(self, what: str) -> Iterator[None]:
    """Makes one line of what goes wrong in a save, now or in the one before."""
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
      reason = str(error).strip().split("\n")[0][:120]
      steps = sorted(ocp.utils.checkpoint_steps(self.folder))
      raise CheckpointError(
        f"{self.folder}: {what} could not be written ({reason}); the newest "
        f"there is: {steps[-1] if steps else 'none'}"
      ) from error

  def _check_room(self, step: int, trees: Trees) -> None:
    """Before anything is written: a write that fails in one process of several
    keeps the others waiting."""
    needed = sum(x.nbytes for x in jax.tree.leaves(trees))
    free = shutil.disk_usage(self.folder).free
    if processes.largest(int(free < needed)):
      newest = self.steps[-1] if self.steps else "none"
      raise CheckpointError(
        f"{self.folder}: found {free / 1e9:.3f} GB free, wanted "
        f"{needed / 1e9:.3f} for step {step}; the newest there is: {newest}"
      )

  def trouble(self) -> BaseException | None:
    """What went wrong with a save that has been started, as far as is known."""
    return self._errors.last

  def restore(self, step: int, like: Trees) -> tuple[Trees, dict[str, Any]]:
    """The items of `like` at `step`, and the meta.

    The leaves of `like` say what comes back: jax.ShapeDtypeStruct with a
    sharding a jax.Array, a NumPy array a NumPy array.
    """
    meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
    like = {
      item: tree
      for item, tree in like.items()
      if item not in OPTIONAL or is_there(item, tree, meta)
    }
    named = {item: by_name(tree) for item, tree in like.items()}
    _check_dtypes(named, meta["dtypes"], self.folder / str(step))
    wanted = {item: ocp.args.StandardRestore(t) for item, t in named.items()}
    found = self._read(step, **wanted) if wanted else {}
    trees = {item: from_names(like[item], found[item]) for item in like}
    return trees, meta

  def stored(self, step: int, item: str, meta: Mapping[str, Any]) -> Trees:
    """An item as it is on disk, by name, NumPy; empty if it is not there."""
    tree = {
      name.removeprefix(f"{item}/"): np.broadcast_to(
        np.zeros((), meta["dtypes"][name]), shape
      )
      for name, shape in meta["shapes"].items()
      if name.startswith(f"{item}/")
    }
    return self.restore(step, {item: tree})[0][item] if tree else {}

  def _read(self, step: int, **items) -> Mapping[str, Any]:
    arguments = ocp.args.Composite(**items)
    if self._manager is not None:
      return self._manager.restore(step, args=arguments)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      return reader.restore(self.folder / str(step), args=arguments)

  def restore_newest(
    self,
    like: Trees,
    tell: Callable[[str], None],
    *,
    set_aside: bool = False,
  ) -> tuple[int, Trees, dict[str, Any]] | None:
    """The newest checkpoint that can be read; None if there is none at all.

    One that any process finds damaged is reported and the one before it taken.
    With `set_aside` it then moves to `damaged/` beside the checkpoints, for its
    step will be saved again; it is never deleted. Where none can be read all
    stay: what ails them may be the code.
    """
    failures, damaged = [], []
    for step in reversed(self.steps):
      reason = ""
      try:
        found = self.restore(step, like)
      except CheckpointError:
        raise
      except Exception as error:  # Orbax and TensorStore raise many kinds
        _forget(error)
        reason = str(error).strip().split("\n")[0][:120]
      if not processes.largest(bool(reason)):  # one may see what others do not
        break
      reason = reason or "as another process finds"
      failures.append(f"{self.folder / str(step)} ({reason})")
      tell(f"damaged checkpoint: {failures[-1]}; trying the one before")
      damaged.append(step)
    else:
      if failures:
        raise CheckpointError(f"no checkpoint can be read: {failures[0]}")
      return None
    if damaged and set_aside:
      self._set_aside(damaged)
    return step, *found

  def _set_aside_unreadable_scores(self) -> None:
    """Orbax reads the scores of all steps at once, and stops at a damaged one."""
    for path in sorted(self.folder.glob("*/metrics/metrics")):
      try:
        json.loads(path.read_text())
      except ValueError as error:
        step = path.parent.parent
        place = self._move(step)
        print(f"damaged checkpoint: {step} ({error}); set aside as {place}")

  def _move(self, step: pathlib.Path) -> pathlib.Path:
    """Moves a checkpoint to `damaged/`; returns where it is now."""
    place = self.folder.parent / "damaged" / step.name
    place.parent.mkdir(exist_ok=True)
    while place.exists():
      place = place.with_name(f"{place.name}+")
    return step.rename(place)

  def _set_aside(self, steps: Sequence[int]) -> None:
    """One process moves them, when all have found them damaged."""
    processes.wait_for_all("damaged checkpoints found")
    if processes.is_first():
      for step in steps:
        self._move(self.folder / str(step))
    processes.wait_for_all("damaged checkpoints set aside")
    self._manager.reload()

  def wait(self) -> None:
    """Returns when all saves are on disk; raises what went wrong with them."""
    with self._told("a checkpoint"):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for what is at work in the folder; once is enough."""
    manager, self._manager = self._manager, None
    if manager is not None:
      manager.close()
      _LOG.removeHandler(self._errors)


def _forget(error: Exception) -> None:
  """Drops what a failed read left behind without a page of text on stderr.

  Orbax's unfinished reads raise when they are collected.
  """
  error.__traceback__ = error.__context__ = error.__cause__ = None
  report, sys.unraisablehook = sys.unraisablehook, lambda _: None
  gc.collect()
  sys.unraisablehook = report


def _check_dtypes(named, found: Mapping[str, str], where) -> None:
  """Orbax casts to the wanted type in silence: a bfloat16 bias would stay one."""
  for name, wanted in dtypes(named).items():
    if found.get(name, wanted) != wanted:
      raise CheckpointError(
        f"{where}: {name}: found {found[name]}, wanted {wanted}"
      )
    if name.startswith("router/"):
      assert wanted == "float32", (name, wanted)

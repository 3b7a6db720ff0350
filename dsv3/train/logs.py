"""What a run writes about itself: metrics.jsonl, TensorBoard, the terminal."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX
import tqdm


class MetricsLog:
  """metrics.jsonl, the truth, and the same for TensorBoard.

  A line is strict JSON: a number that is not finite becomes null. Lines of
  steps after `step` are dropped when a run goes on from there: those steps
  come again, and would be counted twice.
  """

  def __init__(self, workdir: pathlib.Path, step: int):
    self._path = workdir / "metrics.jsonl"
    keep_until(self._path, step)
    self._file = open(self._path, "a", buffering=1)  # a line at a time
    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=step + 1
    )

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Scalars and vectors of a step; matrices stay in memory."""
    record = {"step": step}
    for name, value in metrics.items():
      value = np.asarray(value)
      if value.ndim < 2:
        record[name] = _plain(value.tolist())
      if value.ndim == 0 and np.isfinite(value):
        self._board.add_scalar(name, value.item(), step)
    self._file.write(json.dumps(record, allow_nan=False) + "\n")

  def close(self) -> None:
    self._file.close()
    self._board.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of metrics.jsonl; a last one that a kill cut short is left out."""
  return _read(pathlib.Path(workdir) / "metrics.jsonl")


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def keep_until(path: pathlib.Path, step: int) -> None:
  """Leaves out the rows of later steps, which will be made again."""
  if not path.exists():
    return
  kept = [row for row in _read(path) if row["step"] <= step]
  draft = path.with_name(path.name + ".new")
  draft.write_text("".join(json.dumps(r) + "\n" for r in kept))
  draft.replace(path)


def _plain(value):
  if isinstance(value, list):
    return [_plain(v) for v in value]
  return value if math.isfinite(value) else None


class Progress:
  """A progress bar on a terminal, a line every ten seconds elsewhere."""

  def __init__(self, done: int, total: int, *, every_seconds: float = 10.0):
    self._total, self._every = total, every_seconds
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=total,
        initial=done,
        dynamic_ncols=True,
        bar_format="{n_fmt}/{total_fmt} {bar} {postfix}",
      )
    self._said = -math.inf

  def show(self, step: int, metrics: Mapping[str, float], left: float) -> None:
    """`metrics` of a logged step; `left` are the seconds to the end."""
    text = "  ".join(
      [
        f"loss {metrics['loss']:.3f}",
        f"{metrics['bits_per_byte']:.3f} bits/byte",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"{duration(left)} left",
      ]
    )
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
      self._bar.refresh()
    elif time.monotonic() - self._said >= self._every or step == self._total:
      self._said = time.monotonic()
      self.tell(f"step {step}/{self._total}  {text}")

  def tell(self, text: str) -> None:
    """A line that leaves the bar whole."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


class Silence:
  """Log and progress of a process that is not the first: nothing."""

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    pass

  def show(self, step: int, metrics: Mapping[str, float], left: float) -> None:
    pass

  def tell(self, text: str) -> None:
    pass

  def close(self) -> None:
    pass


def duration(seconds: float) -> str:
  """Seconds as m:ss, or h:mm:ss from an hour."""
  minutes, seconds = divmod(int(max(seconds, 0)), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
  )

"""The progress of a sweep: one table of all its runs.

rich draws it: columns that line up over runs of different states, redrawn in
place, cut to the height of the terminal. Bars of tqdm are lines of their own
that cannot. Elsewhere than on a terminal a line says what has happened.
"""

import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dsv3.lab.experiment import Run
from dsv3.train.logs import duration

_ORDER = ("running", "failed", "stopped", "elsewhere", "done", "waiting")
_STYLE = {"running": "bold", "failed": "red", "done": "green", "stopped": "red"}
_TAIL = 1 << 16  # bytes: some lines of metrics.jsonl
_QUIET_SECONDS = 60.0  # between lines about a run, where there is no terminal


class Board:
  """Shows runs and their states while it is entered."""

  def __init__(self, runs: Sequence[Run], known: Mapping[Run, str]):
    self._console = Console(stderr=True)
    self._live = None
    if self._console.is_terminal:
      self._live = Live(
        console=self._console, auto_refresh=False, vertical_overflow="crop"
      )
    self.state = dict.fromkeys(runs, "waiting")
    self._note = dict.fromkeys(runs, "")
    self._metrics: dict[Run, Mapping[str, Any]] = {run: {} for run in runs}
    self._folder: dict[Run, pathlib.Path] = {}
    self._said: dict[Run, float] = {}
    for run, text in known.items():
      self._know(run, text)

  def __enter__(self) -> "Board":
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *error) -> None:
    if self._live:
      self.refresh()
      self._live.stop()

  def count(self, state: str) -> int:
    return sum(found == state for found in self.state.values())

  def started(self, run: Run, folder: pathlib.Path) -> None:
    self._folder[run], self._said[run] = folder, time.monotonic()
    self._set(run, "running", str(folder))

  def ended(self, run: Run, line: Mapping[str, Any] | None) -> None:
    """`line` of the results; None for one that was stopped."""
    self._read(run)
    if line is None:
      self._set(run, "stopped", "goes on with the same command")
    elif line["error"]:
      self._set(run, "failed", line["error"])
    else:
      self._metrics[run] = {**self._metrics[run], **_shown(line)}
      seconds = line["wall_seconds"]
      self._set(run, "done", f"in {duration(seconds)}" if seconds else "")

  def elsewhere(self, run: Run) -> None:
    self._set(run, "elsewhere", "another sweep is at it")

  def known(self, run: Run, text: str) -> None:
    self._know(run, text)
    self._tell(run)

  def refresh(self) -> None:
    for run in self._folder:
      if self.state[run] == "running":
        self._read(run)
        self._tell_now_and_then(run)
    if self._live:
      self._live.update(self._table(), refresh=True)

  def _know(self, run: Run, text: str) -> None:
    self.state[run] = "done" if text == "done" else "failed"
    self._note[run] = "before" if text == "done" else f"before: {text}"

  def _set(self, run: Run, state: str, note: str) -> None:
    self.state[run], self._note[run] = state, note
    self._tell(run)

  def _tell(self, run: Run) -> None:
    if self._live:
      return
    done = len(self.state) - self.count("waiting") - self.count("running")
    text = f"[{done}/{len(self.state)}] {run}: {self.state[run]}"
    if self.state[run] == "done" and self._metrics[run]:
      text += f", held-out loss {_number(self._metrics[run].get('heldout'))}"
    print(f"{text} {self._note[run]}".rstrip(), flush=True)

  def _tell_now_and_then(self, run: Run) -> None:
    now, metrics = time.monotonic(), self._metrics[run]
    if self._live or now - self._said[run] < _QUIET_SECONDS or not metrics:
      return
    self._said[run] = now
    _, step, loss, *_, left = self._cells(run)
    end = f", {left} left" * bool(left)
    print(f"{run}: step {step}, loss {loss}{end}", flush=True)

  def _read(self, run: Run) -> None:
    """The last logged step."""
    path = self._folder[run] / "metrics.jsonl"
    if found := last_step(path):
      self._metrics[run] = found

  def _table(self) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "held-out", "MaxVio", "tokens/s", "left"):
      table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    rows = sorted(self.state, key=lambda run: _ORDER.index(self.state[run]))
    failed = [run for run in rows if self.state[run] == "failed"]
    # What is waiting is cut first where the terminal is too low.
    for run in rows[: max(self._console.height - 3 - len(failed), 1)]:
      state = self.state[run]
      note = self._note[run] if state not in ("running", "failed") else ""
      styled = Text(state, _STYLE.get(state, "dim"))
      table.add_row(str(run), styled, *self._cells(run)[1:], note)
    counts = [f"{self.count(s)} {s}" for s in _ORDER if self.count(s)]
    told = [f"{run}: {self._note[run]}" for run in failed]
    errors = [
      Text(text, "red", no_wrap=True, overflow="ellipsis") for text in told
    ]
    return Group(table, *errors, Text(", ".join(counts), "dim"))

  def _cells(self, run: Run) -> list[str]:
    found, steps = self._metrics[run], run.values.train.steps
    speed, step = found.get("tokens_per_second"), found.get("step", 0)
    left = ""
    if speed and self.state[run] == "running":
      left = duration((steps - step) * found["batch_tokens"] / speed)
    return [
      str(run),
      f"{step}/{steps}" if step else "",
      _number(found.get("loss/main")),
      _number(found.get("heldout")),
      _number(found.get("max_vio"), 2),
      f"{speed:,.0f}" if speed else "",
      left,
    ]


def _shown(line: Mapping[str, Any]) -> dict[str, Any]:
  """Of a finished run's line."""
  final = line["final"]
  return {"heldout": final.get("loss"), "max_vio": final.get("max_vio")}


def _number(value: float | None, digits: int = 4) -> str:
  return "" if value is None else f"{value:.{digits}f}"


def last_step(path: pathlib.Path) -> dict[str, Any]:
  """The last whole line about a step in metrics.jsonl; {} if there is none."""
  try:
    with open(path, "rb") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(size - _TAIL, 0))
      rows = file.read().split(b"\n")[:-1]
  except FileNotFoundError:
    return {}
  for row in reversed(rows):
    if b'"loss/main"' in row:
      try:
        return json.loads(row)
      except json.JSONDecodeError:  # cut where the tail begins
        return {}
  return {}

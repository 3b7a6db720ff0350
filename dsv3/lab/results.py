"""results.jsonl: a line a run, all that is kept of it in the clone.

Lines are only ever added, under a lock, so that sweeps on several machines with
one file system write one file. The last line of a run is the one that counts.
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from dsv3.config import ConfigError

Line = dict[str, Any]
Key = tuple[str, int]  # id and seed


def append(path: pathlib.Path, line: Mapping[str, Any]) -> None:
  """Adds a line, whole or not at all in the eyes of a reader."""
  text = json.dumps(line, allow_nan=False) + "\n"
  with open(path, "ab+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    if file.seek(0, os.SEEK_END):
      file.seek(-1, os.SEEK_END)
      if file.read(1) != b"\n":  # of a writer that was killed: its own line
        text = "\n" + text
    file.write(text.encode())
    file.flush()
    os.fsync(file.fileno())


def read(path: pathlib.Path) -> dict[Key, Line]:
  """The newest line of every run; what a kill cut short is left out."""
  if not path.is_file():
    return {}
  with open(path) as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    rows = file.read().split("\n")
  return newest(_parsed(rows, path))


def newest(lines: Iterable[Line]) -> dict[Key, Line]:
  """The last line of every run."""
  return {(line["id"], line["seed"]): line for line in lines}


def _parsed(rows: list[str], path: pathlib.Path) -> Iterable[Line]:
  for number, row in enumerate(rows, 1):
    if not row.strip():
      continue
    try:
      line = json.loads(row)
    except json.JSONDecodeError:
      continue
    if not isinstance(line, dict) or not {"id", "seed"} <= line.keys():
      raise ConfigError(f"{path}:{number}: found no id and seed, wanted a run")
    yield line

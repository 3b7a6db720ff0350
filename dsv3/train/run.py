"""The run folder: what was asked for, what ran, on what.

config.json      the config as given, resolved, and where it departs
starts.jsonl     one line a start: date, command, commit, versions, device
metrics.jsonl    one line a logged step or evaluation
tensorboard/     the same for TensorBoard
checkpoints/     see dsv3.train.checkpoint
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dsv3 import config, overlay
from dsv3.config import ConfigError

# Keys that a run may change when it goes on, and why that is no other run.
MAY_CHANGE = (
  {
    "train.steps": "how far to go",
    "train.max_minutes": "how long to go",
    "train.max_skipped": "when to give up",
    "train.log_every": "what is written down, not what is computed",
    "train.eval_every": "what is written down, not what is computed",
    "train.eval_batches": "what is written down, not what is computed",
    "train.final_eval_batches": "what is written down, not what is computed",
    "train.checkpoint_every": "what is written down, not what is computed",
    "train.checkpoint_minutes": "what is written down, not what is computed",
    "train.checkpoints_kept": "what is written down, not what is computed",
    "data.cache": "where the same tokens lie",
  }
  | {
    f"model.precision.{field.name}": "how Linears are quantised from here on"
    for field in dataclasses.fields(config.Precision)
  }
  | {
    f"mesh.{field.name}": "on what, not what is computed"
    for field in dataclasses.fields(config.Mesh)
  }
)
_PACKAGES = "jax jaxlib flax optax orbax-checkpoint numpy tokenizers".split()


@dataclasses.dataclass(frozen=True)
class Given:
  """A config as the user gave it."""

  config: str | None = None  # the file
  overrides: tuple[str, ...] = ()
  command: str = ""


class Position(NamedTuple):
  """Where a start of a run went on, and where in the data."""

  done: int  # steps
  sequences_ahead: int  # of what the schedule says; not 0 if that has changed


def stored_config(workdir: str | pathlib.Path) -> config.Config:
  """The resolved config of a run; ConfigError if there is no run."""
  path = pathlib.Path(workdir) / "config.json"
  if not path.is_file():
    raise ConfigError(f"{workdir}: found no run there (no {path})")
  try:
    return config.build(json.loads(path.read_text())["resolved"])
  except (json.JSONDecodeError, KeyError) as error:
    raise ConfigError(f"{path}: damaged: {error}") from error


def config_at(workdir: str | pathlib.Path, step: int) -> config.Config:
  """The config under which a run made step `step` + 1, or would have.

  What later starts have changed is undone.
  """
  tree = as_tree(stored_config(workdir))
  for start in reversed(_starts(workdir)):
    if start["done"] > step:
      before = {key: old for key, (old, _) in start["changed"].items()}
      overlay.overlay(tree, before)
  return config.build(tree)


def _starts(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """The lines of starts.jsonl; none of weights that were imported."""
  path = pathlib.Path(workdir) / "starts.jsonl"
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.splitlines()]


def as_tree(values: config.Config) -> ConfigDict:
  """The config as a locked ConfigDict, which overrides can be laid over."""
  return ConfigDict(dataclasses.asdict(values)).lock()


def changes(
  workdir: pathlib.Path, values: config.Config
) -> dict[str, tuple[Any, Any]]:
  """Where `values` departs from the run in `workdir`: all of MAY_CHANGE.

  Any other difference is a ConfigError that names the keys: it would be
  another run under the name of this one.
  """
  if not (workdir / "config.json").exists():
    return {}
  stored = dataclasses.asdict(stored_config(workdir))
  pairs = overlay.difference(stored, dataclasses.asdict(values))
  # Of imported weights that no step has changed yet, only the network stays.
  fresh = not (workdir / "starts.jsonl").exists()
  other = [
    f"{key} = {old!r}"
    for key, (old, _) in pairs.items()
    if key not in MAY_CHANGE and not (fresh and not key.startswith("model."))
  ]
  if other:
    raise ConfigError(
      f"--workdir={workdir}: holds a run of another config, with "
      f"{', '.join(other)}; choose another folder"
    )
  return pairs


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the run folder: a second process that trains there is refused.

  The system frees the lock of a killed process. Raises ConfigError if another
  has it, OSError if the folder cannot be written.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(
        f"--workdir={workdir}: another process is training there"
      ) from error
    yield


def record(
  workdir: pathlib.Path, values: config.Config, given: Given
) -> dict[str, tuple[Any, Any]]:
  """Writes config.json; returns `changes`.

  Raises OSError if the folder cannot be written.
  """
  changed = changes(workdir, values)
  text = json.dumps(_description(workdir, values, given), indent=2)
  workdir.mkdir(parents=True, exist_ok=True)
  # Renamed into place: a kill in between leaves the old file or the new one.
  draft = workdir / "config.json.new"
  draft.write_text(text + "\n")
  draft.replace(workdir / "config.json")
  return changed


def record_start(
  workdir: pathlib.Path,
  given: Given,
  steps: int,
  changed: Mapping[str, Any],
  position: Position,
) -> None:
  """Adds a line to starts.jsonl."""
  start = _start(given) | {"changed": changed, "steps": steps}
  with open(workdir / "starts.jsonl", "a") as file:
    file.write(json.dumps(start | position._asdict()) + "\n")


def position_of(workdir: pathlib.Path, step: int) -> tuple[int, Position]:
  """`train.steps` and the start that held when step `step` was made.

  Raises ConfigError for weights that were imported, of which no step was made.
  """
  starts = _starts(workdir)
  if not starts:
    raise ConfigError(
      f"{workdir}: found no starts.jsonl, wanted a run that has made steps"
    )
  held = [s for s in starts if s["done"] < step] or starts[:1]
  start = held[-1]
  return start["steps"], Position(start["done"], start["sequences_ahead"])


def _description(
  workdir: pathlib.Path, values: config.Config, given: Given
) -> dict[str, Any]:
  """What config.json holds. A run that goes on keeps what it was given first."""
  resolved = dataclasses.asdict(values)
  path = workdir / "config.json"
  if path.exists():
    return json.loads(path.read_text()) | {"resolved": resolved}
  roots = [str(overlay.CONFIGS / "v3_671b.py")]
  if given.config and (base := overlay.base_of(given.config)):
    roots.append(base)
  departures = {}
  for root in dict.fromkeys(roots):
    whole = dataclasses.asdict(config.build(overlay.load(root)))
    departures[pathlib.Path(root).stem] = overlay.difference(whole, resolved)
  return {
    "given": {
      "config": given.config,
      "text": overlay.text_of(given.config) if given.config else None,
      "overrides": given.overrides,
    },
    "departs_from": departures,
    "resolved": resolved,
  }


def _start(given: Given) -> dict[str, Any]:
  """When, by which command, with which code and on which machine."""
  return {
    "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    "command": given.command,
    **commit(),
    "python": platform.python_version(),
    "versions": {p: importlib.metadata.version(p) for p in _PACKAGES},
    "device": _device(),
  }


def _device() -> dict[str, Any]:
  """The first device; of a CPU, which JAX calls `cpu`, its name and cores."""
  device = jax.devices()[0]
  out = {
    "platform": device.platform,
    "kind": device.device_kind,
    "count": jax.device_count(),
    "machine": platform.platform(),
  }
  if device.platform != "cpu":
    return out
  model = _processor(pathlib.Path("/proc/cpuinfo"))
  return out | ({"model": model} if model else {}) | {"cores": _cores()}


def _processor(cpuinfo: pathlib.Path) -> str:
  """What the processor calls itself; "" where the system does not say."""
  text = cpuinfo.read_text() if cpuinfo.exists() else ""
  named = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
  return named[1] if named else platform.processor()


def _cores() -> int:
  """Those that this process may run on; all where the system has no such set."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def commit() -> Mapping[str, Any]:
  """The commit of dsv3's clone and whether code differs; empty without Git.

  Python files, configs among them: what a sweep writes beside them is no code.
  """
  here = pathlib.Path(__file__).parent

  def git(*words):
    done = subprocess.run(
      ["git", "-C", here, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  try:
    return {
      "commit": git("rev-parse", "HEAD"),
      "dirty": bool(git("status", "--porcelain", "--", ":(top)*.py")),
    }
  except (OSError, subprocess.CalledProcessError):
    return {}


def command_line() -> str:
  """The command that started this process, as the user would type it."""
  name, *words = sys.argv
  return shlex.join([pathlib.Path(name).name, *words])

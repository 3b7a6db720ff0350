"""What an experiment asks of a run beside its scores: `measure` of `sweep.py`.

  python -m dsv3.lab.measure experiments/mtp runs/mtp/depth=1-s0

is what a sweep runs when a run has ended, on the machine that trained it. The
numbers come under `final` of its line.
"""

import json
import math
import pathlib
import sys
from collections.abc import Mapping

from dsv3 import overlay
from dsv3.config import ConfigError

FILE = "measured.json"


def command(folder: pathlib.Path, workdir: pathlib.Path) -> list[str] | None:
  """The command of a run; None for an experiment that asks for nothing more."""
  if not hasattr(overlay.module_of(folder / "sweep.py"), "measure"):
    return None
  return [sys.executable, "-m", "dsv3.lab.measure", str(folder), str(workdir)]


def read(workdir: pathlib.Path) -> Mapping[str, float]:
  """What was measured; empty where nothing was."""
  path = workdir / FILE
  return json.loads(path.read_text()) if path.exists() else {}


def main(folder: str, workdir: str) -> None:
  module = overlay.module_of(pathlib.Path(folder) / "sweep.py")
  found = module.measure(workdir)
  for name, value in found.items():
    if not (isinstance(value, (int, float)) and math.isfinite(value)):
      raise ConfigError(
        f"measure: {name}: found {value!r}, wanted a finite number"
      )
  (pathlib.Path(workdir) / FILE).write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])

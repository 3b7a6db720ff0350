"""`dsv3 replay`: steps of a run once more, with a knob changed or routing frozen."""

import argparse
import json
import pathlib

from dsv3 import overlay
from dsv3.cache import use_compilation_cache
from dsv3.lab import replay as replays
from dsv3.train import run


def replay(arguments: argparse.Namespace) -> None:
  """A table beside the run's own numbers, and all of them as JSON lines."""
  use_compilation_cache()
  workdir = pathlib.Path(arguments.workdir)
  tree = run.as_tree(run.config_at(workdir, arguments.first))
  diff = overlay.parse(tree, arguments.diff or ())
  found = replays.replay(
    workdir,
    arguments.first,
    arguments.steps,
    diff,
    record=arguments.record,
    frozen=arguments.frozen,
  )
  if tree.model.precision.guard_action == "keep_high":
    print(
      "precision.guard looks at no step of a replay: Linears stay as they are"
    )
  routing = f", choices of {arguments.frozen}" if arguments.frozen else ""
  print(
    f"{workdir} after step {arguments.first}, "
    f"with {diff or 'no change'}{routing}:"
  )
  rows = replays.beside(workdir, list(found))
  print(replays.table(rows))
  if arguments.record:
    other = sum(row["replay"]["misrecorded"] for row in rows)
    print(f"\n{arguments.record}: {other:.0f} choices not those of the steps")
  out = pathlib.Path(arguments.out or _path(workdir, arguments))
  out.parent.mkdir(parents=True, exist_ok=True)
  head = {"diff": diff, "from": arguments.first}
  head |= {"frozen": arguments.frozen} if arguments.frozen else {}
  lines = [head, *rows]
  out.write_text("".join(json.dumps(line) + "\n" for line in lines))
  print(f"\n{out}")


def _path(workdir: pathlib.Path, arguments) -> pathlib.Path:
  name = ",".join(arguments.diff or ["same"])
  if arguments.frozen:
    name = f"{pathlib.Path(arguments.frozen).stem},{name}"
  name = name.replace("/", "_")[:80]
  return workdir / "replays" / f"{arguments.first}-{name}.jsonl"

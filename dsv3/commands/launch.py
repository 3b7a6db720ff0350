"""`dsv3 launch`: writes the script of a run on many nodes."""

import argparse
import pathlib

from dsv3 import config
from dsv3.commands.given import values_of
from dsv3.lab import launch
from dsv3.train import run


def write(arguments: argparse.Namespace) -> int:
  """Prints where the script is; with --submit hands it in."""
  values = config.build(values_of(arguments))
  engine, options = arguments.engine, dict(arguments.set)
  workdir = arguments.workdir or launch.default_workdir(
    engine, values.name, options
  )
  program = ["python", "-m", "dsv3"] if engine == "gke" else ["dsv3"]
  words = [*program, "train", f"--config={arguments.config}"]
  words += [f"--workdir={workdir}"]
  words += [f"--config.{override}" for override in arguments.overrides]
  mesh = launch.mesh_of(values, engine, arguments.nodes, arguments.devices)
  if arguments.chip:
    print(launch.forecast(values, mesh, arguments.chip))
  text = launch.script(
    engine,
    values,
    words,
    nodes=arguments.nodes,
    devices=arguments.devices,
    workdir=workdir,
    options=options,
    written_by=run.command_line(),
  )
  default = f"runs/{values.name}.{engine}{launch.suffix(engine)}"
  path = pathlib.Path(arguments.out or default)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  if arguments.submit:
    return launch.submit(engine, path)
  command = " ".join(launch.ENGINES[engine].submit)
  print(f"{path}\nhand it in with --submit, or: {command} {path}")
  return 0

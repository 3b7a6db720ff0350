"""`dsv3 plan`: the planner's answer as text, JSON or a page."""

import argparse
import json
import math
import os
import pathlib
import sys

from dsv3 import config, overlay
from dsv3.errors import ConfigError, RunError
from dsv3.plan import answer, report, serve
from dsv3.plan.unit import Unit


def plan(arguments: argparse.Namespace) -> int | None:
  """Prints what a config costs on the chips that are named."""
  if arguments.print_sharding:
    return _print_sharding(arguments)
  if arguments.lower:
    return _lower(arguments)
  found = answer.of(
    _values(arguments),
    chip=arguments.chip,
    n_chips=arguments.chips,
    mesh=arguments.mesh,
    preset=arguments.preset,
    precision=arguments.precision,
    microbatches=arguments.microbatches,
    schedule=arguments.schedule,
    everything=arguments.search,
    unit=_unit(arguments),
    batch=arguments.batch,
    tokens=arguments.tokens,
    price=arguments.price,
    accepted=_accepted(arguments),
  )
  if arguments.html:
    from dsv3.plan import page

    path = pathlib.Path(arguments.html)
    if path.is_dir() or not path.parent.is_dir():
      raise ConfigError(f"--html: found {path}, wanted a file in a folder")
    path.write_text(page.html(found))
  if arguments.json:
    print(json.dumps(answer.as_dict(found), indent=1))
  elif not arguments.html:
    print(report.text(found, search=arguments.search))
  else:
    print(arguments.html)


def _lower(arguments: argparse.Namespace) -> int:
  """Compiles the step for devices that are not there; 1 for a surprise."""
  from dsv3.plan import lower

  values = _of_run(arguments)
  lower.prepare(arguments.lower)
  try:
    found = lower.lower(values, arguments.lower, arguments.max_minutes)
  except RunError as error:
    print(f"dsv3: error: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # the compiler is still at it, and nothing stops it
  if arguments.json:
    print(json.dumps(found.as_dict(), indent=1))
  else:
    print(found.text())
  return 1 if found.surprises else 0


def _print_sharding(arguments: argparse.Namespace) -> None:
  """Prints what lies where in a run on devices that need not be there."""
  from dsv3.train import layout

  values = _of_run(arguments)
  sizes = [getattr(values.mesh, axis) for axis in config.INNER_FIRST]
  least = math.prod(max(size, 1) for size in sizes)  # of -1 one
  n_devices = arguments.chips or least
  print(layout.describe(values, layout.of_number(values, n_devices)))


def _of_run(arguments: argparse.Namespace) -> config.Config:
  """The config of a run on --mesh, in as many microbatches."""
  _check_config(arguments)
  given = arguments.mesh.split(",") if arguments.mesh else []
  mesh = ["mesh.data=1"] if given else []
  mesh += [f"mesh.{size}" for size in given]
  tree = overlay.load(arguments.config, [*mesh, *arguments.overrides])
  diff = {}
  if arguments.microbatches:
    diff["train.microbatches"] = arguments.microbatches
  if arguments.seq:
    diff["data.seq_len"] = arguments.seq
  return config.build(overlay.overlay(tree, diff))


def _check_config(arguments: argparse.Namespace) -> None:
  if not arguments.config:
    raise ConfigError("--config: missing; for example --config=v3_671b")


def _values(arguments: argparse.Namespace) -> config.Config:
  _check_config(arguments)
  tree = overlay.load(arguments.config, arguments.overrides)
  if arguments.seq:
    overlay.overlay(tree, {"data.seq_len": arguments.seq})
  values = config.build(tree)
  limit = answer.MAX_CONTEXT
  if values.data.seq_len > limit:
    raise ConfigError(
      f"--seq: found {values.data.seq_len}, wanted at most {limit}, to which "
      "the released models are extended"
    )
  return values


def _accepted(arguments: argparse.Namespace) -> float:
  share = arguments.accepted
  if share is None:
    return serve.DRAFT_ACCEPTED
  if share > 1:
    raise ConfigError(
      f"--accepted: found {share:g}, wanted a share from 0 to 1"
    )
  return share


def _unit(arguments: argparse.Namespace) -> Unit | None:
  """A unit of so many chips, if it is named."""
  if arguments.unit_tensor and not arguments.unit:
    raise ConfigError("--unit_tensor: wants --unit, the chips of a unit")
  if not arguments.unit:
    return None
  return Unit(arguments.unit, arguments.unit_tensor or 1)

"""`dsv3 launch`: a run on many nodes as a readable script, or handed in.

The script is for an engine that is there: Slurm's sbatch, a JobSet of Kubernetes,
gcloud for a TPU slice, or bash for processes on this machine. Templates are in
`templates/`; what the config cannot be on so many devices is told here, not on them.
"""

import functools
import math
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.parallel import sizes
from dsv3.plan import answer

REQUIRED = object()


class Engine(NamedTuple):
  """A kind of script."""

  template: str
  submit: tuple[str, ...]  # the command that takes it
  devices: int  # of a node
  options: Mapping[str, Any]  # of --set, with defaults


ENGINES = {
  "slurm": Engine(
    "slurm.sh.j2",
    ("sbatch",),
    8,
    {
      "time": "24:00:00",
      "partition": "",
      "account": "",
      "qos": "",
      "setup": "",
      "grace": "300",  # seconds to save in; more if a step takes minutes
    },
  ),
  "gke": Engine(
    "gke.yaml.j2",
    ("kubectl", "apply", "-f"),
    8,
    {
      "image": REQUIRED,
      "accelerator": "",
      "topology": "",  # of a TPU slice, as 4x4x8
      "claim": REQUIRED,  # a volume that all pods write: the run folders
      "mount": "/runs",
      "restarts": "20",
      "grace": "300",  # seconds to save in; more if a step takes minutes
      "port": "12355",
    },
  ),
  "tpu-vm": Engine(
    "tpu-vm.sh.j2",
    ("bash",),
    4,
    {
      "zone": REQUIRED,
      "type": REQUIRED,  # as v5p-256
      "share": REQUIRED,  # HOST:/PATH of NFS that all hosts write: the run folders
      "mount": "/mnt/runs",
      "version": "v2-alpha-tpuv5",
      "spot": "no",
      "port": "8476",
    },
  ),
  "local": Engine("local.sh.j2", ("bash",), 1, {"port": "12355", "setup": ""}),
}
_VENV = "~/dsv3-env"  # of a TPU's host
_CORES = (
  "v2",
  "v3",
  "v4",
  "v5p",
)  # whose slices are named for cores, two a chip


def script(
  engine: str,
  values: config.Config,
  words: Sequence[str],
  *,
  nodes: int,
  devices: int | None = None,
  workdir: str,
  options: Mapping[str, str],
  written_by: str = "dsv3 launch",
) -> str:
  """The text of a script that trains `values` on `nodes` nodes.

  Args:
    engine: one of ENGINES.
    words: of the command on every node, such as dsv3 train --config=...
    devices: of a node; None: as many as are usual.
    workdir: the run folder, which all nodes share.
    options: of the engine, by name.

  Raises:
    ConfigError: an option that there is not, or that is missing; a mesh that so
      many devices cannot be, with the field.
  """
  kind = ENGINES[engine]
  devices = devices or kind.devices
  given = _options(engine, kind, options)
  mesh = mesh_of(values, engine, nodes, devices)
  if engine == "tpu-vm":
    _check_slice("type", given["type"], nodes * devices)
  if given.get("topology"):
    _check_slice("topology", given["topology"], nodes * devices)
  command, log_file = shlex.join(words), f"{workdir.rstrip('/')}.log"
  name = re.sub(r"[^a-z0-9]+", "-", f"dsv3-{values.name}".lower()).strip("-")
  fields = {
    "title": f"{values.name} on {nodes} x {devices} devices, {mesh}",
    "written_by": written_by,
    "name": name[:40].rstrip("-"),
    "folder": str(pathlib.Path.cwd()),
    "log": workdir.rstrip("/"),
    "command": command,
    "words": list(words),
    "nodes": nodes,
    "devices": devices,
    "options": given,
    "prepare": _prepare(given.get("share"), given.get("mount")),
    "on_host": _on_host(command, nodes, given.get("port"), log_file),
    "log_file": log_file,
    **given,
  }
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("dsv3.lab"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters["quote"] = shlex.quote
  return environment.get_template(kind.template).render(fields)


def mesh_of(
  values: config.Config, engine: str, nodes: int, devices: int | None
) -> config.Mesh:
  """The mesh on all devices of the nodes; ConfigError for one that cannot be."""
  devices = devices or ENGINES[engine].devices
  mesh = sizes.resolve(values.mesh, nodes * devices)
  if mesh.size != nodes * devices:
    raise ConfigError(
      f"config.mesh: found {mesh} of {mesh.size} devices, wanted all of "
      f"{nodes} x {devices}"
    )
  sizes.check_run(mesh, values, nodes * devices)
  return mesh


def forecast(values: config.Config, mesh: config.Mesh, chip: str) -> str:
  """What the planner expects of the run; ConfigError where it does not fit."""
  planned = functools.partial(
    answer.of, values, chip=chip, n_chips=mesh.size, mesh=mesh
  )
  found = planned(microbatches=values.train.microbatches)
  if not found.memory.fits:
    best = planned()
    hint = "none fits"
    if best.memory.fits:
      hint = f"wanted {best.training.layout.microbatches}"
    raise ConfigError(
      f"config.train.microbatches: found {values.train.microbatches}, with "
      f"which the run takes {found.memory.total / 1e9:,.0f} GB a {chip}; {hint} "
      f"(dsv3 plan --mesh={mesh})"
    )
  return found.forecast()


def submit(engine: str, path: pathlib.Path) -> int:
  """Hands a script to its engine; its exit code. ConfigError without it."""
  command = ENGINES[engine].submit
  if shutil.which(command[0]) is None:
    raise ConfigError(
      f"--submit: found no {command[0]} on this machine; {path} can be handed in "
      f"where there is one: {shlex.join(command)} {path}"
    )
  return subprocess.run([*command, str(path)]).returncode


def default_workdir(engine: str, name: str, options: Mapping[str, str]) -> str:
  """The run folder where none is given: on what all nodes share."""
  mount = {**ENGINES[engine].options, **options}.get("mount")
  return f"{mount}/{name}" if mount else f"runs/{name}"


def suffix(engine: str) -> str:
  """Of the script's name."""
  return pathlib.Path(ENGINES[engine].template.removesuffix(".j2")).suffix


def _options(engine: str, kind: Engine, given: Mapping[str, str]):
  for key in given:
    if key not in kind.options:
      known = ", ".join(kind.options)
      raise ConfigError(
        f"--set {key}: {engine} has none{config.nearest(key, kind.options)}; "
        f"there are {known}"
      )
  found = {**kind.options, **given}
  if missing := [key for key, value in found.items() if value is REQUIRED]:
    raise ConfigError(
      f"--set {missing[0]}: missing; {engine} cannot do without"
    )
  return found


def _check_slice(option: str, name: str, devices: int) -> None:
  """A slice of that name has so many chips."""
  generation, _, size = name.partition("-")
  try:
    if option == "topology":
      chips = math.prod(map(int, name.split("x")))
    else:
      chips = int(size) // (2 if generation in _CORES else 1)
  except ValueError as error:
    example = {"topology": "4x4x8", "type": "v5p-256"}[option]
    raise ConfigError(
      f"--set {option}: found {name}, wanted one such as {example}"
    ) from error
  if chips != devices:
    raise ConfigError(
      f"--nodes: found {devices} devices in all, wanted the {chips} chips of "
      f"{name}"
    )


def _prepare(share: str | None, mount: str | None) -> str:
  """What a TPU's host does before, once or again: code, packages, run folders."""
  uv = "~/.local/bin/uv"
  return (
    "rm -rf dsv3 && mkdir dsv3 && tar -xzf dsv3.tgz -C dsv3 && "
    "python3 -m pip install -q --user uv && "
    f"{uv} venv -q --clear --python 3.12 {_VENV} && "
    f'{uv} pip install -q --python {_VENV} -e dsv3 "jax[tpu]" && '
    f"{{ mountpoint -q {mount} || {{ sudo apt-get -qq install -y nfs-common && "
    f"sudo mkdir -p {mount} && sudo mount -t nfs {share} {mount}; }}; }}"
  )


def _on_host(command: str, nodes: int, port: str | None, log_file: str) -> str:
  """What a TPU's host runs, and leaves running; the first one's words are kept."""
  metadata = (
    "curl -s -H Metadata-Flavor:Google "
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes"
  )
  return (
    f". {_VENV}/bin/activate && cd dsv3 && "
    f"id=$({metadata}/agent-worker-number) && "
    f"first=$({metadata}/worker-network-endpoints | cut -d, -f1 | cut -d: -f3) && "
    f"log={shlex.quote(log_file)} && mkdir -p $(dirname $log) && "
    "if [ $id != 0 ]; then log=$log.$id; fi && "
    f"{{ nohup {command} --coordinator=$first:{port} --process_id=$id "
    f"--num_processes={nodes} >>$log 2>&1 </dev/null & echo $! >~/dsv3.pid; }}"
  )

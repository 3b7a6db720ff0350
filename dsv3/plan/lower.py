"""The real training step, compiled for devices that are not there.

Where `dsv3 plan` adds up, this compiles: the step of a run on its mesh, for CPU
devices that are made up, for H200s or for a TPU slice, and reads in the program
what a device holds, what it sends, and what should not be there. Nothing runs and
no weight is made.

  cpu:8         eight devices of this machine's CPU
  h200:4x8      nodes x GPUs; pip install "dsv3[hopper-compile]"
  v5p:4x4x8     a TPU slice; pip install "jax[tpu]"
"""

import contextlib
import itertools
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from dsv3 import config
from dsv3.errors import ConfigError, RunError
from dsv3.plan import chips, hlo, places
from dsv3.plan.lowered import Lowered
from dsv3.train import layout, program, schedule

LARGE = 1 << 24  # bytes of an array from which on a surprise is one


def prepare(target: str) -> None:
  """Environment of a target; before JAX has looked for devices.

  Raises ConfigError for a target that is none, or where XLA's warnings are off.
  """
  kind, n = _parse(target)
  if (level := os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0")) not in ("0", "1"):
    raise ConfigError(
      f"TF_CPP_MIN_LOG_LEVEL in the environment: found {level}, wanted 0 or 1: "
      "what the compiler warns of is read"
    )
  if kind == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n[0])
  elif kind == "h200":
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    jax.config.update("jax_platforms", "cpu,cuda")
  else:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")


def devices(target: str) -> Sequence[jax.Device]:
  """Devices of a target, of which none need be there; ConfigError without the
  package that compiles for them."""
  kind, n = _parse(target)
  if kind == "cpu":
    return jax.devices("cpu")[: n[0]]
  try:
    if kind == "h200":
      from dsv3.plan.h200 import TARGET

      text = "x".join(map(str, (*n, 1)))
      found = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET, topology=text
      )
    else:
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, n))}"
      )
  except Exception as error:  # of a plugin that is not there, of many kinds
    package = "dsv3[hopper-compile]" if kind == "h200" else "jax[tpu]"
    reason = str(error).strip().split("\n")[0][:120]
    raise ConfigError(
      f'--lower={target}: {reason}; wanted: pip install "{package}"'
    ) from error
  return found.devices


def _parse(target: str) -> tuple[str, tuple[int, ...]]:
  kind, _, size = target.partition(":")
  n = [int(part) for part in size.split("x") if part.isdigit()]
  wanted = {"cpu": (1,), "h200": (2,)}.get(kind, (2, 3))
  known = kind in ("cpu", "h200") or kind.startswith(("v", "tpu"))
  if (
    not known or len(n) != size.count("x") + 1 or len(n) not in wanted or 0 in n
  ):
    raise ConfigError(
      f"--lower: found {target}, wanted one such as cpu:8, h200:1x8 (nodes x "
      "GPUs) or v5p:4x4x8"
    )
  return kind, tuple(n)


def lower(values: config.Config, target: str, minutes: float = 30.0) -> Lowered:
  """Compiles the step of `values` on config.mesh of the target's devices.

  `prepare` must have been called before.

  Raises:
    ConfigError: a mesh that cannot be, or a target that nothing here compiles for.
    RunError: it takes more than `minutes`, and goes on behind the error.
  """
  there = devices(target)
  where = layout.of_devices(values, there)
  with _stderr() as said, _compiled_anew():
    traced, compiled, *seconds = _within(
      minutes, lambda: _compile(values, where, target)
    )
  memory, text = compiled.memory_analysis(), compiled.as_text()
  found = hlo.collectives_of(text)
  made = Lowered(
    target=target,
    mesh=where.sizes,
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    collectives=found,
    times={part: places.times(part, values) for part in places.PARTS},
    shared=hlo.meanwhile(text, "shared"),
    surprises=[
      *_remade(said),
      *_gathered(found, values, where.sizes),
      *_upcast(traced.jaxpr.jaxpr, values),
    ],
    trace_seconds=seconds[0],
    compile_seconds=seconds[1],
  )
  made.surprises.extend(_too_large(made.total, there[0]))
  return made


def _compile(values: config.Config, where: layout.Layout, target: str):
  """The step traced and compiled, and the seconds of each."""
  plan = schedule.make(values)
  begin = time.monotonic()
  batch = layout.batch_like(values, plan.batch_size(plan.steps - 1))
  at = lambda x, sharding: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=sharding
  )
  with _kernels_for(target, values):
    made = program.make(values, where, plan)
    traced = made.step.trace(
      jax.tree.map(at, made.like, made.shardings),
      jax.tree.map(at, batch, where.of_batch()),
    )
    lowered = traced.lower()
  traced_at = time.monotonic()
  compiled = lowered.compile()
  return traced, compiled, traced_at - begin, time.monotonic() - traced_at


def _within(minutes: float, work: Callable[[], Any]) -> Any:
  """What `work` returns or raises, or RunError when the time is over."""
  outcome = []

  def run():
    try:
      outcome.append((work(), None))
    except BaseException as error:  # of the thread that waits
      outcome.append((None, error))

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(60 * minutes)
  if not outcome:
    raise RunError(
      f"--lower: not compiled after {minutes:g} minutes (--max_minutes); "
      "recomputing more (model.remat=full) leaves the compiler less to fit"
    )
  found, error = outcome[0]
  if error:
    raise error
  return found


@contextlib.contextmanager
def _kernels_for(target: str, values: config.Config) -> Iterator[None]:
  """In it Pallas, tokamax and FP8 make kernels for an H200 that is not there."""
  if not target.startswith("h200"):
    yield
    return
  device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
    if values.model.moe.kernel == "tokamax":
      import tokamax

      stack.enter_context(tokamax.config.cross_compile(True))
    yield


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
  """In it JAX takes no program of its cache: such a one comes without the compiler's
  warnings, and with the places of another that differs in names only."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # whether it is used is asked once
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
  """Lines that the compiler writes to the process's stderr; there at the end."""
  said: list[str] = []
  with tempfile.TemporaryFile("w+") as file:
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield said
    finally:
      os.dup2(kept, 2)
      os.close(kept)
      file.seek(0)
      said.extend(file.read().splitlines())


def _remade(said: Sequence[str]) -> list[str]:
  """XLA's own warning that it gathers an array whole and cuts it again.

  Token ids are small and are not told.
  """
  found = []
  for line in said:
    shape = re.search(r"(\w+)\[([\d,]*)\]", line)
    if "nvoluntary full remat" not in line or "fake_parameter" in line:
      continue  # the latter is a guess of what another way would cost
    if shape and hlo.size(shape[0]) > LARGE:
      found.append(f"involuntary full rematerialization of {shape[0]}: {line}")
  return found


def _gathered(found, values: config.Config, mesh: config.Mesh) -> list[str]:
  """An all-gather of as much as all experts of a layer, where they are dealt."""
  if mesh.expert == 1 or values.model.ffn != "moe":
    return []
  return [
    f"an all-gather of {c.result}: all experts of a layer"
    for c in found
    if c.kind == "all-gather"
    for dims in re.findall(r"\[([\d,]+)\]", c.result)
    if _of_all_experts([int(n) for n in dims.split(",")], values.model, mesh)
  ]


def _of_all_experts(dims, model: config.Model, mesh: config.Mesh) -> bool:
  """Are these the dims of a matrix of every expert, or of a device's part of each?

  Experts may be two dims, devices and those of one; gate and up may be one matrix.
  """
  own = [model.n_moe_layers, model.moe.n_routed // mesh.expert]
  if dims[:2] == own:  # a device's experts of all layers
    return False
  matrix = model.dim * model.moe.hidden
  share = matrix // (mesh.fsdp * mesh.tensor)
  for start, end in itertools.combinations(range(len(dims) + 1), 2):
    rest = math.prod(dims[end:])
    if math.prod(dims[start:end]) == model.moe.n_routed:
      if rest >= share and 2 * matrix % rest == 0:
        return True
  return False


def _too_large(total: int, device: jax.Device) -> list[str]:
  """More than the memory of the device; a CPU has that of its machine."""
  chip = chips.of_device(device.device_kind)
  room = chip and chip.hbm * chips.REPORTED / chip.devices
  if not room or total <= room:
    return []
  return [
    f"does not fit: a device holds {total / 1e9:,.1f} GB of the "
    f"{room / 1e9:,.0f} of {chip.name}; dsv3 plan --search says which meshes fit"
  ]


def _upcast(jaxpr, values: config.Config) -> list[str]:
  """Products of experts' matrices in float32, in a model of bfloat16."""
  m = values.model
  if m.dtype != "bfloat16" or m.ffn != "moe":
    return []
  found = set()
  for eqn in _equations_of("eq12", jaxpr):
    if eqn.primitive.name not in ("dot_general", "ragged_dot_general"):
      continue
    avals = [v.aval for v in eqn.invars[:2]]
    if {a.dtype.name for a in avals} == {"float32"}:
      found.add(" by ".join(str(a.shape) for a in avals))
  return [f"experts multiply in float32: {text}" for text in sorted(found)]


def _equations_of(scope: str, jaxpr, within: bool = False):
  """Equations of a jaxpr and of all within it that were traced in a scope."""
  for eqn in jaxpr.eqns:
    here = within or scope in str(eqn.source_info.name_stack)
    if here:
      yield eqn
    for inner in _inner(eqn):
      yield from _equations_of(scope, inner, here)


def _inner(eqn):
  """The jaxprs in an equation's parameters."""
  for value in eqn.params.values():
    for one in value if isinstance(value, (tuple, list)) else (value,):
      one = getattr(one, "jaxpr", one)
      if hasattr(one, "eqns"):
        yield one

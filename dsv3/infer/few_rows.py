"""Products of few rows on a CPU, by a kernel of our own: `few_rows.cc`.

XLA's CPU packs a matrix anew for every product, and copies an expert out of a stack
before: for a few rows that takes longer than to multiply. The kernel is compiled at
its first use, for the processor that is there, and kept in the user's cache; without
a C++ compiler XLA multiplies.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import jaxlib

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
_TARGETS = [
  f"dsv3_{product}_{dtype}"
  for product in ("grouped", "scores")
  for dtype in ("float32", "uint16")
]

_log = logging.getLogger(__name__)


def grouped(x_AI: jax.Array, w_EIO: jax.Array, upto_E: jax.Array) -> jax.Array:
  """Rows by the matrix of their group, float32 [A, O]; rows of no group give 0.

  Args:
    x_AI: float32, sorted by group.
    w_EIO: float32, or bits of bfloat16 as uint16.
    upto_E: int32, the rows of all groups up to each, at most A.
  """
  shape = jax.ShapeDtypeStruct((x_AI.shape[0], w_EIO.shape[2]), jnp.float32)
  call = jax.ffi.ffi_call(f"dsv3_grouped_{w_EIO.dtype}", shape)
  return call(x_AI, w_EIO, upto_E)


def scores(x_GRI: jax.Array, w_GMI: jax.Array) -> jax.Array:
  """Every row of a group with every one of the other's, float32 [G, R, M].

  x is float32, w float32 or bits of bfloat16 as uint16.
  """
  shape = (*x_GRI.shape[:2], w_GMI.shape[1])
  shape = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.ffi.ffi_call(f"dsv3_scores_{w_GMI.dtype}", shape)(x_GRI, w_GMI)


@functools.cache
def available() -> bool:
  """Is the kernel there, or can it be made?"""
  try:
    library = ctypes.CDLL(str(_compiled()))
  except (OSError, RuntimeError, subprocess.SubprocessError) as error:
    said = getattr(error, "stderr", None) or str(error)
    _log.warning("decoding without kernels of our own: %s", said.strip())
    return False
  for name in _TARGETS:
    target = jax.ffi.pycapsule(getattr(library, name))
    jax.ffi.register_ffi_target(name, target, platform="cpu")
  return True


def _compiled() -> pathlib.Path:
  """The library for this source, jaxlib and machine.

  Raises OSError without a compiler, RuntimeError without a home, CalledProcessError
  of a compiler that fails.
  """
  machine = _processor(), *platform.libc_ver()
  parts = _SOURCE.read_text(), jaxlib.__version__, *_FLAGS, *machine
  digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
  library = _cache() / f"few_rows-{digest}.so"
  if not library.exists():
    compiler = _compiler()
    _log.warning("%s is compiled, once here: some seconds", _SOURCE.name)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
      made = pathlib.Path(folder) / library.name
      include = f"-I{jax.ffi.include_dir()}"
      command = [compiler, *_FLAGS, include, str(_SOURCE), "-o", str(made)]
      subprocess.run(command, check=True, capture_output=True, text=True)
      made.replace(library)  # whole or not at all: others may be at it
  return library


def _compiler() -> str:
  for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
    if name and (found := shutil.which(name)):
      return found
  raise OSError("no C++ compiler found (g++, or that of CXX)")


def _processor() -> str:
  """What `-march=native` means here; homes are shared by unlike machines."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.platform() + platform.processor()
  kinds = ("model name", "flags", "Features", "CPU part")
  return "\n".join(sorted({x for x in lines if x.startswith(kinds)}))


def _cache() -> pathlib.Path:
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  folder = pathlib.Path(home).expanduser() / "dsv3"
  folder.mkdir(parents=True, exist_ok=True)
  return folder
